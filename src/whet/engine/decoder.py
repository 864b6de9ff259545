"""A model made ready to decode: its layers' products, the check that they answer as the original does,
and the sequences that are being decoded.

Nothing of the model changes: what was made ready is a copy, which is made again when a weight or an
adapter has changed since.

Shapes: T new tokens, B sequences, L tokens in the longest, D model width, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from whet.engine import parity, swap
from whet.engine.decode import (
    CacheStep,
    DecodeLayer,
    PromptStep,
    Slots,
    SlotStep,
    Step,
    decode_layer,
    ready_layer,
)
from whet.engine.head import Head, read_head
from whet.engine.layer import LayerRecord
from whet.engine.model import OUTPUT_FLAGS, EngineState, decoder_of, shaped_logits
from whet.engine.original import attend_plainly_, in_high_precision, original_half, randomize_
from whet.engine.outside import check_part
from whet.engine.product import Product, num_bytes, ready_product
from whet.engine.projection import Unsupported
from whet.engine.spec import LayerSpec
from whet.engine.unpad import from_lengths

logger = logging.getLogger(__name__)

# Tokens of the two test sequences, and how many of each are prompt.
CHECK_LENGTHS = (9, 6)
CHECK_PROMPTS = (5, 2)
# A cache of transformers that a new token may be added to without asking the model.
PLAIN_CACHE_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")


@dataclass
class ReadyModel:
    """A model whose next tokens are made by the engine.

    Args:
        base: The transformers model, with the engine in it.
        copies: Whether products have weights of their own; else the live modules are called.
    """

    base: Any
    copies: bool
    layers: dict[nn.Module, DecodeLayer] = field(default_factory=dict)
    head: Product | None = None
    _made_of: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        self.refresh()

    @property
    def state(self) -> EngineState:
        """The engine's state in this model."""
        return vars(self.base)["_whet"]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the hidden states."""
        return next(iter(self.layers)).get_submodule(self._first_norm).weight.dtype  # type: ignore[return-value]

    @property
    def _first_norm(self) -> str:
        return next(iter(self.layers.values())).spec.attention_half.norm.path

    def refresh(self) -> None:
        """Make everything ready, if a weight or an adapter has changed since it was.

        Raises:
            Unsupported: A layer is in a state that the engine does not decode with.
        """
        made_of = _fingerprint(self.base)
        if made_of == self._made_of:
            return
        self.layers, self.head = {}, None  # the old copies go before new ones come
        for number, block in enumerate(swap.decoder_layers(decoder_of(self.base))):
            record = vars(block).get("_whet")
            if not isinstance(record, LayerRecord):
                raise Unsupported("a layer that keeps its own code")
            _check_parts(block, record.spec)
            dtype = block.get_submodule(record.spec.attention_half.norm.path).weight.dtype
            self.layers[block] = ready_layer(number, block, record.spec, dtype, self.copies)  # type: ignore[arg-type]
        self.head = _ready_head(self.base, self.state, self.dtype) if self.copies else None
        self._made_of = made_of

    def hidden(self, ids_T: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        """Return the last hidden states of new tokens, (T, D).

        Args:
            ids_T: The tokens.
            positions_T: Where each is in its sequence.
            step: What they may see.
        """
        output = decoder_of(self.base)(
            input_ids=ids_T[None], position_ids=positions_T[None], attention_mask=None,
            use_cache=False, whet_decode=step,
        )  # fmt: skip
        return output.last_hidden_state[0]

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Return logits as the original makes them, (T, V)."""
        head = self.state.head
        if isinstance(head, str):
            raise Unsupported(head)
        if self.head is None:
            return shaped_logits(self.base, head, hidden_TD)
        return shaped_logits(self.head, head, hidden_TD)  # type: ignore[arg-type]

    def answer_cached(self, kwargs: dict[str, Any]) -> Any:
        """Answer a call of the model with one new token a row and a cache, as `generate` makes them.

        Args:
            kwargs: The call's arguments, by name.

        Returns:
            What the model's forward returns, or None where the original must answer.
        """
        from transformers.modeling_outputs import CausalLMOutputWithPast

        cache = kwargs.get("past_key_values")
        if torch.is_grad_enabled() or self.base.training or cache is None:
            return None
        if not cache.get_seq_length():  # a new prompt, which the original reads
            try:
                self.refresh()
            except Unsupported as reason:
                logger.warning("transformers' own code decodes from now on: %s", reason)
                self.state.decoding = None
            return None
        if not _plain_call(self.base, kwargs):
            return None
        ids, mask = kwargs["input_ids"][:, 0], kwargs.get("attention_mask")
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.full_like(ids, cache.get_seq_length())
            if mask is not None:
                positions = mask.sum(-1).to(ids) - 1
        if mask is not None and bool(mask.all()):
            mask = None
        step = CacheStep(self.layers, cache, mask)
        hidden_BD = self.hidden(ids, positions.reshape(-1).expand(len(ids)), step)
        return CausalLMOutputWithPast(
            logits=self.logits(hidden_BD)[:, None],  # type: ignore[arg-type]
            past_key_values=cache,
        )


