"""`whet verify`: a whole model, part by part and end to end, the engine against the original.

Every distinct layer is compared half by half (parity.py); then loss, logits of sampled rows and every
trainable gradient of the whole model on real text, padded; then that documents of a pack do not see
each other, bit for bit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from whet.engine import swap
from whet.engine.head import head_loss, read_head
from whet.engine.original import in_high_precision
from whet.engine.parity import (
    Comparison,
    compare_thrice,
    judge,
    layer_key,
    observe,
)
from whet.engine.report import SwapReport, ranges
from whet.engine.swap import EngineSettings

# Rows of logits that are compared.
SAMPLED_ROWS = 16


@dataclass(frozen=True, slots=True)
class PartVerdict:
    """What came out for one part.

    Args:
        name: The part.
        verdict: pass, fail, or kept (the original code runs, for a reason).
        error: The largest error of its worst tensor.
        bound: What that error may be.
        reason: Which tensor is the worst, or why the original code runs.
        original_error: The original's own largest error, of the same tensor.
    """

    name: str
    verdict: str
    error: float | None = None
    bound: float | None = None
    reason: str = ""
    original_error: float | None = None


@dataclass(frozen=True, slots=True)
class Verification:
    """The parity report of one model."""

    layers_total: int
    layers_fused: int
    parts: list[PartVerdict] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(part.verdict != "fail" for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as `whet verify --json` prints it."""
        return {
            "passed": self.passed,
            "layers_total": self.layers_total,
            "layers_fused": self.layers_fused,
            "parts": [asdict(part) for part in self.parts],
        }


def verify(model: Any, rows: Sequence[Sequence[int]], settings: EngineSettings) -> Verification:
    """Compare a model with the engine in it to itself without.

    Args:
        model: The model, with adapters or without; its small parameters are made random.
        rows: Token ids of a few rows of different lengths, all of which are learned.
        settings: How the engine goes in; `check` is at least quick.

    Returns:
        The report; the engine is left in the model.
    """
    base = swap.base_of(model)
    if settings.check == "off":
        settings = EngineSettings(strict=settings.strict, head_rows=settings.head_rows)
    report = swap.attach(model, settings)
    _start_adapters_(model)
    parts = [
        *_kept(report),
        *_layers(base, report),
        *_head(base),
        *_whole(model, rows),
    ]
    if any(part.part == "unpadding" and part.fused for part in report.parts):
        parts.append(_isolation(model, rows))
    return Verification(report.layers_total, report.layers_fused, parts)


