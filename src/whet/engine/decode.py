"""Decoding: the decoder layers on new tokens alone, with the keys and values of those before kept.

The model's own decoder still embeds the tokens and makes the angles; its layers find a step in their
arguments and compute with it. A step knows where keys and values go and what each new token may see:
those of whole prompts (PromptStep), of one token a sequence in slots of our own (SlotStep), or of one
token a sequence in a cache of transformers (CacheStep), for callers of `model.generate`.

Shapes: T new tokens, B sequences (one new token each), L tokens in the longest, D model width, H query
heads, G key/value heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from whet.engine.layer import live_norm, rope_angles
from whet.engine.product import Product, live_product, ready_product
from whet.engine.projection import Unsupported
from whet.engine.spec import AttentionSpec, HalfSpec, LayerSpec, NormSpec
from whet.engine.unpad import Packed
from whet.engine.varlen import Mask, varlen_forward
from whet.kernels.glu import glu_forward
from whet.kernels.norm import norm_forward
from whet.kernels.rope import HeadNorm, rope_forward


@dataclass(frozen=True, slots=True)
class DecodeLayer:
    """One layer, ready to decode.

    Args:
        number: Which layer.
        layer: The live layer.
        spec: What it computes; its attention is an AttentionSpec.
        qkv: Queries, keys and values.
        out: Attention's output.
        up: Gate and up, or up alone; None where the MLP keeps its own code.
        down: The way back.
    """

    number: int
    layer: nn.Module
    spec: LayerSpec
    qkv: Product
    out: Product
    up: Product | None
    down: Product | None


def ready_layer(
    number: int, layer: nn.Module, spec: LayerSpec, dtype: torch.dtype, copies: bool
) -> DecodeLayer:
    """Make a layer ready.

    Args:
        number: Which layer.
        layer: The live layer.
        spec: What it computes.
        dtype: Type of the hidden states.
        copies: Whether its products get weights of their own.

    Raises:
        Unsupported: Its attention keeps its own code, which only the model's own cache serves.
    """
    inside, mlp = spec.attention, spec.mlp
    if isinstance(inside, str):
        raise Unsupported(inside)

    def product(*paths: str) -> Product:
        modules = [layer.get_submodule(path) for path in paths]
        return ready_product(modules, dtype) if copies else live_product(modules)

    up = down = None
    if not isinstance(mlp, str):
        up, down = product(*mlp.up), product(mlp.down)
    return DecodeLayer(number, layer, spec, product(*inside.qkv), product(inside.out), up, down)


@dataclass
class Step:
    """What all kinds of steps share.

    Args:
        layers: The ready layers, by live layer.
    """

    layers: dict[nn.Module, DecodeLayer]
    _angles: dict[int, tuple[Any, torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, init=False
    )

    def attend(
        self, number: int, spec: AttentionSpec, q_THK: torch.Tensor, kv_T2GK: torch.Tensor
    ) -> torch.Tensor:
        """Keep a layer's new keys and values, and return its attention's output, (T, H K)."""
        raise NotImplementedError

    def angles(self, given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and the signed sin of whole heads, (T, 1, K), made once a step.

        rotated = x cos + roll(x, K / 2) sin, with sin negative in its first half.
        """
        key = id(given[0])
        if key not in self._angles:
            cos, sin = (a[0, :, None] for a in given)
            half = sin.shape[-1] // 2
            signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)
            self._angles[key] = (given, cos, signed)  # held, so that its id stays its own
        return self._angles[key][1:]


@dataclass
class Slots:
    """Keys and values of the sequences that are being decoded; the first slots are in use.

    Args:
        kv: By layer, (slots, capacity, 2, G, K).
        lengths: Tokens of each sequence so far.
    """

    kv: list[torch.Tensor] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def reserve(self, slots: int, capacity: int, specs: list[AttentionSpec], like: Any) -> None:
        """Make room; what is grown is at least doubled, so that growing costs little in the long run.

        Args:
            slots: How many sequences there will be.
            capacity: Tokens of the longest.
            specs: Of each layer, for the shapes.
            like: A tensor of the hidden states' type and place.
        """
        before = self.kv or [like.new_empty(0, 0, 2, s.num_kv_heads, s.head_width) for s in specs]
        have_slots, have = before[0].shape[:2]
        if slots <= have_slots and capacity <= have:
            return
        slots = have_slots if slots <= have_slots else max(slots, 2 * have_slots)
        capacity = have if capacity <= have else max(capacity, 2 * have, 64)
        self.kv = []
        while before:  # each old tensor is let go as soon as it is copied
            old = before.pop(0)
            made = old.new_zeros(slots, capacity, *old.shape[2:])
            made[:have_slots, :have] = old
            self.kv.append(made)

    def drop(self, rows: list[int]) -> list[int]:
        """Free some slots; the last ones in use move into the gaps.

        Args:
            rows: Which.

        Returns:
            For each slot that is still in use, in which one its sequence was before.
        """
        order = list(range(len(self.lengths)))
        for row in sorted(set(rows), reverse=True):
            last = len(order) - 1
            if row != last:
                length = self.lengths[last]
                for kv in self.kv:
                    kv[row, :length] = kv[last, :length]
                order[row], self.lengths[row] = order[last], length
            order.pop()
            self.lengths.pop()
        return order