def decode_for_generate(model: Any, on: bool) -> str:
    """Let callers of `model.generate` have their new tokens from the engine, or from the original.

    Args:
        model: A causal language model of transformers, or a peft model around one, in eval mode, with the
            engine in it.
        on: Whether the engine decodes.

    Returns:
        Nothing, or in words why the original decodes all the same.
    """
    state: EngineState = vars(swap.base_of(model))["_whet"]
    ready = make_ready(model) if on else None
    state.decoding = ready if isinstance(ready, ReadyModel) else None
    return ready if isinstance(ready, str) else ""


def make_ready(model: Any) -> ReadyModel | str:
    """Make a model ready to decode with the engine, and check it.

    Args:
        model: A causal language model of transformers, or a peft model around one, in eval mode; the
            engine is put in if it is not there.

    Returns:
        The ready model, or in words why the original code must decode.
    """
    base = swap.base_of(model)
    if not swap.is_attached(base):
        swap.attach(base)
    state: EngineState = vars(base)["_whet"]
    if isinstance(state.head, str):
        return state.head
    if not state.packs:
        return "its attention takes no packed tokens"
    reason = ""
    for copies in (True, False):
        if copies and not _has_room(base):
            continue
        try:
            with torch.inference_mode():
                ready = ReadyModel(base, copies)
                reason = _check(ready)
        except Unsupported as error:
            return str(error)
        if not reason:
            logger.info("decoding with the engine%s", ", weights merged" if copies else "")
            return ready
        logger.info(
            "not decoding with %s: %s", "merged weights" if copies else "the engine", reason
        )
    return reason


