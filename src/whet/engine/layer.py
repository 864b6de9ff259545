"""A decoder layer on packed tokens: two halves, each fused or the module's own code.

`packed_layer` reads the live projections at every call, so that adapters may be switched, merged or
put on later. What it cannot compute as they stand runs through the layer's own modules, half by half.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from whet.engine.attention_half import AttentionCall, HalfCall, Norm, attention_half
from whet.engine.memory import Policy
from whet.engine.mlp_half import MlpCall, mlp_half
from whet.engine.outside import check_part
from whet.engine.projection import Projection, Unsupported, has_hooks, read_projection
from whet.engine.spec import AttentionSpec, HalfSpec, LayerSpec, MlpSpec, NormSpec
from whet.engine.unpad import Packed
from whet.engine.varlen import Mask, attend_plainly, varlen_backward, varlen_forward
from whet.kernels.nf4 import NF4Weight
from whet.kernels.norm import norm_backward, norm_forward
from whet.kernels.rope import HeadNorm

# Tokens worked on at a time. On the CPU a block's gate and up should stay in the last cache level: 1024
# x 2 x 1536 bfloat16 are 6 MB (SmolLM2-135M); a pass of 1,750 tokens took 11% longer in blocks of 512,
# and as long in blocks of 2048. On CUDA products of 8192 rows are long past their best rate, and the
# memory of one layer stays bounded in a long pass.
BLOCK_TOKENS = {"cpu": 1024, "cuda": 8192}


@dataclass
class LayerRecord:
    """What the engine knows of one layer; kept on the layer itself.

    Args:
        spec: What the layer computes.
        policy: Where its saved tensors stay.
        name: How errors call it.
        strict: Raise instead of falling back.
        debug: Look for the first value that is not finite.
        returns_tuple: The original forward returns (hidden_states,), not hidden_states.
        block_tokens: Tokens worked on at a time; None takes the device's default.
        fallbacks: How often a half ran its own code in a call, by reason.
    """

    spec: LayerSpec
    policy: Policy
    name: str = "a layer"
    strict: bool = False
    debug: bool = False
    returns_tuple: bool = False
    block_tokens: int | None = None
    fallbacks: Counter[str] = field(default_factory=Counter)


def packed_layer(
    layer: nn.Module,
    record: LayerRecord,
    x_TD: torch.Tensor,
    packed: Packed,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Compute a layer on packed tokens.

    Args:
        layer: The live layer.
        record: What the engine knows of it.
        x_TD: Packed hidden states.
        packed: The documents.
        kwargs: What the decoder handed to the layer, with `position_embeddings` where it has them.
    """
    return packed_mlp(layer, record, packed_attention(layer, record, x_TD, packed, kwargs))