@dataclass
class PromptStep(Step):
    """Whole prompts side by side, each into a slot of its own.

    Args:
        slots: With room for them.
        first: The first prompt's slot.
        packed: The prompts.
    """

    slots: Slots
    first: int
    packed: Packed
    _rows_T: torch.Tensor | None = field(default=None, init=False)

    def attend(
        self, number: int, spec: AttentionSpec, q_THK: torch.Tensor, kv_T2GK: torch.Tensor
    ) -> torch.Tensor:
        """Attend within each prompt."""
        kv = self.slots.kv[number]
        if self._rows_T is None:
            rows = [
                (self.first + n) * kv.shape[1] + torch.arange(length)
                for n, length in enumerate(self.packed.lengths)
            ]
            self._rows_T = torch.cat(rows).to(kv.device)
        kv.flatten(0, 1).index_copy_(0, self._rows_T, kv_T2GK)
        mask = Mask(spec.scale, spec.window, spec.softcap)
        out_THK, _ = varlen_forward(q_THK, kv_T2GK[:, 0], kv_T2GK[:, 1], self.packed, mask)
        return out_THK.flatten(1)


@dataclass
class SlotStep(Step):
    """One new token for each sequence in the slots.

    Args:
        slots: With room for one more token each; `lengths` do not count it yet.
    """

    slots: Slots
    _masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict, init=False)
    _rows_B: torch.Tensor | None = field(default=None, init=False)

    def attend(
        self, number: int, spec: AttentionSpec, q_THK: torch.Tensor, kv_T2GK: torch.Tensor
    ) -> torch.Tensor:
        """Attend to all that a sequence has in its slot."""
        kv, lengths = self.slots.kv[number], self.slots.lengths
        if self._rows_B is None:
            rows = [row * kv.shape[1] + length for row, length in enumerate(lengths)]
            self._rows_B = torch.tensor(rows, device=kv.device)
        kv.flatten(0, 1).index_copy_(0, self._rows_B, kv_T2GK)
        used = kv[: len(lengths), : max(lengths) + 1]
        keys, values = used[:, :, 0].transpose(1, 2), used[:, :, 1].transpose(1, 2)
        return attend_one(q_THK, keys, values, self._mask(spec.window, kv.device), spec)

    def _mask(self, window: int | None, device: torch.device) -> torch.Tensor | None:
        """Return what may be seen, (B, 1, 1, L), or None when it is everything."""
        lengths = self.slots.lengths
        longest = max(lengths) + 1
        window = None if window is None or window >= longest else window
        if window not in self._masks:
            visible = None
            if window is not None or min(lengths) + 1 < longest:
                place = torch.arange(longest, device=device)
                behind = torch.tensor(lengths, device=device)[:, None] - place
                visible = ((behind >= 0) & (behind < (window or longest)))[:, None, None]
            self._masks[window] = visible
        return self._masks[window]


@dataclass
class CacheStep(Step):
    """One new token for each row of a batch, keys and values in a cache of transformers.

    Args:
        cache: transformers' DynamicCache.
        mask_BL: The batch's attention mask, or None when nothing is padded.
    """

    cache: Any
    mask_BL: torch.Tensor | None

    def attend(
        self, number: int, spec: AttentionSpec, q_THK: torch.Tensor, kv_T2GK: torch.Tensor
    ) -> torch.Tensor:
        """Attend to all that the cache has."""
        k, v = kv_T2GK[:, 0, :, None], kv_T2GK[:, 1, :, None]
        keys, values = self.cache.update(k, v, number)
        length = keys.shape[2]
        visible = None if self.mask_BL is None else self.mask_BL[:, -length:].bool()
        if spec.window is not None and length > spec.window:
            inside = torch.arange(length, device=keys.device) >= length - spec.window
            visible = inside[None] if visible is None else visible & inside
        visible = None if visible is None else visible[:, None, None]
        return attend_one(q_THK, keys, values, visible, spec)


