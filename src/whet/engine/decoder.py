"""A model made ready to decode, and the sequences that are being decoded.

Nothing of the model changes: what was made ready is a copy, which is made again when a weight or an
adapter has changed since.

Shapes: T new tokens, B sequences, L tokens in the longest, D model width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from whet.engine import swap
from whet.engine.decode import (
    CacheStep,
    DecodeLayer,
    PromptStep,
    Slots,
    SlotStep,
    Step,
    ready_layer,
)
from whet.engine.head import Head, read_head
from whet.engine.layer import LayerRecord
from whet.engine.model import OUTPUT_FLAGS, EngineState, decoder_of, shaped_logits
from whet.engine.outside import check_part
from whet.engine.product import Product, ready_product
from whet.engine.projection import Unsupported
from whet.engine.spec import LayerSpec
from whet.engine.unpad import from_lengths

logger = logging.getLogger(__name__)

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