def packed_attention(
    layer: nn.Module,
    record: LayerRecord,
    x_TD: torch.Tensor,
    packed: Packed,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Compute the attention half of a layer, fused where possible."""
    half, spec = record.spec.attention_half, record.spec.attention
    try:
        _check_state(layer, half)
        if isinstance(spec, str):
            raise Unsupported(spec)
        call = attention_call(layer, half, spec, record, x_TD, packed, kwargs)
    except Unsupported as reason:
        _count(record, "attention", reason)
        body = layer.get_submodule(half.body)
        passed = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        return _own_half(
            layer, half, x_TD, lambda n: _first(body(hidden_states=n[None], **passed))[0]
        )
    return attention_half(x_TD, call)


def packed_mlp(layer: nn.Module, record: LayerRecord, h_TD: torch.Tensor) -> torch.Tensor:
    """Compute the MLP half of a layer, fused where possible."""
    half, spec = record.spec.mlp_half, record.spec.mlp
    try:
        _check_state(layer, half)
        if isinstance(spec, str):
            raise Unsupported(spec)
        call = mlp_call(layer, half, spec, record, h_TD)
    except Unsupported as reason:
        _count(record, "mlp", reason)
        body = layer.get_submodule(half.body)
        return _own_half(layer, half, h_TD, lambda n: _first(body(n[None]))[0])
    return mlp_half(h_TD, call)


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _count(record: LayerRecord, part: str, reason: Unsupported) -> None:
    if record.strict:
        raise reason
    record.fallbacks[f"{part}: {reason}"] += 1


def _check_state(layer: nn.Module, half: HalfSpec) -> None:
    for path in (half.norm.path, half.body, *([half.post_norm.path] if half.post_norm else [])):
        check_part(layer.get_submodule(path))
    if layer.training and half.dropout:
        raise Unsupported(f"dropout {half.dropout} while training")


def _own_half(layer: nn.Module, half: HalfSpec, x_TD: torch.Tensor, body: Any) -> torch.Tensor:
    """Compute a half with the module's own body; norms are the engine's all the same."""
    z = body(_own_norm(layer, half.norm, x_TD))
    if half.post_norm is not None:
        z = _own_norm(layer, half.post_norm, z)
    # A dropout that stands in the layer itself, behind the body, must act as it does there.
    dropouts = [m for m in layer.children() if isinstance(m, nn.Dropout) and m.p]
    for dropout in dropouts[:1]:
        z = dropout(z)
    return torch.add(x_TD, z, alpha=half.multiplier)


def _own_norm(layer: nn.Module, spec: NormSpec, x_TD: torch.Tensor) -> torch.Tensor:
    module = layer.get_submodule(spec.path)
    own = has_hooks(module) or "forward" in vars(module)
    return module(x_TD) if own else norm(module, spec, x_TD)


def attention_call(
    layer: nn.Module,
    half: HalfSpec,
    spec: AttentionSpec,
    record: LayerRecord,
    x_TD: torch.Tensor,
    packed: Packed,
    kwargs: dict[str, Any],
) -> AttentionCall:
    """Read everything that one call of the attention half needs from the live layer.

    Raises:
        Unsupported: A projection is in a state that the engine does not compute.
    """
    qkv = tuple(read_projection(layer.get_submodule(path)) for path in spec.qkv)
    out = read_projection(layer.get_submodule(spec.out))
    cos, sin = rope_angles(kwargs.get("position_embeddings"), spec)
    norms = [
        n and HeadNorm(_weight(layer, n), n.eps, n.unit_offset) for n in (spec.q_norm, spec.k_norm)
    ]
    return AttentionCall(
        _half_call(layer, half, record, x_TD, [*qkv, out]),
        spec, qkv, out, norms[0], norms[1], packed, cos, sin,
    )  # fmt: skip


def mlp_call(
    layer: nn.Module, half: HalfSpec, spec: MlpSpec, record: LayerRecord, h_TD: torch.Tensor
) -> MlpCall:
    """Read everything that one call of the MLP half needs from the live layer.

    Raises:
        Unsupported: A projection is in a state that the engine does not compute.
    """
    up = tuple(read_projection(layer.get_submodule(path)) for path in spec.up)
    down = read_projection(layer.get_submodule(spec.down))
    return MlpCall(_half_call(layer, half, record, h_TD, [*up, down]), spec, up, down)


def _half_call(
    layer: nn.Module,
    half: HalfSpec,
    record: LayerRecord,
    x_TD: torch.Tensor,
    projections: list[Projection],
) -> HalfCall:
    block = record.block_tokens or BLOCK_TOKENS.get(x_TD.device.type, BLOCK_TOKENS["cuda"])
    return HalfCall(
        live_norm(layer.get_submodule(half.norm.path), half.norm),
        live_norm(layer.get_submodule(half.post_norm.path), half.post_norm) if half.post_norm else None,
        half.multiplier,
        product_dtype(x_TD, projections),
        max(1, min(block, x_TD.shape[0])),
        record.policy if torch.is_grad_enabled() else Policy(),  # nothing comes back: nothing goes
    )  # fmt: skip


def product_dtype(x_TD: torch.Tensor, projections: list[Projection]) -> torch.dtype:
    """Return the type the original would multiply in: autocast's, or the one all weights share.

    Raises:
        Unsupported: Weights and hidden states differ, so that the original casts on its own.
    """
    kind = x_TD.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    for projection in projections:
        weight = projection.weight
        dtype = projection.compute_dtype if isinstance(weight, NF4Weight) else weight.dtype
        if dtype not in (None, x_TD.dtype):
            raise Unsupported(f"weights multiplied in {dtype} with hidden states in {x_TD.dtype}")
    return x_TD.dtype


def rope_angles(
    position_embeddings: Any, spec: AttentionSpec
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return cos and sin as (T, R), R = half the rotary width, from what the decoder made.

    Args:
        position_embeddings: (cos, sin), (1, T, 2R) each, or None for models without rotation.
        spec: Tells in which layout the model repeats them.

    Raises:
        Unsupported: They are something else.
    """
    if position_embeddings is None:
        return None, None
    if not (isinstance(position_embeddings, tuple) and len(position_embeddings) == 2):
        raise Unsupported("position embeddings that are not (cos, sin)")
    cos, sin = position_embeddings
    if cos.ndim != 3 or cos.shape[0] != 1 or cos.shape[-1] > spec.head_width:
        raise Unsupported("position embeddings of another shape")
    every = (
        slice(None, None, 2) if spec.rope == "interleaved_repeated" else slice(cos.shape[-1] // 2)
    )
    return cos[0, :, every], sin[0, :, every]


def _weight(layer: nn.Module, spec: NormSpec) -> torch.Tensor:
    return layer.get_submodule(spec.path).weight  # type: ignore[return-value]


def live_norm(module: nn.Module, spec: NormSpec) -> Norm:
    """Pair a live norm's parameters with what is known of it.

    Raises:
        Unsupported: It was wrapped or replaced since it was read.
    """
    if not isinstance(getattr(module, "weight", None), torch.Tensor):
        raise Unsupported(f"`{spec.path}` was replaced")
    bias = getattr(module, "bias", None)
    return Norm(module.weight, bias, spec.eps, spec.centered, spec.unit_offset)  # type: ignore[arg-type]


def norm(module: nn.Module, spec: NormSpec, x_TD: torch.Tensor) -> torch.Tensor:
    """Normalise packed tokens with a live norm.

    Args:
        module: The norm.
        spec: What it computes.
        x_TD: Packed hidden states; leading axes are kept.
    """
    live = live_norm(module, spec)
    return NormFunction.apply(x_TD, live.weight, live.bias, live)  # type: ignore[no-any-return]


class NormFunction(torch.autograd.Function):
    """A norm by itself: the decoder's last one, and those of halves that keep their own code."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, live: Norm
    ) -> torch.Tensor:
        """Normalise the last axis."""
        y, mean, rstd = norm_forward(
            x.reshape(-1, x.shape[-1]), weight, bias, eps=live.eps, centered=live.centered,
            unit_offset=live.unit_offset,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.live = live
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of x, weight and bias."""
        x, weight, mean, rstd = ctx.saved_tensors
        dweight, dbias = (
            torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needed else None
            for needed in ctx.needs_input_grad[1:3]
        )
        dx = norm_backward(
            dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]), weight, mean, rstd,
            unit_offset=ctx.live.unit_offset, dweight_D=dweight, dbias_D=dbias,
        )  # fmt: skip
        return (
            dx.view(x.shape),
            None if dweight is None else dweight.to(weight.dtype),
            None if dbias is None else dbias.to(weight.dtype),
            None,
        )


