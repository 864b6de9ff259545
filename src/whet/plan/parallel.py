"""Memory and time of each rank, for each way in which several processes can share a run.

Pure calculation on top of a plan for one process: its passes, its policies and its loss without logits
are those of the engine, and the rest is cut as a strategy cuts it (pieces.py) and sent (traffic.py).
Nothing here has been held against several GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from whet.config import Config
from whet.errors import InputError
from whet.plan.memory import Item, PassModel, state_bytes
from whet.plan.pieces import Pieces, Strategy, pieces_of, rank_static
from whet.plan.plan import Plan, gib
from whet.plan.policy import Choice, Chooser, Target, Workload, describe
from whet.plan.reshaped import DeepPasses, TensorPasses, deeper_work
from whet.plan.speed import Work
from whet.plan.traffic import Cluster, Transfer, exposed_seconds, transfers

# Optimizers that step each number by itself, so that pieces of a tensor are as good as all of it.
PIECEWISE = ("adamw_torch", "adamw_torch_fused", "sgd")
KINDS = ("ddp", "fsdp", "zero2", "zero3")


@dataclass(frozen=True)
class Ranks:
    """A run that several processes share.

    Args:
        config: Its config.
        plan: Its plan for one process.
        workload: The examples, with steps of all processes together.
        cluster: The machines.
        pieces: The model's parameters.
        passes: The model's passes.
        work: The model's operations.
    """

    config: Config
    plan: Plan
    workload: Workload
    cluster: Cluster
    pieces: Pieces
    passes: PassModel
    work: Work

    def deepened(self, num_layers: int) -> Ranks:
        """Return the same run of a model with more layers like the last one, or with fewer."""
        return replace(
            self,
            pieces=self.pieces.deepened(num_layers),
            passes=DeepPasses(self.passes, num_layers),
            work=deeper_work(self.work, num_layers),
        )

    @property
    def target(self) -> Target:
        """What one rank may use; ranks with GPUs share the RAM that is offloaded to."""
        target, cluster = self.plan.target, self.cluster
        if cluster.num_ranks == 1 or target.device == "cpu":
            return target
        return replace(target, host_bytes=cluster.host_bytes // cluster.ranks_per_node)

    def chooser(self, strategy: Strategy) -> Chooser:
        """Return what answers for the passes of one rank."""
        replicas = self.cluster.num_ranks // strategy.tensor
        one = self.plan.chooser
        static = rank_static(
            self.pieces, strategy, replicas, self.config.train.optimizer,
            self.config.plan.embeddings, self.target.device,
        )  # fmt: skip
        load = self.workload
        load = replace(
            load,
            batch_size=-(-load.batch_size // replicas),
            batch_tokens=load.batch_tokens and -(-load.batch_tokens // replicas),
        )
        passes, target, packing = self.passes, self.target, one.packing
        if strategy.tensor > 1:
            # The engine multiplies by whole matrices and stands aside: transformers' layers, padded.
            passes = TensorPasses(passes, self.pieces, strategy.tensor)
            speed = replace(target.speed, flops=target.speed.flops * strategy.tensor)
            target, packing = replace(target, speed=speed), replace(packing, padded=True)
        return Chooser(passes, static, self.work, load, target, packing, one.policy)


@dataclass(frozen=True)
class RankPlan:
    """What one rank needs and does under a strategy.

    Args:
        strategy: How the run is shared.
        name: What a person calls it.
        cluster: The machines.
        choice: How its passes are run.
        fits: Whether it stays within the memory of the device and of the machine.
        target: The device.
        sent: What it sends in a step.
        exposed_seconds: Of its communication, what computing does not hide.
        why_not: Why the strategy cannot be used, or nothing.
        host_bytes: Memory of one machine that its ranks take.
    """

    strategy: Strategy
    name: str
    cluster: Cluster
    choice: Choice
    fits: bool
    target: Target
    sent: tuple[Transfer, ...]
    exposed_seconds: float
    why_not: str
    host_bytes: int

    @property
    def items(self) -> list[Item]:
        """Every item of a rank's memory."""
        context = "CUDA context" if self.target.device == "cuda" else "Python and libraries"
        own = self.target.reserve_bytes
        reserve = [Item(context, own)] if own else []
        return [*self.choice.static.items, *self.choice.memory.items, *reserve]

    @property
    def sent_bytes(self) -> float:
        """Bytes that a rank sends in a step."""
        return sum(transfer.num_bytes for transfer in self.sent)

    @property
    def communication_seconds(self) -> float:
        """Seconds of a step's communication, hidden or not."""
        return sum(transfer.seconds(self.cluster) for transfer in self.sent)

    @property
    def step_seconds(self) -> float:
        """Seconds of a step: computing, and the communication that it does not hide."""
        return self.choice.step_seconds + self.exposed_seconds

    def to_dict(self) -> dict[str, Any]:
        """Return the plan for `--json`."""
        return {
            "strategy": self.name,
            "settings": self.strategy.settings(self.cluster.num_ranks),
            "fits": self.fits,
            "why_not": self.why_not or None,
            "peak_bytes": self.choice.peak_bytes,
            "budget_bytes": self.target.budget_bytes,
            "host_bytes_of_a_node": self.host_bytes,
            "tokens_per_pass": self.choice.tokens_per_pass,
            "passes_per_step": self.choice.passes_per_step,
            "policy": describe(self.choice.policies),
            "items": [{"name": i.name, "bytes": i.num_bytes, "where": i.where} for i in self.items],
            "sent": {t.name: t.num_bytes for t in self.sent},
            "sent_bytes": self.sent_bytes,
            "compute_seconds": self.choice.step_seconds,
            "communication_seconds": self.communication_seconds,
            "exposed_seconds": self.exposed_seconds,
            "step_seconds": self.step_seconds,
        }