def attend_one(
    q_BHK: torch.Tensor,
    keys_BGLK: torch.Tensor,
    values_BGLK: torch.Tensor,
    visible: torch.Tensor | None,
    spec: AttentionSpec,
) -> torch.Tensor:
    """Attend with one query a sequence; the heads that share keys are rows of one product.

    Nine heads over three take 30 us, and 95 with repeated keys (100 tokens, bfloat16, EPYC Zen 5).

    Args:
        q_BHK: Queries.
        keys_BGLK: Keys; contiguous along K.
        values_BGLK: Values.
        visible: Bool, to broadcast to (B, G, H / G, L); None sees everything.
        spec: Scale and soft cap.

    Returns:
        (B, H K).
    """
    num, heads, width = q_BHK.shape
    groups = keys_BGLK.shape[1]
    q = q_BHK.reshape(num, groups, heads // groups, width)
    if spec.softcap is None:
        out = functional.scaled_dot_product_attention(
            q, keys_BGLK, values_BGLK, attn_mask=visible, scale=spec.scale
        )
    else:
        scores = (q @ keys_BGLK.transpose(-1, -2)).float().mul_(spec.scale / spec.softcap)
        scores = scores.tanh_().mul_(spec.softcap)
        if visible is not None:
            scores = scores.masked_fill_(~visible, -torch.inf)
        out = scores.softmax(-1).to(values_BGLK.dtype) @ values_BGLK
    return out.reshape(num, heads * width)


def decode_layer(
    layer: nn.Module, x_TD: torch.Tensor, step: Step, kwargs: dict[str, Any]
) -> torch.Tensor:
    """Compute a layer for new tokens.

    Args:
        layer: The live layer.
        x_TD: Hidden states of the new tokens.
        step: Which knows the layer.
        kwargs: What the decoder handed to the layer, with `position_embeddings` where it has them.

    Returns:
        The hidden states after it.
    """
    ready = step.layers[layer]
    half, spec = ready.spec.attention_half, ready.spec.attention
    assert isinstance(spec, AttentionSpec)
    h, g, k = spec.num_heads, spec.num_kv_heads, spec.head_width
    qkv_TN = ready.qkv(_norm(layer, half.norm, x_TD))
    heads = qkv_TN.view(len(x_TD), h + 2 * g, k)
    _rotate_(layer, spec, heads, step, kwargs.get("position_embeddings"))
    kv = heads[:, h:].unflatten(1, (2, g))
    out_TN = step.attend(ready.number, spec, heads[:, :h], kv)
    h_TD = _behind(layer, half, x_TD, ready.out, out_TN)

    half, mlp = ready.spec.mlp_half, ready.spec.mlp
    n_TD = _norm(layer, half.norm, h_TD)
    if ready.up is None or ready.down is None or isinstance(mlp, str):
        body = layer.get_submodule(half.body)(n_TD[None])
        return _add(layer, half, h_TD, (body[0] if isinstance(body, tuple) else body)[0])
    a_TF = ready.up(n_TD)
    if mlp.gated:
        gate, up = a_TF.chunk(2, -1)
        if mlp.activation == "silu":  # one token: the kernel's blocks and casts would be the time
            a_TF = functional.silu(gate).mul_(up)
        else:
            a_TF = glu_forward(gate, up, mlp.activation, torch.empty_like(up))
    else:
        a_TF = glu_forward(a_TF, None, mlp.activation, a_TF)
    return _behind(layer, half, h_TD, ready.down, a_TF)


def _rotate_(
    layer: nn.Module, spec: AttentionSpec, heads: torch.Tensor, step: Step, angles: Any
) -> None:
    """Normalise and rotate the queries and keys where they stand, (T, H + 2 G, K)."""
    h, g = spec.num_heads, spec.num_kv_heads
    turned = heads[:, : h + g]
    if angles is None and not (spec.q_norm or spec.k_norm):
        return
    plain = not (spec.q_norm or spec.k_norm) and spec.rope == "half"
    if plain and angles is not None and angles[0].shape[-1] == spec.head_width:
        cos, sin = step.angles(angles)
        torch.addcmul(turned * cos, turned.roll(spec.head_width // 2, -1), sin, out=turned)
        return
    cos, sin = rope_angles(angles, spec)
    norms = [
        n and HeadNorm(live_norm(layer.get_submodule(n.path), n).weight, n.eps, n.unit_offset)
        for n in (spec.q_norm, spec.k_norm)
    ]
    q, k = turned[:, :h], turned[:, h:]
    rope_forward(
        q, k, cos, sin, interleaved=spec.rope != "half", q_norm=norms[0],
        k_norm=norms[1], q_out_THK=q, k_out_TGK=k,
    )  # fmt: skip


def _norm(layer: nn.Module, spec: NormSpec, x_TD: torch.Tensor) -> torch.Tensor:
    live = live_norm(layer.get_submodule(spec.path), spec)
    if spec.unit_offset or live.weight.dtype != x_TD.dtype:
        return norm_forward(
            x_TD, live.weight, live.bias, eps=spec.eps, centered=spec.centered,
            unit_offset=spec.unit_offset,
        )[0]  # fmt: skip
    if spec.centered:
        return functional.layer_norm(x_TD, x_TD.shape[-1:], live.weight, live.bias, spec.eps)
    return functional.rms_norm(x_TD, x_TD.shape[-1:], live.weight, spec.eps)


def _behind(
    layer: nn.Module, half: HalfSpec, x_TD: torch.Tensor, product: Product, z: torch.Tensor
) -> torch.Tensor:
    """Return x + m post(product(z))."""
    if half.post_norm is None and half.multiplier == 1:
        return product(z, x_TD)
    return _add(layer, half, x_TD, product(z))


def _add(layer: nn.Module, half: HalfSpec, x_TD: torch.Tensor, z_TD: torch.Tensor) -> torch.Tensor:
    if half.post_norm is not None:
        z_TD = _norm(layer, half.post_norm, z_TD)
    return torch.add(x_TD, z_TD, alpha=half.multiplier)