@dataclass
class Decoder:
    """The sequences that a ready model decodes together; they come and go between steps.

    Args:
        ready: The model.
    """

    ready: ReadyModel
    slots: Slots = field(default_factory=Slots)

    @property
    def num_rows(self) -> int:
        """Sequences at work."""
        return len(self.slots.lengths)

    @torch.inference_mode()
    def start(self, prompts: Sequence[list[int]], every: bool = False) -> list[torch.Tensor]:
        """Read prompts, which become the last rows.

        Args:
            prompts: Token ids, at least one each.
            every: Return logits behind every token, not behind each prompt's last alone.

        Returns:
            For each prompt (its tokens or 1, V).
        """
        if not self.slots.lengths:
            self.ready.refresh()  # in the middle of answers nothing may change
        first, lengths = self.num_rows, [len(ids) for ids in prompts]
        device = self.ready.base.device
        self._reserve(first + len(prompts), max([*self.slots.lengths, *lengths]) + 1)
        packed = from_lengths(lengths, device)
        step = PromptStep(self.ready.layers, self.slots, first, packed)
        ids_T = torch.tensor([token for ids in prompts for token in ids], device=device)
        hidden_TD = self.ready.hidden(ids_T, packed.positions_T, step)
        self.slots.lengths.extend(lengths)
        if every:
            return [self.ready.logits(part) for part in hidden_TD.split(lengths)]
        ends = packed.cu_seqlens[1:].long() - 1
        return list(self.ready.logits(hidden_TD[ends])[:, None])

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Add one token to every sequence, in the order of the rows, and return logits (B, V)."""
        device, lengths = self.ready.base.device, self.slots.lengths
        self._reserve(len(lengths), max(lengths) + 1)
        step = SlotStep(self.ready.layers, self.slots)
        ids_B, positions_B = torch.tensor([list(tokens), lengths], device=device)
        hidden_BD = self.ready.hidden(ids_B, positions_B, step)
        self.slots.lengths = [length + 1 for length in lengths]
        return self.ready.logits(hidden_BD)

    @torch.inference_mode()
    def drop(self, rows: list[int]) -> list[int]:
        """Let go of some rows; see Slots.drop."""
        return self.slots.drop(rows)

    def _reserve(self, slots: int, capacity: int) -> None:
        specs: list[Any] = [ready.spec.attention for ready in self.ready.layers.values()]
        like = torch.empty(0, dtype=self.ready.dtype, device=self.ready.base.device)
        self.slots.reserve(slots, capacity, specs, like)


def _plain_call(base: Any, kwargs: dict[str, Any]) -> bool:
    """Tell whether a call asks for nothing but the next logits of each row."""
    ids, cache = kwargs.get("input_ids"), kwargs["past_key_values"]
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if ids is None or ids.shape[1] != 1 or kwargs.get("inputs_embeds") is not None:
        return False
    if getattr(mask, "ndim", 2) != 2 or getattr(positions, "ndim", 2) > 2:
        return False
    if kwargs.get("return_dict") is False or kwargs.get("use_cache") is False:
        return False
    if any(kwargs.get(flag, getattr(base.config, flag, False)) for flag in OUTPUT_FLAGS):
        return False
    return type(cache).__name__ == "DynamicCache" and all(
        type(layer).__name__ in PLAIN_CACHE_LAYERS for layer in cache.layers
    )


def _fingerprint(base: Any) -> tuple[Any, ...]:
    """Return what products were made of: each parameter's identity and version, each adapter's state."""
    found: list[Any] = []
    for module in base.modules():
        if hasattr(module, "lora_A"):
            found.append((tuple(module.active_adapters), module.disable_adapters, module.merged))
        for parameter in module._parameters.values():
            if parameter is not None:
                version = 0 if parameter.is_inference() else parameter._version
                found.append((id(parameter), version))
    return tuple(found)


def _check_parts(layer: nn.Module, spec: LayerSpec) -> None:
    for half in (spec.attention_half, spec.mlp_half):
        paths = (half.norm.path, half.body, *([half.post_norm.path] if half.post_norm else []))
        for path in paths:
            check_part(layer.get_submodule(path))


def _ready_head(base: Any, state: EngineState, dtype: torch.dtype) -> Product | None:
    """Make the output embeddings ready, where they are a plain linear layer of the right type."""
    module = base.get_output_embeddings()
    try:
        weight, _ = read_head(module)
    except Unsupported:
        return None
    plain = isinstance(state.head, Head) and isinstance(weight, torch.Tensor)
    return ready_product([module], dtype) if plain and weight.dtype == dtype else None


def _has_room(base: Any) -> bool:
    """Tell whether a copy of the weights fits: into half of what is free, in host memory.

    A GPU's memory is the planner's, and its products of one row read at full rate without a copy.
    """
    import psutil

    if base.device.type != "cpu":
        return False
    linear = [m for m in base.modules() if hasattr(m, "weight") or hasattr(m, "base_layer")]
    dtype = next(p.dtype for p in base.parameters() if p.is_floating_point())
    inside = {id(m.base_layer) for m in linear if hasattr(m, "base_layer")}
    needed = sum(num_bytes([m], dtype) for m in linear if id(m) not in inside)
    return needed < psutil.virtual_memory().available / 2


def _check(ready: ReadyModel) -> str:
    """Compare one layer of each structure, and the whole model, with the original.

    Returns:
        Nothing, or in words what differs.
    """
    blocks = list(ready.layers)
    seen = parity.observe(ready.base, blocks)
    if seen is None:
        return "the model does not run on plain token ids"
    known = set()
    for number, block in enumerate(blocks):
        spec = ready.layers[block].spec
        key = parity.layer_key(block, spec)
        if key in known:
            continue
        known.add(key)
        for seed in range(3):  # as `parity.compare_thrice`
            angles = seen.layers[number].position_embeddings
            found = compare_decoded(block, spec, angles, seen.hidden.dtype, ready.copies, seed)
            if found.passed:
                break
        if not found.passed:
            return f"{found.name} is off by {found.error:.2g}, allowed {found.bound:.2g}"
    return _check_whole(ready, seen)


def compare_decoded(
    block: nn.Module, spec: LayerSpec, angles: Any, dtype: torch.dtype, copies: bool, seed: int = 0
) -> parity.Comparison:
    """Compare a layer that decodes two sequences together with its original on whole sequences.

    Args:
        block: The live layer; a copy with random small parameters is used.
        spec: What the engine takes it for.
        angles: cos and sin of a row of tokens, as the decoder hands them to the layer.
        dtype: Type of the hidden states.
        copies: As for `ReadyModel`.
        seed: Of the input and of the random parameters.
    """
    generator = torch.Generator().manual_seed(seed)
    trial = copy.deepcopy(block).eval()
    randomize_(trial, generator)
    attend_plainly_(trial, spec)
    device = next(block.parameters()).device
    width = trial.get_submodule(spec.attention_half.norm.path).weight.shape[0]  # type: ignore[union-attr]
    inputs = [
        torch.randn(n, int(width), generator=generator).to(device, dtype) for n in CHECK_LENGTHS
    ]
    ours = _decoded(ready_layer(0, trial, spec, dtype, copies), inputs, angles)

    def original(layer: nn.Module, kind: torch.dtype) -> torch.Tensor:
        rows = []
        for x in inputs:
            h = original_half(layer, spec, "attention", x[None].to(kind), angles)
            rows.append(original_half(layer, spec, "mlp", h, angles)[0])
        return torch.cat(rows)

    exact = in_high_precision(trial, dtype)
    truth = original(exact, next(p.dtype for p in exact.parameters() if p.is_floating_point()))
    return parity.judge("a layer's output, decoded", ours, original(trial, dtype), truth)


def _decoded(ready: DecodeLayer, inputs: list[torch.Tensor], angles: Any) -> torch.Tensor:
    """Run a layer over two sequences as decoding does: the prompts, then token by token."""
    slots, layers = Slots(), {ready.layer: ready}
    slots.reserve(len(inputs), max(CHECK_LENGTHS), [ready.spec.attention], inputs[0])  # type: ignore[list-item]

    def compute(x_TD: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        here = angles and tuple(a[:, positions_T] for a in angles)
        return decode_layer(ready.layer, x_TD, step, {"position_embeddings": here})

    packed = from_lengths(list(CHECK_PROMPTS), inputs[0].device)
    prompts = torch.cat([x[:n] for x, n in zip(inputs, CHECK_PROMPTS, strict=True)])
    first = compute(prompts, packed.positions_T, PromptStep(layers, slots, 0, packed))
    outputs = [[part] for part in first.split(CHECK_PROMPTS)]
    slots.lengths = list(CHECK_PROMPTS)
    for _ in range(CHECK_LENGTHS[0] - CHECK_PROMPTS[0]):
        at = torch.tensor(slots.lengths, device=inputs[0].device)
        x_BD = torch.stack([x[n] for x, n in zip(inputs, slots.lengths, strict=True)])
        y_BD = compute(x_BD, at, SlotStep(layers, slots))
        for row, y in zip(outputs, y_BD, strict=True):
            row.append(y[None])
        slots.lengths = [n + 1 for n in slots.lengths]
    return torch.cat([y for row in outputs for y in row])


def _check_whole(ready: ReadyModel, seen: parity.Seen) -> str:
    """Compare logits of two sequences that are decoded together with those of the whole model.

    Returns:
        Nothing, or in words how far they are apart.
    """
    ids = seen.input_ids[0].tolist()
    rows = [ids[:n] for n in CHECK_LENGTHS]
    decoder = Decoder(ready)
    started = decoder.start([row[:n] for row, n in zip(rows, CHECK_PROMPTS, strict=True)], True)
    ours = [[part] for part in started]
    for offset in range(CHECK_LENGTHS[0] - CHECK_PROMPTS[0]):
        tokens = [row[n + offset] for row, n in zip(rows, CHECK_PROMPTS, strict=True)]
        for row, logits in zip(ours, decoder.step(tokens), strict=True):
            row.append(logits[None])
    for row, found in zip(rows, ours, strict=True):
        theirs = ready.base(torch.tensor([row], device=seen.input_ids.device)).logits[0].float()
        apart = (torch.cat(found).float() - theirs).norm() / theirs.norm()
        tolerance = parity.WHOLE_TOLERANCE.get(seen.hidden.dtype, 1e-2)
        if not float(apart) <= tolerance:
            return f"decoded logits differ from the original's by {float(apart):.1%}"
    return ""