def ranks_of(
    config: Config, plan: Plan, cluster: Cluster, workload: Workload | None = None
) -> Ranks:
    """Describe a run that several processes share.

    Args:
        config: Its config.
        plan: Its plan for one process.
        cluster: The machines.
        workload: The examples, with steps of all processes together, where the plan is for a part.

    Raises:
        InputError: The processes cannot be shared out evenly over the machines.
    """
    if cluster.num_ranks % cluster.num_nodes:
        raise InputError(
            f"{cluster.num_ranks} ranks cannot be spread evenly over {cluster.num_nodes} nodes",
            fix="let --ranks be a multiple of --nodes",
        )
    chooser = plan.chooser
    pieces = pieces_of(chooser.passes.shaped)
    load = workload or plan.workload
    return Ranks(config, plan, load, cluster, pieces, chooser.passes, chooser.work)


def strategies(ranks: Ranks) -> list[Strategy]:
    """List the strategies that are worth a look, the simplest first."""
    cluster = ranks.cluster
    if cluster.num_ranks == 1:
        return [Strategy("ddp")]
    found = [Strategy(kind) for kind in KINDS]
    if ranks.target.device == "cuda":
        found += [Strategy(kind, offload=True) for kind in KINDS[1:]]
    width = next(
        (
            width
            for width in range(cluster.ranks_per_node, 1, -1)
            if cluster.ranks_per_node % width == 0 and ranks.pieces.heads % width == 0
        ),
        1,
    )
    if width > 1 and ranks.pieces.splits:
        found.append(Strategy("ddp", tensor=width))
        if width < cluster.num_ranks:
            found.append(Strategy("fsdp", tensor=width))
    return found


def parse_strategy(text: str, ranks: Ranks) -> Strategy:
    """Read a strategy as a person writes it: `fsdp`, `zero3+offload`, `tp8`, `tp8xfsdp`.

    Raises:
        InputError: There is none of that name.
    """
    words = text.lower().replace(" ", "").replace("deepspeed", "zero2")
    first, _, second = words.partition("x")
    tensor, kind = 1, words
    if first.startswith("tp") and (first[2:].isdigit() or first == "tp"):
        tensor, kind = int(first[2:] or ranks.cluster.num_ranks), second or "ddp"
    kind, _, more = kind.partition("+")
    if kind not in KINDS or more not in ("", "offload") or (kind == "ddp" and more) or tensor < 1:
        raise InputError(
            f"there is no strategy '{text}'",
            fix=f"use {', '.join(KINDS)}, tpN or tpNxfsdp; +offload goes with all but ddp and tp",
        )
    return Strategy(kind, more == "offload", tensor)  # pyright: ignore[reportArgumentType]


def why_not(ranks: Ranks, strategy: Strategy) -> str:
    """Say why a strategy cannot be used, or nothing."""
    config, pieces = ranks.config, ranks.pieces
    if ranks.cluster.num_ranks % strategy.tensor:
        return f"{ranks.cluster.num_ranks} ranks are not a multiple of {strategy.tensor}"
    if strategy.tensor > 1:
        if not pieces.splits:
            return "transformers has no tensor-parallel plan for this model"
        if pieces.heads % strategy.tensor:
            return f"{pieces.heads} key and value heads cannot be cut in {strategy.tensor}"
    if strategy.kind == "ddp" and strategy.tensor == 1:
        return ""
    if strategy.offload and ranks.target.device == "cpu":
        return "on a CPU there is no other memory to offload to"
    if strategy.tensor > 1 and config.train.parameters == "lora":
        return "tensor parallel cuts matrices, and adapters stand beside whole ones"
    if config.model.load_in_4bit and (strategy.tensor > 1 or strategy.kind != "fsdp"):
        return "4-bit weights go with ddp and fsdp only"
    if config.train.optimizer not in PIECEWISE:
        return f"{config.train.optimizer} needs whole tensors; it takes {', '.join(PIECEWISE)}"
    if config.plan.embeddings != "device":
        return f"plan.embeddings {config.plan.embeddings} is for ddp only"
    return ""


