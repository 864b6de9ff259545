"""A causal language model on packed tokens: the decoder and the loss around its layers.

The functions here stand in for `forward` on one model instance (swap.py puts them there). They take
what transformers' models take and give back what those give back. Whatever is outside of training and
scoring (a cache, hidden states of every layer, attention maps) goes to the original forward.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from whet.engine import trl
from whet.engine.decode import decode_layer
from whet.engine.finite import check_finite
from whet.engine.head import Head, head_loss, read_head
from whet.engine.held import HeldWeight
from whet.engine.layer import LayerRecord, norm, packed_layer
from whet.engine.outside import embed_for_hooks, notice_others
from whet.engine.passes import PackedPass
from whet.engine.projection import Unsupported
from whet.engine.spec import NormSpec
from whet.engine.unpad import Packed, pack_batch
from whet.errors import WhetError

if TYPE_CHECKING:
    from whet.engine.decoder import ReadyModel

logger = logging.getLogger(__name__)

# What a decoder may be asked for besides hidden states; only the original forward gives it.
OUTPUT_FLAGS = ("output_hidden_states", "output_attentions", "output_router_logits")
# Tensors of a call that packing understands; with any other the batch stays padded.
PACKABLE = (
    "input_ids", "inputs_embeds", "attention_mask", "position_ids",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
)  # fmt: skip
# Arguments of the top that the decoder does not take.
HEAD_ARGUMENTS = (
    "labels", "shift_labels", "logits_to_keep", "num_items_in_batch", "whet_log_probs",
)  # fmt: skip


@dataclass
class EngineState:
    """What the engine does in one model, and what it met. Kept on the model, shared by its parts.

    Args:
        head: How the loss is computed, or the reason why the model's own head runs.
        packs: Whether batches are unpadded.
        notes: Reasons met at run time for which the original ran, by part.
        owns_attention: Whether every attention is the engine's (else they run through the interface).
        debug: Look for the first non-finite value.
        unlabelled_batches: Batches in which nothing was labelled.
        top: A weak reference to the causal language model.
        paused: The original forwards run.
        decoding: What decodes new tokens for callers of `model.generate` (decoder.py), or None.
    """

    head: Head | str
    packs: bool = True
    owns_attention: bool = True
    debug: bool = False
    unlabelled_batches: int = 0
    top: Callable[[], Any] = lambda: None
    paused: bool = False
    decoding: ReadyModel | None = None
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NormRecord:
    """What the engine knows of the decoder's last norm; kept on the norm itself."""

    spec: NormSpec
    state: EngineState