class VarlenFunction(torch.autograd.Function):
    """Attention over packed documents by itself, for attentions that keep their own code."""

    @staticmethod
    def forward(
        ctx: Any,
        q_THK: torch.Tensor,
        k_TGK: torch.Tensor,
        v_TGK: torch.Tensor,
        packed: Packed,
        mask: Mask,
    ) -> torch.Tensor:
        """Attend within each document."""
        out, lse = varlen_forward(q_THK, k_TGK, v_TGK, packed, mask)
        ctx.save_for_backward(q_THK, k_TGK, v_TGK, out, lse)
        ctx.packed, ctx.mask = packed, mask
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_THK: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of q, k and v."""
        q, k, v, out, lse = ctx.saved_tensors
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        varlen_backward(do_THK.contiguous(), q, k, v, out, lse, ctx.packed, ctx.mask, *grads)  # type: ignore[call-arg]
        return (*grads, None, None)


def attention_interface(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    whet_packed: Packed | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface over packed documents.

    Registered under the name `whet`, for attentions that keep their own code in a packed pass.

    Args:
        module: The attention.
        query: (1, H, T, K).
        key: (1, G, T, K).
        value: (1, G, T, width of the values).
        attention_mask: None; documents are marked by `whet_packed`.
        scaling: Factor of the scores; None is K^-0.5.
        dropout: Of the attention's weights.
        sliding_window: As in Mask.
        softcap: As in Mask.
        whet_packed: The documents.

    Returns:
        ((1, T, H, width of the values), None).
    """
    assert whet_packed is not None and attention_mask is None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    mask = Mask(scale, sliding_window, softcap)
    if key.shape[-1] == value.shape[-1] and not dropout:
        return VarlenFunction.apply(q, k, v, whet_packed, mask)[None], None  # type: ignore[index]
    outputs = []
    wholes = (whet_packed.expand(x).split(whet_packed.lengths) for x in (q, k, v))
    for part in zip(*wholes, strict=True):
        heads_first = [x.transpose(0, 1)[None] for x in part]
        if sliding_window is None and softcap is None:
            out = nn.functional.scaled_dot_product_attention(
                *heads_first, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=True
            )
        else:
            out = attend_plainly(heads_first, mask, dropout)
        outputs.append(out[0].transpose(0, 1))
    return whet_packed.contract(torch.cat(outputs))[None], None
