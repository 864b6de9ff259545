"""Whether a model may be decoded by the engine: is there room, and does it answer as the original does?

One layer of each structure decodes two sequences together, prompts first and then token by token, and is
judged by the triangulated bound of parity.py; then the whole model does, and must be near its original.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import nn

from whet.engine import parity, swap
from whet.engine.decode import (
    DecodeLayer,
    PromptStep,
    Slots,
    SlotStep,
    Step,
    decode_layer,
    ready_layer,
)
from whet.engine.decoder import Decoder, ReadyModel
from whet.engine.model import EngineState
from whet.engine.original import attend_plainly_, in_high_precision, original_half, randomize_
from whet.engine.product import num_bytes
from whet.engine.projection import Unsupported
from whet.engine.spec import LayerSpec
from whet.engine.unpad import from_lengths

logger = logging.getLogger(__name__)

# Tokens of the two test sequences, and how many of each are prompt.
CHECK_LENGTHS = (9, 6)
CHECK_PROMPTS = (5, 2)


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
            logger.info("the engine decodes%s", ", with a copy of the weights" if copies else "")
            return ready
        if copies:
            logger.info("no copy of the weights is used: %s", reason)
    return reason


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