def call_original(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the forward that was there before the engine."""
    return module._whet_original(*args, **kwargs)  # type: ignore[operator]


def layer_forward(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Forward of a decoder layer; without packed tokens it is the original."""
    packed: Packed | None = kwargs.get("whet_packed")
    record: LayerRecord = self._whet  # type: ignore[assignment]
    if kwargs.get("whet_decode") is not None:
        y_TD = decode_layer(self, hidden_states[0], kwargs["whet_decode"], kwargs)
        return (y_TD[None],) if record.returns_tuple else y_TD[None]
    if packed is None:
        return call_original(self, hidden_states, *args, **kwargs)
    try:
        y_TD = packed_layer(self, record, hidden_states[0], packed, kwargs)
    except Unsupported as reason:  # nothing falls back under `strict`
        what = f"engine.strict is set, and {record.name} would run its own code: {reason}"
        raise WhetError(what) from reason
    if record.debug:
        check_finite(record.name, y_TD)
    return (y_TD[None],) if record.returns_tuple else y_TD[None]


def norm_forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Forward of the decoder's last norm."""
    record: NormRecord = self._whet  # type: ignore[assignment]
    if record.state.paused:
        return call_original(self, hidden_states)
    return norm(self, record.spec, hidden_states)


def decoder_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Forward of the decoder: unpads once at its entry, pads again at its exit.

    A caller of the engine's own hands in `whet_packed`: Packed tokens, which then stay packed, or False
    for a call that must not be unpadded; or `whet_decode`, a Step of decode.py.
    """
    state: EngineState = self._whet  # type: ignore[assignment]
    kwargs = named(self, args, kwargs)
    if kwargs.get("whet_decode") is not None:
        with packed_attention(self):
            return call_original(self, **kwargs)
    given = kwargs.pop("whet_packed", None)
    packed = pack(self, state, kwargs) if given is None else given
    if not packed:
        return call_original(self, **kwargs)
    notice_others(self, state)
    kwargs = embed_for_hooks(self, kwargs)
    for name in ("input_ids", "inputs_embeds"):
        if kwargs.get(name) is not None:
            kwargs[name] = packed.pack(kwargs[name])[None]
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
        kwargs.pop(name, None)
    kwargs.update(
        attention_mask=None, position_ids=packed.positions_T[None], use_cache=False,
        whet_packed=packed,
    )  # fmt: skip
    with packed_attention(self):
        output = call_original(self, **kwargs)
    if given is None:
        output["last_hidden_state"] = packed.pad(output.last_hidden_state[0])
    return output


def causal_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Forward of the causal language model: with labels, the loss comes from the engine's head.

    A caller of the engine's own hands in `whet_pass`, a PackedPass: then the host reads nothing back.
    """
    state: EngineState = self._whet  # type: ignore[assignment]
    kwargs = named(self, args, kwargs)
    fused_lm_head = kwargs.pop("fused_lm_head", False)
    loss_only = kwargs.pop("whet_loss_only", False)
    given: PackedPass | None = kwargs.pop("whet_pass", None)
    if given is not None:
        batch = _given_batch(self, state, given, kwargs)
        if batch is not None:
            return _answer(self, state, batch, kwargs, loss_only)
        kwargs.update(given.as_batch())
    labels, shift_labels = kwargs.get("labels"), kwargs.get("shift_labels")
    if labels is None and shift_labels is None:
        ready = state.decoding
        answer = None if ready is None else ready.answer_cached(kwargs)
        return call_original(self, **kwargs) if answer is None else answer
    batch = None
    if isinstance(state.head, Head) and (not fused_lm_head or trl.can_answer(self, state.head)):
        batch = _labelled_batch(self, state, kwargs)
    if batch is None and fused_lm_head:  # to the head that trl has put on, see `swap.stay_on_top`
        below: Any = vars(self).get("_whet_below", self._whet_original)
        return below(fused_lm_head=True, **kwargs)
    if batch is None:
        return call_original(self, **kwargs)
    if fused_lm_head:
        return trl.answer(self, state.head, batch, kwargs)  # type: ignore[arg-type]
    return _answer(self, state, batch, kwargs, loss_only)


def named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Give positional arguments the names of the original forward's parameters."""
    if not args:
        return kwargs
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def wants_original(decoder: nn.Module, state: EngineState, kwargs: dict[str, Any]) -> bool:
    """Tell whether a call is for the original forward: a cache, a generation, or more outputs."""
    config = decoder.config
    use_cache = kwargs.get("use_cache")
    use_cache = getattr(config, "use_cache", False) if use_cache is None else use_cache
    return (
        state.paused
        or kwargs.get("past_key_values") is not None
        or (bool(use_cache) and not decoder.training)
        or kwargs.get("return_dict") is False
        or any(kwargs.get(flag, getattr(config, flag, False)) for flag in OUTPUT_FLAGS)
    )


def pack(decoder: nn.Module, state: EngineState, kwargs: dict[str, Any]) -> Packed | None:
    """Describe a call's tokens packed; None where they must stay as they are."""
    if _stays_padded(decoder, state, kwargs):
        return None
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    tokens = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    known = PACKABLE + HEAD_ARGUMENTS  # those that the top hands down are for the loss
    if mask is None and tokens is not None and len(tokens) == 1:
        known += (
            "seq_idx",
        )  # trl's numbers of documents; the tokens of one row stay where they are
    strange = [k for k, v in kwargs.items() if isinstance(v, torch.Tensor) and k not in known]
    if strange or tokens is None or getattr(mask, "ndim", 2) != 2:
        return None
    if getattr(positions, "ndim", 2) != 2:
        return None
    shape = (int(tokens.shape[0]), int(tokens.shape[1]))
    packed = pack_batch(shape, mask, positions, kwargs.get("cu_seq_lens_q"), tokens.device)
    if packed is None:
        state.notes["unpadding"] = "a batch stayed padded, for its attention mask has holes"
    return packed if packed is not None and packed.num_tokens else None


def _stays_padded(decoder: nn.Module, state: EngineState, kwargs: dict[str, Any]) -> bool:
    """Tell whether a call cannot be packed, whatever its tensors are."""
    # Recomputed outside of this call, an attention of its own would not find the interface.
    recomputes = decoder.training and getattr(decoder, "gradient_checkpointing", False)
    if not state.packs or (recomputes and not state.owns_attention):
        return True
    return wants_original(decoder, state, kwargs)


@contextlib.contextmanager
def packed_attention(decoder: nn.Module) -> Iterator[None]:
    """Name the engine's attention interface in the model's config: no T x T mask is made for it.

    Args:
        decoder: Its layers are called inside the body, with `whet_packed`.
    """
    config: Any = decoder.config
    before = config._attn_implementation
    config._attn_implementation = "whet"
    try:
        yield
    finally:
        config._attn_implementation = before


@dataclass(frozen=True, slots=True)
class LabelledBatch:
    """A call with labels, packed: hidden states of the labelled rows, and where they were.

    Args:
        hidden_ND: Hidden states of the labelled rows.
        target_N: Their classes.
        target_BL: Classes of the padded batch, -100 where nothing is learned; of a PackedPass (1, N).
        weight_VD: Weight of the live head.
        bias_V: Its bias, or None.
        hidden_TD: Hidden states of all tokens.
        packed: Where they were.
    """

    hidden_ND: torch.Tensor
    target_N: torch.Tensor
    target_BL: torch.Tensor
    weight_VD: torch.Tensor | HeldWeight
    bias_V: torch.Tensor | None
    hidden_TD: torch.Tensor
    packed: Packed


def _labelled_batch(
    model: nn.Module, state: EngineState, kwargs: dict[str, Any]
) -> LabelledBatch | None:
    """Run the decoder and pick the labelled rows; None where the original forward must run."""
    decoder = decoder_of(model)
    inner = {k: v for k, v in kwargs.items() if k not in HEAD_ARGUMENTS}
    live = None if wants_original(decoder, state, inner) else _live_head(model, state, kwargs)
    if live is None:
        return None
    target_BL = kwargs.get("shift_labels")
    if target_BL is None:
        target_BL = functional.pad(kwargs["labels"][:, 1:], (0, 1), value=-100)
    labelled_BL = target_BL != -100
    packed = pack(decoder, state, inner)
    if packed is not None and int(packed.pack(labelled_BL).sum()) != int(labelled_BL.sum()):
        packed = None  # a label on padding: the original learns it, and so it stays in
        state.notes["unpadding"] = "a batch stayed padded, for padding in it is labelled"
    output = decoder(**{**inner, "use_cache": False, "whet_packed": packed or False})
    if packed is None:
        shape = (int(target_BL.shape[0]), int(target_BL.shape[1]))
        packed = pack_batch(shape, None, None, None, target_BL.device)
        assert packed is not None
    hidden_TD = output.last_hidden_state.flatten(0, 1)
    rows_N = packed.pack(labelled_BL).nonzero()[:, 0].to(hidden_TD.device)
    if not len(rows_N):
        _count_unlabelled(state)
    return LabelledBatch(
        hidden_TD.index_select(0, rows_N),
        packed.pack(target_BL).to(hidden_TD.device).index_select(0, rows_N),
        target_BL, *live, hidden_TD, packed,
    )  # fmt: skip


def _given_batch(
    model: nn.Module, state: EngineState, given: PackedPass, kwargs: dict[str, Any]
) -> LabelledBatch | None:
    """Run the decoder on a pass that says everything; None where the original forward must run."""
    decoder = decoder_of(model)
    inner = {k: v for k, v in kwargs.items() if k not in HEAD_ARGUMENTS}
    live = _live_head(model, state, kwargs) if isinstance(state.head, Head) else None
    if live is None or _stays_padded(decoder, state, inner):
        return None
    packed = given.packed
    inner.update(input_ids=given.input_ids, use_cache=False, whet_packed=packed)
    hidden_TD = decoder(**inner).last_hidden_state[0]
    if not given.num_labels:
        _count_unlabelled(state)
    return LabelledBatch(
        hidden_TD.index_select(0, given.rows_N), given.target_N, given.target_N[None], *live,
        hidden_TD, packed,
    )  # fmt: skip


def _live_head(
    model: nn.Module, state: EngineState, kwargs: dict[str, Any]
) -> tuple[torch.Tensor | HeldWeight, torch.Tensor | None] | None:
    """Read the head's weight and bias; None where the original forward must run."""
    keep = kwargs.get("logits_to_keep", 0)
    default = getattr(model.config, "output_router_logits", False)
    if isinstance(keep, torch.Tensor) or keep or kwargs.get("output_router_logits", default):
        return None
    try:
        return read_head(model.get_output_embeddings())  # type: ignore[operator]
    except Unsupported as reason:
        state.notes["head"] = str(reason)
        return None


def _count_unlabelled(state: EngineState) -> None:
    state.unlabelled_batches += 1
    if state.unlabelled_batches == 1:
        logger.warning("a batch has no labelled token; it counts as loss 0")


def _answer(
    model: nn.Module,
    state: EngineState,
    batch: LabelledBatch,
    kwargs: dict[str, Any],
    loss_only: bool,
) -> Any:
    """Return the loss as transformers' ForCausalLMLoss gives it; logits are made when asked for."""
    from whet.engine.output import LossOutput

    assert isinstance(head := state.head, Head)
    if kwargs.get("whet_log_probs"):
        return trl.label_log_probs(head, batch)
    total = head_loss(batch.hidden_ND, batch.weight_VD, batch.bias_V, batch.target_N, head)
    count = kwargs.get("num_items_in_batch")
    if count is None:
        count = max(1, len(batch.target_N))
    loss = total / (count.to(total.device) if isinstance(count, torch.Tensor) else count)
    if not len(batch.target_N):
        loss = loss + batch.hidden_TD[:0].sum()  # tied to every parameter, with zero gradients
    if state.debug:
        check_finite("the loss", loss)
    output = LossOutput(loss=loss)  # type: ignore[call-arg]
    output.set_maker(lambda: shaped_logits(model, head, batch.packed.pad(batch.hidden_TD)))
    if not model.training and not loss_only:  # an evaluation loop takes every field there is
        output["logits"] = output.logits
    return output


def shaped_logits(model: nn.Module, head: Head, hidden: torch.Tensor) -> torch.Tensor:
    """Return logits as the original forward would.

    Args:
        model: The causal language model, or its output embeddings alone.
        head: What follows the output embeddings.
        hidden: Hidden states after the last norm, of any leading shape.
    """
    logits = getattr(model, "get_output_embeddings", lambda: model)()(hidden)
    if head.logit_scale != 1.0:
        logits = logits * head.logit_scale
    if head.softcap is not None:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    return logits


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the decoder of a causal language model: what makes the hidden states."""
    return model.base_model  # type: ignore[return-value]