def plan_strategy(ranks: Ranks, strategy: Strategy) -> RankPlan:
    """Plan one rank under a strategy; where nothing fits, the way that needs the least."""
    cluster, plan = ranks.cluster, ranks.config.plan
    reason = why_not(ranks, strategy)
    if reason.endswith(f"multiple of {strategy.tensor}") or "cannot be cut" in reason:
        raise InputError(f"strategy '{strategy.name(cluster.num_ranks)}': {reason}")
    chooser = ranks.chooser(strategy)
    choice = chooser.choose(plan.preset, plan.tokens_per_pass)
    fits = choice is not None
    if choice is None:
        choice = chooser.evaluate(plan.tokens_per_pass or chooser.sizes()[-1], chooser.least())
    tokens = sum(map(sum, chooser.steps)) / len(chooser.steps)
    passes = choice.passes_per_step
    labels = tokens * chooser.workload.label_share
    sent = transfers(ranks.pieces, strategy, cluster.num_ranks, passes, tokens, labels)
    exposed = exposed_seconds(sent, strategy, cluster, choice.step_seconds, passes)
    items = [*choice.static.items, *choice.memory.items]
    host = cluster.ranks_per_node * sum(i.num_bytes for i in items if i.where == "host")
    return RankPlan(
        strategy, strategy.name(cluster.num_ranks), cluster, choice,
        fits and not reason and host <= cluster.host_bytes, ranks.target, tuple(sent), exposed, reason,
        host,
    )  # fmt: skip


def simplest_of(ranks: Ranks, plans: Sequence[RankPlan]) -> tuple[RankPlan | None, str]:
    """Return the first plan that fits and that whet can start, with the reason in a sentence.

    Args:
        ranks: The run.
        plans: From the simplest on.
    """
    tried: list[str] = []
    budget = gib(ranks.target.budget_bytes)
    for plan in plans:
        if plan.why_not or plan.strategy.settings(ranks.cluster.num_ranks) is None:
            continue
        need = gib(plan.choice.peak_bytes)
        if plan.fits:
            passed = "".join(f", {text}" for text in tried)
            return plan, f"{plan.name} needs {need} of {budget} a rank{passed}"
        in_device = plan.choice.peak_bytes <= plan.target.budget_bytes
        what = f"{gib(plan.host_bytes)} of host memory a machine" if in_device else need
        tried.append(f"{plan.name} would need {what}")
    return None, f"nothing fits into {budget} a rank: {', '.join(tried)}"


def plan_of_rank(ranks: Ranks, candidates: Sequence[Strategy]) -> tuple[Strategy, Plan, str]:
    """Plan one process of a run under the simplest strategy that fits.

    Args:
        ranks: The run.
        candidates: What may be used, the simplest first; the last is planned for where none fits.

    Returns:
        The strategy, the plan, and why that one.

    Raises:
        InputError: None of them can be used.
    """
    plans = [plan_strategy(ranks, strategy) for strategy in candidates]
    found, reason = simplest_of(ranks, plans)
    usable = [plan for plan in plans if not plan.why_not]
    if not usable:
        raise InputError(f"strategy '{plans[-1].name}' cannot be used: {plans[-1].why_not}")
    last = found or usable[-1]
    chooser = ranks.chooser(last.strategy)
    changes = ranks.plan.changes or ("take more processes, or a strategy that spreads more",)
    plan = replace(
        ranks.plan, choice=last.choice, fits=last.fits, target=ranks.target, workload=chooser.workload,
        static=chooser.static, chooser=chooser, changes=changes,
    )  # fmt: skip
    return last.strategy, plan, reason


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint comes to.

    Args:
        num_bytes: Trained weights and optimizer state, whole; rank 0 holds them before it writes.
        seconds: To write them.
    """

    num_bytes: int
    seconds: float


def checkpoint_of(ranks: Ranks) -> Checkpoint:
    """Return what a checkpoint comes to, whatever the strategy: it is whole on the disk."""
    optimizer = ranks.config.train.optimizer
    trained = ranks.pieces.trained()
    size = sum(n * (p.num_bytes + state_bytes(optimizer, p.like())) for p, n in trained)
    return Checkpoint(size, size / ranks.cluster.disk)


def largest_that_fits(ranks: Ranks, strategy: Strategy, most: int = 2**12) -> int:
    """Return the parameters of the deepest model of these layers that fits; 0 when one layer does not.

    Args:
        ranks: The run; the longest of its examples must fit alone.
        strategy: How it is shared.
        most: Layers at most.
    """

    def fits(num_layers: int) -> bool:
        chooser = ranks.deepened(num_layers).chooser(strategy)
        longest, static = chooser.workload.longest, chooser.static.items
        memory = chooser.passes.needs(longest, longest, chooser.least())
        items = [*static, *memory.items]
        host = ranks.cluster.ranks_per_node * sum(i.num_bytes for i in items if i.where == "host")
        device = sum(i.num_bytes for i in static if i.where == "device")
        peak = ranks.target.reserve_bytes + device + max(memory.peak, chooser.static.step)
        return peak <= ranks.target.budget_bytes and host <= ranks.cluster.host_bytes

    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return ranks.pieces.deepened(low).num_parameters if low else 0
