"""A plan: what a run will need and how its steps are cut, before a weight is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from whet.config import Config
from whet.config_file import load_config
from whet.data.packing import Packing, StepSampler
from whet.errors import WhetError
from whet.plan.memory import Item, PassModel, Static, static_memory
from whet.plan.policy import Choice, Chooser, Target, Workload, describe
from whet.plan.shape import meta_model, shaped
from whet.plan.speed import Work

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What was chosen, and what it comes to.

    Args:
        choice: The way to run a step: the best that fits, or the leanest when none does.
        fits: Whether it stays within the target's memory.
        target: The device.
        workload: The examples.
        static: What is there besides passes.
        flops: Operations of an average step, with what is computed again.
        notes: What a person should know.
        changes: What other settings would change, in words.
        chooser: Answers for other ways; not part of the report.
        preset: As in `plan.preset`.
        tokens_per_pass: As in `plan.tokens_per_pass`.
    """

    choice: Choice
    fits: bool
    target: Target
    workload: Workload
    static: Static
    flops: float
    notes: tuple[str, ...]
    changes: tuple[str, ...]
    chooser: Chooser
    preset: str = "fast"
    tokens_per_pass: int | None = None

    @property
    def items(self) -> list[Item]:
        """Every item of the memory, device and host."""
        name = "CUDA context" if self.target.device == "cuda" else "Python and libraries"
        reserve = [Item(name, self.target.reserve_bytes)] if self.target.reserve_bytes else []
        return [*self.static.items, *self.choice.memory.items, *reserve]

    @property
    def seconds(self) -> float:
        """Estimated seconds of all steps."""
        return self.choice.step_seconds * self.workload.num_steps

    @property
    def packing(self) -> Packing:
        """How a step becomes passes."""
        return replace(self.chooser.packing, tokens_per_pass=self.choice.tokens_per_pass)

    def flops_of(self, lengths: Sequence[int], num_labels: int) -> tuple[float, float]:
        """Return the operations of a pass over examples: the model's, and with those made again."""
        return self.chooser.work.of_pass(lengths, num_labels, self.choice.policies)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan for report.json and `--json`."""
        return {
            "fits": self.fits,
            "peak_bytes": self.choice.peak_bytes,
            "budget_bytes": self.target.budget_bytes,
            "device": self.target.device,
            "target": self.target.name,
            "tokens_per_pass": self.choice.tokens_per_pass,
            "longest_example": self.workload.longest,
            "passes_per_step": self.choice.passes_per_step,
            "policy": describe(self.choice.policies),
            "items": [{"name": i.name, "bytes": i.num_bytes, "where": i.where} for i in self.items],
            "saved_bytes": dict(self.choice.memory.saved),
            "step_seconds": self.choice.step_seconds,
            "seconds": self.seconds,
            "num_steps": self.workload.num_steps,
            "step_flops": self.flops,
            "notes": list(self.notes),
            "changes": list(self.changes),
        }


def workload_of(config: Config, lengths: list[int] | None, num_labels: int, limit: int) -> Workload:
    """Describe the examples of a run.

    Args:
        config: The run's config.
        lengths: Tokens of each training example, or None when the data cannot be read here.
        num_labels: Learned tokens among them.
        limit: Longest example the config allows.
    """
    train = config.train
    known = lengths is not None
    if lengths is None:
        lengths = [limit] * max(train.batch_size, 2 * (train.batch_tokens or 0) // limit, 1)
    seed = train.seed if train.shuffle else None
    steps = len(StepSampler(lengths, train.batch_size, seed, train.batch_tokens))
    return Workload(
        lengths=tuple(lengths),
        label_share=num_labels / sum(lengths) if known else 1.0,
        batch_size=train.batch_size,
        batch_tokens=train.batch_tokens,
        num_steps=train.max_steps or max(1, round(train.epochs * steps)),
        seed=seed,
        known=known,
    )


def make_plan(
    config: Config,
    workload: Workload,
    target: Target,
    dtype: torch.dtype,
    advise: bool = True,
) -> Plan:
    """Plan a run.

    Args:
        config: The run's config.
        workload: Its examples.
        target: What it runs on.
        dtype: Type of the weights, or of the products with 4-bit weights.
        advise: Also say what other settings would change.

    Returns:
        The plan; with `fits` false when nothing fits, and then `changes` begins with the smallest change
        that would.
    """
    chooser, notes = _chooser(config, workload, target, dtype)
    plan = config.plan
    choice = chooser.choose(plan.preset, plan.tokens_per_pass)
    fits = choice is not None
    if choice is None:
        size = plan.tokens_per_pass or chooser.sizes()[-1]
        choice = chooser.evaluate(size, chooser.least())
    changes: list[str] = []
    if not fits:
        changes = [_remedy(config, workload, target, dtype, chooser)]
    elif advise:
        changes = list(_changes(config, chooser, choice))
    flops = _step_flops(chooser, choice)
    return Plan(
        choice, fits, target, workload, chooser.static, flops, tuple(notes), tuple(changes), chooser,
        plan.preset, plan.tokens_per_pass,
    )  # fmt: skip


def require_fit(plan: Plan) -> None:
    """Stop before a run whose plan is beyond all of the memory there is.

    Raises:
        WhetError: It needs more than is free, with the smallest change that helps.
    """
    if not plan.fits and plan.choice.peak_bytes > plan.target.budget_bytes / 0.9:
        raise WhetError(
            f"this run does not fit into the memory: it needs {gib(plan.choice.peak_bytes)} at the least",
            f"{gib(plan.target.budget_bytes)} may be used of {plan.target.name}",
            plan.changes[0],
        )


def _chooser(
    config: Config, workload: Workload, target: Target, dtype: torch.dtype
) -> tuple[Chooser, list[str]]:
    model = meta_model(config, dtype)
    placed = config.plan.embeddings
    static = static_memory(model, config.train.optimizer, placed, target.device)
    made = shaped(model, target.device, config.engine.enabled, config.engine.block_tokens)
    passes = PassModel(made, target.device, config.engine.head_rows, workload.label_share, placed)
    packing = Packing(1, config.pack.split, padded=not (config.pack.enabled and made.packs))
    notes = []
    if not passes.traced:
        notes.append("the saved tensors are a rough estimate: the layers keep their own code")
    if not workload.known:
        notes.append(
            f"the data was not read: every example is taken to have {workload.longest:,} tokens, "
            "all learned"
        )
    policy = config.plan.policy
    return Chooser(passes, static, Work(model), workload, target, packing, policy), notes


def _step_flops(chooser: Chooser, choice: Choice) -> float:
    groups = chooser.groups(choice.tokens_per_pass)
    share = chooser.workload.label_share
    total = sum(
        chooser.work.of_pass(lengths, share * sum(lengths), choice.policies)[1]
        for lengths in groups
    )
    return total / len(chooser.steps)


def _changes(config: Config, chooser: Chooser, choice: Choice) -> Iterator[str]:
    """Say what other settings would change; what is under 1% of the peak is left out."""
    static, least = chooser.static, 0.01 * choice.peak_bytes
    if config.train.parameters == "lora":
        trained = static.adapters + static.gradients + static.states
        more = 3 * trained
        yield f"lora.rank {4 * config.lora.rank} adds {gib(more)}"
        if not config.model.load_in_4bit:
            bits = sum(num for _, num in _dense(chooser)) * 4.127 / 8
            saved = static.weights - bits
            if saved > least:
                yield f"model.load_in_4bit: true saves about {gib(saved)}"
    if config.train.optimizer.startswith("adamw_torch"):
        saved = 0.75 * static.states
        if saved > least:
            yield f"train.optimizer adamw_8bit saves {gib(saved)}"
    if config.plan.embeddings == "device" and config.train.parameters == "lora":
        if static.embeddings > 4 * least:
            yield f"plan.embeddings 8bit saves {gib(0.5 * static.embeddings)}"
            if chooser.target.device == "cuda":
                yield f"plan.embeddings cpu saves {gib(static.embeddings)}"
    lean = chooser.evaluate(chooser.sizes()[-1], chooser.least())
    if lean.peak_bytes < choice.peak_bytes - least:
        yield (
            f"plan.preset lean saves {gib(choice.peak_bytes - lean.peak_bytes)}, "
            f"{lean.step_seconds / choice.step_seconds:.2f} times the step time"
        )
    if longest := longest_that_fits(chooser):
        yield f"examples of up to {longest:,} tokens would fit, one a pass"


def _dense(chooser: Chooser) -> list[tuple[str, int]]:
    return [
        (name, parameter.numel())
        for block in chooser.work.blocks
        for name, parameter in block.named_parameters()
        if parameter.ndim == 2 and "lora_" not in name
    ]


def longest_that_fits(chooser: Chooser) -> int:
    """Return about the longest example that fits alone, to 256 tokens; 0 when none does.

    Bytes grow in a straight line with the tokens, but for the blocks a layer works on: the line is drawn
    through two lengths, and the answer is tried.
    """
    device = sum(i.num_bytes for i in chooser.static.items if i.where == "device")
    room = chooser.target.budget_bytes - chooser.target.reserve_bytes - device

    def need(num: int) -> tuple[int, int]:
        memory = chooser.passes.needs(num, num, chooser.least())
        return memory.peak, sum(memory.away.values())

    def along(a: int, b: int, limit: int) -> int:
        slope = (b - a) / size
        return int(2 * size + (limit - b) / slope) if slope > 0 else 2**20

    size = max(1024, chooser.sizes()[-1])
    (near, near_away), (far, far_away) = need(size), need(2 * size)
    guess = along(near, far, room)
    if chooser.target.device == "cuda" and far_away:
        guess = min(guess, along(near_away, far_away, chooser.target.host_bytes))
    guess = min(guess, 2**20) // 256 * 256
    while guess > 0 and need(guess)[0] > room:
        guess = int(0.9 * guess) // 256 * 256
    return max(0, guess)


def _remedy(
    config: Config, workload: Workload, target: Target, dtype: torch.dtype, chooser: Chooser
) -> str:
    """Find the smallest change with which the run fits, from the least harmful on."""
    steps: list[list[str]] = []
    if config.plan.tokens_per_pass:
        steps.append(["plan.tokens_per_pass=null"])
    if config.plan.policy != "auto":
        steps.append(["plan.policy=auto"])
    if config.train.parameters == "lora":
        if config.plan.embeddings == "device":
            steps += [["plan.embeddings=cpu"]] if target.device == "cuda" else []
            steps.append(["plan.embeddings=8bit"])
        if not config.model.load_in_4bit and config.lora.init != "pissa":
            steps.append(["model.load_in_4bit=true"])
    if config.train.optimizer.startswith("adamw_torch"):
        steps.append(["train.optimizer=adamw_8bit"])
    if len(steps) > 1:
        steps.append([change for step in steps for change in step if "cpu" not in change])
    if target.device == "cpu":
        steps.append(["plan.policy=offload"])
    for changes in steps:
        other = load_config(config, changes)
        found, _ = _chooser(other, workload, target, dtype)
        if found.choose("lean") is not None:
            return "it fits with " + ", ".join(change.replace("=", ": ") for change in changes)
    longest = longest_that_fits(chooser)
    if longest >= 64:
        return f"it fits with model.max_length: {longest}"
    need = chooser.evaluate(chooser.sizes()[-1], chooser.least()).peak_bytes
    return f"it needs a device with {gib(need / 0.9)}, or a smaller model"


def gib(num_bytes: float) -> str:
    """Write an amount of memory."""
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:.0f} KiB"
    return (
        f"{num_bytes / GIB:.2f} GiB" if num_bytes >= 0.1 * GIB else f"{num_bytes / 2**20:.0f} MiB"
    )
