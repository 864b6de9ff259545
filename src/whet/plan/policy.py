"""Choose how many tokens go in one pass, and where each kind of saved tensor stays meanwhile.

For a number of tokens the policy is filled greedily: everything is kept, and while that does not fit, the
measure with the least cost in time for a byte is taken, layer by layer. Among the numbers of tokens the
fastest choice that fits is taken (`fast`), or the one that needs the least memory (`lean`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from whet.data.packing import Packing, StepSampler
from whet.data.tokenize import Tokens
from whet.engine.memory import Policy
from whet.plan.memory import LEAST, PassMemory, PassModel, Static
from whet.plan.speed import Speed, Work

# The parts of a step that products do not explain: Python, launches, and reading the weights once a pass.
SECONDS_PER_LAYER_AND_PASS = {"cpu": 1.5e-3, "cuda": 0.6e-3}


@dataclass(frozen=True)
class Workload:
    """What the examples of a run are like.

    Args:
        lengths: Tokens of each example.
        label_share: Share of the tokens that are learned.
        batch_size: Examples of one step.
        batch_tokens: Tokens of one step instead, or None.
        num_steps: Optimizer steps of the run.
        seed: Of the order of the examples; None when that is the order of the files.
        known: Whether the lengths are those of the data; else every example is taken to be as long as
            the config allows.
    """

    lengths: tuple[int, ...]
    label_share: float
    batch_size: int
    batch_tokens: int | None
    num_steps: int
    seed: int | None
    known: bool

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(self.lengths)

    def steps(self, most: int = 64) -> list[list[int]]:
        """Return the lengths of the examples of the first steps."""
        sampler = StepSampler(self.lengths, self.batch_size, self.seed, self.batch_tokens)
        found: list[list[int]] = []
        for epoch in range(3):
            sampler.set_epoch(epoch)
            for rows in sampler:
                found.append([self.lengths[row] for row in rows])
                if len(found) >= most:
                    return found
        return found


@dataclass(frozen=True, slots=True)
class Target:
    """What is planned for.

    Args:
        device: `cpu` or `cuda`.
        name: How it is called.
        budget_bytes: What the run may use of the device's memory.
        reserve_bytes: What the process needs besides tensors: the CUDA context, or Python and libraries.
        host_bytes: Host memory that may be pinned; 0 where nothing is offloaded by itself.
        speed: How fast it is.
    """

    device: str
    name: str
    budget_bytes: int
    reserve_bytes: int
    host_bytes: int
    speed: Speed

    def shared_by(self, num: int) -> Target:
        """Return what each of several processes of a machine may use: on a CPU they share its RAM."""
        if self.device == "cuda":
            return self
        own = self.reserve_bytes
        return replace(self, budget_bytes=max(0, self.budget_bytes - own) // num + own)


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run a step.

    Args:
        tokens_per_pass: Most tokens of a pass.
        policies: One for each layer.
        memory: What the largest pass needs.
        static: What is there besides.
        peak_bytes: The most of the device's memory that is used, the process's own included.
        passes_per_step: On average.
        step_seconds: On average, as estimated.
    """

    tokens_per_pass: int
    policies: tuple[Policy, ...]
    memory: PassMemory
    static: Static
    peak_bytes: int
    passes_per_step: float
    step_seconds: float


