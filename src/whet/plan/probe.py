"""Run the longest pass once, before training, and correct the plan by what it really needed.

On CUDA the allocator tells the peak. On the CPU storages are counted as operators make them and let them
go (count.py); resident memory would tell of pages that glibc keeps, and of everything else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from whet.data.packing import StepSampler
from whet.data.store import lengths_of
from whet.data.tokenize import Tokens
from whet.engine.memory import release_workspaces
from whet.plan.count import AllocationCounter, storages_of
from whet.plan.plan import Plan

# A pass that took longer is not run a second time for its speed alone.
LONG_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Probe:
    """What one pass needed, beside what was estimated for it.

    Args:
        tokens: Tokens that entered the model.
        longest: Of its longest example.
        estimated_bytes: Peak of the pass above what is there anyway, slack left out.
        measured_bytes: The same, measured.
        estimated_saved_bytes: Held on the device between forward and backward.
        measured_saved_bytes: The same, measured; None on CUDA.
        seconds: Of a second run, or of the first where that was long.
        estimated_seconds: What the plan gave for it.
    """

    tokens: int
    longest: int
    estimated_bytes: int
    measured_bytes: int
    estimated_saved_bytes: int
    measured_saved_bytes: int | None
    seconds: float
    estimated_seconds: float

    @property
    def ratio(self) -> float:
        """Measured over estimated bytes."""
        return self.measured_bytes / max(1, self.estimated_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Return it for report.json."""
        return {**asdict(self), "ratio": self.ratio}


def may_matter(plan: Plan) -> bool:
    """Tell whether a measurement could change a plan: it is a rough one, or uses half of the memory.

    A probe costs twice a step. Traced estimates were within 10% of what was measured (docs/log.md).
    """
    rough = not plan.chooser.passes.traced
    return rough or 2 * plan.choice.peak_bytes > plan.target.budget_bytes


def largest_pass(plan: Plan, rows: Sequence[Tokens]) -> list[Tokens]:
    """Return the examples of the pass with the most tokens among those of the first steps.

    Args:
        plan: How steps become passes.
        rows: The training examples.
    """
    load, packing = plan.workload, plan.packing
    lengths = lengths_of(rows)
    sampler = StepSampler(lengths, load.batch_size, load.seed, load.batch_tokens)
    steps = [step for number, step in enumerate(sampler) if number < 64]
    passes = [group for step in steps for group in packing.passes([rows[i] for i in step])]
    alone = [rows[int(lengths.argmax())]]  # wherever in the epoch it comes
    return max([alone, *passes], key=packing.num_entered)


def probe(
    model: Any, plan: Plan, rows: Sequence[Tokens], run_pass: Callable[[Sequence[Tokens]], Any]
) -> Probe:
    """Run one pass forward and backward and measure it; gradients and random state are as before.

    Args:
        model: The model, ready to be trained, without gradients.
        plan: What was estimated.
        rows: The examples of the pass.
        run_pass: Runs them forward and backward.
    """
    cpu, cuda = torch.get_rng_state(), _cuda_states()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:  # there in every later pass, and counted apart
        parameter.grad = torch.zeros_like(parameter)
    release_workspaces()
    try:
        start = time.perf_counter()
        peak, saved = _measure(model, lambda: run_pass(rows))
        seconds = time.perf_counter() - start
        if seconds < LONG_SECONDS:
            start = time.perf_counter()
            run_pass(rows)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
    finally:
        model.zero_grad()
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
    lengths = [len(tokens.input_ids) for tokens in rows]
    tokens = plan.packing.num_entered(rows)
    needs = plan.chooser.passes.needs(tokens, max(lengths), plan.choice.policies)
    labels = sum(row.num_labels for row in rows)
    flops = plan.chooser.work.of_pass(lengths, labels, plan.choice.policies)[1]
    speed = plan.target.speed
    return Probe(
        tokens, max(lengths), needs.peak - needs.slack, peak, sum(needs.saved.values()), saved,
        seconds, flops / (speed.flops * speed.efficiency),
    )  # fmt: skip


def _cuda_states() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _measure(model: Any, work: Callable[[], Any]) -> tuple[int, int | None]:
    """Return the peak above what is there, and the bytes saved for the backward pass (on the CPU)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, None
    ignored, held = storages_of(model), {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in ignored:
            held[storage._cdata] = storage.nbytes()
        return tensor

    with (
        AllocationCounter() as counter,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        work()
    return counter.peak, sum(held.values())


def corrected(plan: Plan, measured: Probe) -> Plan:
    """Return the plan with its passes scaled by what was measured; the choice is made again.

    Args:
        plan: The plan that was probed.
        measured: What its largest pass needed.
    """
    chooser = plan.chooser
    chooser.scale = measured.ratio
    speed = plan.target.speed
    share = measured.estimated_seconds / max(measured.seconds, 1e-9)
    chooser.target = replace(plan.target, speed=replace(speed, efficiency=speed.efficiency * share))
    same = chooser.evaluate(plan.choice.tokens_per_pass, plan.choice.policies)
    choice = same
    if not chooser.fits(same):
        choice = chooser.choose(plan.preset, plan.tokens_per_pass) or chooser.evaluate(
            chooser.sizes()[-1], chooser.least()
        )
    return replace(plan, choice=choice, fits=chooser.fits(choice), target=chooser.target)