def _start_adapters_(model: nn.Module) -> None:
    """Give every B that is zero small random values: a fresh adapter computes nothing.

    Everything else stays, for a model with random norms amplifies rounding beyond any comparison.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and not parameter.any():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.01 * noise)


def _kept(report: SwapReport) -> list[PartVerdict]:
    """Return what keeps its own code; what could have been fused but differs has failed."""
    verdicts = {}
    for part in report.parts:
        if not part.fused:
            like = ranges(_like(report, part))
            name = part.part if part.layer is None else f"{part.part} of {like}"
            verdict = "fail" if part.failed else "kept"
            verdicts[name, part.reason] = PartVerdict(name, verdict, reason=part.reason)
    return list(verdicts.values())


def _like(report: SwapReport, part: Any) -> list[int]:
    same = (p for p in report.parts if p.part == part.part and p.reason == part.reason)
    return [p.layer for p in same if p.layer is not None]


def _layers(base: Any, report: SwapReport) -> list[PartVerdict]:
    """Compare one layer of each structure, half by half."""
    from whet.engine.model import decoder_of

    blocks = swap.decoder_layers(decoder_of(base))
    fused = {(p.layer, p.part) for p in report.parts if p.fused}
    alike: dict[Any, list[int]] = {}
    for number, block in enumerate(blocks):
        if "_whet" in vars(block):
            alike.setdefault(layer_key(block, vars(block)["_whet"].spec), []).append(number)
    with swap.paused(base):
        seen = observe(base, blocks)
    verdicts = []
    for numbers in alike.values():
        block, angles = blocks[numbers[0]], seen.layers[numbers[0]].position_embeddings  # type: ignore[union-attr]
        for part in ("attention", "mlp"):
            if (numbers[0], part) in fused:
                spec, dtype = vars(block)["_whet"].spec, seen.hidden.dtype  # type: ignore[union-attr]
                compared = compare_thrice(block, spec, part, angles, dtype)
                verdicts.append(_worst(f"{part} of {ranges(numbers)}", compared))
    return verdicts


def _head(base: Any) -> list[PartVerdict]:
    """Compare the loss of given hidden states, and its gradient, with plain cross entropy."""
    from whet.engine.model import decoder_of, shaped_logits

    head = vars(base)["_whet"].head
    if isinstance(head, str):
        return []
    with swap.paused(base):
        seen = observe(base, swap.decoder_layers(decoder_of(base)))
    assert seen is not None
    module = base.get_output_embeddings()
    weight, bias = read_head(module)
    target = seen.input_ids[0, 1:]
    exact = in_high_precision(module, seen.hidden.dtype)

    def plain(hidden: torch.Tensor, module: nn.Module) -> torch.Tensor:
        logits = shaped_logits(module, head, hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return nn.functional.cross_entropy(logits, target, reduction="sum")

    results = []
    for run in ("ours", "original", "truth"):
        hidden = seen.hidden[0, :-1].to(_dtype(exact) if run == "truth" else seen.hidden.dtype)
        hidden = hidden.detach().requires_grad_()
        if run == "ours":
            loss = head_loss(hidden, weight.detach(), bias, target, head)
        else:
            loss = plain(hidden, exact if run == "truth" else module)
        results.append((loss.detach(), torch.autograd.grad(loss, hidden)[0]))
    losses, grads = zip(*results, strict=True)
    return [
        _worst("head", [judge("loss", *losses), judge("gradient of the hidden states", *grads)])
    ]


def _dtype(module: nn.Module) -> torch.dtype:
    return next(p.dtype for p in module.parameters() if p.is_floating_point())


def _worst(name: str, compared: list[Comparison] | str) -> PartVerdict:
    """Report the comparison that comes closest to its bound, or is the farthest beyond."""
    if isinstance(compared, str):
        return PartVerdict(name, "fail", reason=compared)
    worst = max(compared, key=lambda one: one.error / one.bound if one.bound else math.inf)
    verdict = "pass" if all(one.passed for one in compared) else "fail"
    closest = f"closest: {worst.name}"
    return PartVerdict(name, verdict, worst.error, worst.bound, closest, worst.original_error)


@dataclass(frozen=True, slots=True)
class _Pass:
    """One training pass: its loss, the loss of each token, sampled logits, gradients by name."""

    loss: torch.Tensor
    losses: torch.Tensor
    logits: torch.Tensor
    gradients: dict[str, torch.Tensor]


def _whole(model: Any, rows: Sequence[Sequence[int]]) -> list[PartVerdict]:
    """Compare loss, sampled logits and all gradients of a padded batch."""
    dtype = _dtype(swap.base_of(model))
    training = model.training
    model.eval()  # no dropout: the engine and the original must meet the same network
    ours = _run(model, rows)
    with swap.paused(model):
        original = _run(model, rows)
    truth_model = in_high_precision(model, dtype)
    swap.detach(truth_model)
    truth = _truth(truth_model, rows)
    del truth_model
    model.train(training)
    # Token by token: of a sum's rounding error, one draw may be any multiple of another.
    loss = judge("loss of a token", ours.losses, original.losses, truth.losses)
    logits = judge("logits", ours.logits, original.logits, truth.logits)
    reported = Comparison(
        "reported loss", float((ours.loss - ours.losses.mean()).abs()), 0.0, 1e-4 * float(ours.loss)
    )
    verdicts = [
        _worst("whole model: loss", [loss, reported]),
        _worst("whole model: logits", [logits]),
    ]
    kinds: dict[str, list[str]] = {}
    for name in truth.gradients:
        kinds.setdefault(_kind(name), []).append(name)
    for kind, names in kinds.items():
        # Layers of one kind together: the largest of two draws of rounding noise may differ threefold.
        together = [
            torch.cat([one.gradients[name].flatten() for name in names])
            for one in (ours, original, truth)
        ]
        verdicts.append(_worst(f"gradients: {kind}", [judge(kind, *together)]))
    return verdicts


def _kind(name: str) -> str:
    """Return a parameter's name without the number of its layer and what wrappers add."""
    name = re.sub(r"\.\d+\.", ".", name)
    for word in ("base_model.", "model.", "transformer.", "layers.", "h.", "default.", "weight"):
        name = name.replace(word, "")
    return name.strip(".")