class Chooser:
    """Evaluates the ways to run a step.

    Args:
        passes: What passes need.
        static: What is there besides.
        work: What passes compute.
        workload: The examples.
        target: The device.
        packing: How examples become passes, whatever their size.
        policy: As in `plan.policy`.
        scale: Measured bytes of a pass over estimated ones, once a probe has run.
    """

    def __init__(
        self,
        passes: PassModel,
        static: Static,
        work: Work,
        workload: Workload,
        target: Target,
        packing: Packing,
        policy: str = "auto",
        scale: float = 1.0,
    ) -> None:
        self.passes, self.static, self.work, self.workload = passes, static, work, workload
        self.target, self.packing, self.policy, self.scale = target, packing, policy, scale
        self.steps = workload.steps()
        self._grouped: dict[int, list[list[int]]] = {}

    def choose(self, preset: str, tokens_per_pass: int | None = None) -> Choice | None:
        """Return the best way that fits, None when none does.

        Args:
            preset: `fast` or `lean`.
            tokens_per_pass: Only ways with this many tokens; None tries several.
        """
        sizes = [tokens_per_pass] if tokens_per_pass else self.sizes()
        if preset == "lean":
            least = self.evaluate(sizes[-1], self.least())
            return least if self.fits(least) else None
        found = []
        if self.policy == "auto" and not self.packing.padded:
            # Where a whole step fits in one pass with everything kept, nothing is faster.
            choice = self.evaluate(sizes[0], (Policy(),) * self.passes.num_layers)
            if self.fits(choice):
                return choice
        for size in reversed(sizes):  # where the smaller does not fit, the larger need not be tried
            choice = self.fill(size)
            if choice is None:
                break
            found.append(choice)
        # Within 3% the estimate cannot tell: then the fewest passes, whose arithmetic does not depend
        # on how much memory happens to be free.
        best = min((choice.step_seconds for choice in found), default=0.0)
        close = [choice for choice in found if choice.step_seconds <= 1.03 * best]
        return max(close, key=lambda choice: choice.tokens_per_pass, default=None)

    def sizes(self) -> list[int]:
        """Return the numbers of tokens worth trying: a whole step, halves of it, the longest example."""
        lengths = [self._entered(step) for step in self.steps]
        whole, longest = max(lengths), min(self.workload.longest, max(lengths))
        sizes = [-(-whole // 64) * 64]
        while sizes[-1] // 2 > longest:
            sizes.append(sizes[-1] // 2)
        return [*sizes, longest] if sizes[-1] > longest else sizes

    def _entered(self, step: Sequence[int]) -> int:
        return len(step) * max(step) if self.packing.padded else sum(step)

    def least(self) -> tuple[Policy, ...]:
        """Return the policies that keep the least the target allows."""
        if self.policy == "keep":
            kept = Policy()
        elif self.policy == "offload" or (self.policy == "auto" and self.target.host_bytes):
            kept = replace(LEAST, hidden="offload", attention="offload")
        else:
            kept = LEAST
        return (kept,) * self.passes.num_layers

    def fits(self, choice: Choice) -> bool:
        """Tell whether a way stays within the target's memory."""
        away = sum(choice.memory.away.values())
        enough = self.target.device == "cpu" or away <= self.target.host_bytes
        return choice.peak_bytes <= self.target.budget_bytes and enough

    def fill(self, size: int) -> Choice | None:
        """Return the fastest way with so many tokens a pass that fits; None when none does."""
        num = self.passes.num_layers
        if self.policy != "auto":
            fixed = {"keep": Policy(), "recompute": LEAST, "offload": self.least()[0]}[self.policy]
            choice = self.evaluate(size, (fixed,) * num)
            return choice if self.fits(choice) else None
        policies = [Policy()] * num
        lean = self.evaluate(size, self.least())
        if not self.fits(lean):
            return None
        choice = self.evaluate(size, tuple(policies))
        if self.fits(choice):
            return choice
        for kind, way in self._measures():
            # The fewest layers for which the measure is enough, by halving.
            low, high = 1, num
            applied = [replace(p, **{kind: way}) for p in policies]
            whole = self.evaluate(size, tuple(applied))
            if not self.fits(whole):
                policies = applied
                continue
            while low < high:
                middle = (low + high) // 2
                some = tuple(applied[:middle] + policies[middle:])
                if self.fits(self.evaluate(size, some)):
                    high = middle
                else:
                    low = middle + 1
            return self.evaluate(size, tuple(applied[:low] + policies[low:]))
        return lean

    def _measures(self) -> Iterator[tuple[str, str]]:
        """Yield (kind, way) in order of the seconds they cost for a byte they save."""
        trace = self.passes.trace(
            min(1024, self.sizes()[0]), min(1024, self.workload.longest), False
        )
        saved, tokens = trace.saved, min(1024, self.sizes()[0])
        rate = self.target.speed.flops * self.target.speed.efficiency
        seconds = tokens * self.work.per_token[0] / rate  # in which copies can hide
        copies = [k for k in ("hidden", "attention") if saved[k]]
        costs: list[tuple[float, str, str]] = []
        for kind in ("gate_up", "qkv"):
            if not saved[kind]:
                continue
            policy = replace(Policy(), **{kind: "recompute"})
            again = tokens * self.work.recomputed([policy] * self.passes.num_layers) / rate
            costs.append((again / saved[kind], kind, "recompute"))
        if self.target.host_bytes:
            for kind in copies:
                exposed = saved[kind] / self.target.speed.host_bytes_per_second - 0.5 * seconds
                costs.append((max(exposed, 0.1 * seconds) / saved[kind], kind, "offload"))
        for _, kind, way in sorted(costs):
            yield kind, way

    def evaluate(self, size: int, policies: tuple[Policy, ...]) -> Choice:
        """Return what a way to run a step needs and how long it takes."""
        largest = max(size, self.workload.longest) if not self.packing.split else size
        longest = min(self.workload.longest, largest)
        memory = self.passes.needs(largest, longest, policies)
        if self.scale != 1.0:
            memory = _scaled(memory, self.scale)
        device = sum(i.num_bytes for i in self.static.items if i.where == "device")
        peak = self.target.reserve_bytes + device + max(memory.peak, self.static.step)
        passes, seconds = self._time(size, policies)
        return Choice(size, policies, memory, self.static, peak, passes, seconds)

    def _time(self, size: int, policies: Sequence[Policy]) -> tuple[float, float]:
        """Return passes and seconds of a step, on average over the first steps."""
        groups = self.groups(size)
        passes, flops = float(len(groups)), 0.0
        for lengths in groups:
            labels = sum(lengths) * self.workload.label_share
            flops += self.work.of_pass(lengths, labels, policies)[1]
        speed, num = self.target.speed, len(self.steps)
        passes, flops = passes / num, flops / num
        seconds = flops / (speed.flops * speed.efficiency)
        layers = SECONDS_PER_LAYER_AND_PASS[self.target.device] * self.passes.num_layers
        # Each pass reads every weight forward and backward, and 4-bit weights become 16-bit ones.
        weights = 2 * (self.static.weights + 8 * self.static.quantised)
        seconds += passes * (layers + weights / speed.bytes_per_second)
        trained = self.static.gradients + 2 * self.static.states + 2 * self.static.adapters
        return passes, seconds + trained / speed.bytes_per_second

    def groups(self, size: int) -> list[list[int]]:
        """Return the lengths of the documents of each pass of the first steps."""
        if size not in self._grouped:
            packing = replace(self.packing, tokens_per_pass=size)
            self._grouped[size] = [
                [len(tokens.input_ids) for tokens in group]
                for step in self.steps
                for group in packing.passes([Tokens([0] * n, [0] * n, "") for n in step])
            ]
        return self._grouped[size]


def _scaled(memory: PassMemory, scale: float) -> PassMemory:
    """Correct a pass's estimate by what a probe measured."""
    values: dict[str, Any] = {
        "saved": {kind: round(scale * n) for kind, n in memory.saved.items()},
        "working": round(scale * memory.working),
        "head": round(scale * memory.head),
        "around": round(scale * memory.around),
    }
    return replace(memory, **values)


def describe(policies: Sequence[Policy]) -> dict[str, str]:
    """Say for each kind of saved tensor where it stays, such as `recompute in 12 of 30 layers`."""
    found = {}
    for kind in ("hidden", "qkv", "attention", "gate_up"):
        choices = [getattr(policy, kind) for policy in policies]
        ways = sorted(set(choices), key=choices.count, reverse=True)
        if len(ways) == 1:
            found[kind] = ways[0]
        else:
            counts = [(way, choices.count(way)) for way in ways]
            found[kind] = ", ".join(f"{way} in {n} layer{'s' * (n > 1)}" for way, n in counts)
    return found


def policy_of_gradient_checkpointing(value: bool | str) -> str:
    """Return the `plan.policy` that means what `use_gradient_checkpointing` means elsewhere.

    Args:
        value: False keeps, True recomputes, "unsloth" offloads and recomputes.

    Raises:
        ValueError: It is something else.
    """
    known = {"false": "keep", "true": "recompute", "unsloth": "offload"}
    if str(value).lower() not in known:
        raise ValueError(f"use_gradient_checkpointing is True, False or 'unsloth', not {value!r}")
    return known[str(value).lower()]