def _run(model: Any, rows: Sequence[Sequence[int]]) -> _Pass:
    """Run a right-padded batch forward and backward."""
    device = next(model.parameters()).device
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    mask = torch.tensor(
        [[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device
    )
    labels = ids.masked_fill(mask == 0, -100)
    model.zero_grad()
    output = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
    output.loss.backward()
    logits, losses = output.logits.detach(), []
    for row, kept in zip(logits, rows, strict=True):
        losses.append(_token_losses(row[: len(kept)], kept))
    sampled = logits[mask.bool()][_sampled(int(mask.sum()))]
    return _Pass(output.loss.detach(), torch.cat(losses), sampled, _take_gradients(model))


def _token_losses(logits_LV: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    logits = logits_LV if logits_LV.dtype == torch.float64 else logits_LV.float()
    target = torch.tensor(list(ids[1:]), device=logits.device)
    return nn.functional.cross_entropy(logits[:-1], target, reduction="none")


def _truth(model: nn.Module, rows: Sequence[Sequence[int]]) -> _Pass:
    """Run the original row by row, so that no padding and no mask of padding is in it."""
    device = next(model.parameters()).device
    count = sum(len(row) - 1 for row in rows)
    model.zero_grad()
    losses, logits = [], []
    for row in rows:
        ids = torch.tensor([list(row)], device=device)
        output = model(input_ids=ids, labels=ids, num_items_in_batch=count, use_cache=False)
        output.loss.backward()
        logits.append(output.logits[0].detach())
        losses.append(_token_losses(logits[-1], row))
    sampled = torch.cat(logits)[_sampled(sum(map(len, rows)))]
    each = torch.cat(losses)
    return _Pass(each.mean(), each, sampled, _take_gradients(model))


def _sampled(num: int) -> torch.Tensor:
    return torch.linspace(0, num - 1, min(num, SAMPLED_ROWS)).long()


def _take_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    taken = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return taken


def _isolation(model: Any, rows: Sequence[Sequence[int]]) -> PartVerdict:
    """Change the first document of a pack and see whether any bit of the others changes."""
    device = next(model.parameters()).device
    ids = torch.tensor([[token for row in rows for token in row]], device=device)
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None].to(device)
    cut = len(rows[0])
    changed = ids.clone()
    changed[0, :cut] = ids[0, :cut].flip(0)
    training = model.training
    model.eval()
    with torch.no_grad():
        one, other = (
            model(input_ids=x, position_ids=positions, use_cache=False).logits
            for x in (ids, changed)
        )
    model.train(training)
    if torch.equal(one[0, :cut], other[0, :cut]):
        return PartVerdict(
            "documents of a pack", "fail", reason="a changed document changed nothing"
        )
    if not torch.equal(one[0, cut:], other[0, cut:]):
        apart = float((one[0, cut:] - other[0, cut:]).abs().max())
        return PartVerdict("documents of a pack", "fail", apart, 0.0, "one sees another")
    return PartVerdict("documents of a pack", "pass", 0.0, 0.0, "bit for bit apart")


def compare_pass(model: Any, input_ids: torch.Tensor, labels: torch.Tensor) -> str:
    """Compare loss and gradient norm of one real pass, the engine in and out.

    Args:
        model: A model with the engine in it, as it will be trained.
        input_ids: (1, L) tokens of one row.
        labels: (1, L) labels.

    Returns:
        Nothing, or how far they are apart.
    """
    found = []
    devices = [input_ids.device] if input_ids.is_cuda else []
    for pause in (False, True):
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)  # dropout, where there is one, must fall alike
            model.zero_grad()
            if pause:
                with swap.paused(model):
                    loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
            else:
                loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
            loss.backward()
        squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
        found.append((float(loss.detach()), math.sqrt(float(sum(squares)))))
        model.zero_grad()
    (loss, norm), (true_loss, true_norm) = found
    dtype = _dtype(swap.base_of(model))
    most = 1e-4 if dtype == torch.float32 else 3e-2
    if abs(loss - true_loss) > most * abs(true_loss) + 1e-6:
        return f"its loss of a real pass is {loss:.5g}, the original's {true_loss:.5g}"
    if abs(norm - true_norm) > 10 * most * true_norm + 1e-6:
        return f"its gradient norm of a real pass is {norm:.5g}, the original's {true_norm:.5g}"
    return ""
