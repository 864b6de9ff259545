"""What `whet plan` does: read what of the data can be read, and plan, on this machine or for a card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from whet.config import Config, parse_bytes
from whet.data.gates import check_gates
from whet.data.prepare import prepare
from whet.data.sources import find_sources
from whet.data.store import count_labels, lengths_of
from whet.data.template import set_chat_template
from whet.errors import InputError
from whet.model.load import choose_dtype, load_tokenizer, max_length
from whet.model.load import device as here
from whet.plan.parallel import (
    Checkpoint,
    RankPlan,
    checkpoint_of,
    largest_that_fits,
    parse_strategy,
    plan_strategy,
    ranks_of,
    simplest_of,
    strategies,
)
from whet.plan.plan import Plan, make_plan, workload_of
from whet.plan.policy import Workload
from whet.plan.target import SHARE, free_host_bytes, target_of
from whet.plan.traffic import Cluster


@dataclass(frozen=True)
class RanksPlan:
    """What `whet plan --ranks` shows.

    Args:
        plans: A rank's plan for each strategy, the simplest first.
        simplest: The first that fits and that whet can start.
        reason: Why that one, or why none.
        largest: Parameters of the deepest model of these layers that fits, for each plan.
        checkpoint: What a checkpoint comes to.
        cluster: The machines.
        notes: What a person should know.
    """

    plans: tuple[RankPlan, ...]
    simplest: RankPlan | None
    reason: str
    largest: tuple[int, ...]
    checkpoint: Checkpoint
    cluster: Cluster
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it for `--json`."""
        return {
            "cluster": asdict(self.cluster),
            "strategies": [
                {**plan.to_dict(), "largest_parameters": num}
                for plan, num in zip(self.plans, self.largest, strict=True)
            ],
            "simplest": self.simplest and self.simplest.name,
            "reason": self.reason,
            "checkpoint": asdict(self.checkpoint),
            "notes": list(self.notes),
        }


CALCULATED = "calculated, not measured: nothing here has been held against several GPUs"


def plan_ranks(
    config: Config, num_ranks: int, num_nodes: int = 1, strategy: Sequence[str] = (),
    device: str | None = None, memory: str | None = None, host_memory: str | None = None,
) -> RanksPlan:  # fmt: skip
    """Plan each of several processes, for each strategy.

    Args:
        config: A checked config; `train.batch_size` is that of all processes together.
        num_ranks: Processes.
        num_nodes: Machines.
        strategy: Only these; empty: all that are worth a look.
        device: As for `plan_config`, of one process.
        memory: As for `plan_config`, of one process.
        host_memory: Of one machine; None takes what is free in this one.

    Raises:
        InputError: The model, the card, an amount or a strategy is not known.
    """
    try:
        host = parse_bytes(host_memory) if host_memory else int(SHARE * free_host_bytes())
    except ValueError as error:
        raise InputError(f"--host-memory: {error}") from error
    cluster = Cluster(num_ranks, num_nodes, host_bytes=host)
    plan, workload = _plan(config, device, memory, num_ranks, cluster.ranks_per_node)
    ranks = ranks_of(config, plan, cluster, workload)
    wished = [parse_strategy(text, ranks) for text in strategy] or strategies(ranks)
    plans = tuple(plan_strategy(ranks, one) for one in wished)
    simplest, reason = simplest_of(ranks, plans)
    notes = [CALCULATED, *plan.notes]
    if workload.batch_tokens is None and workload.batch_size < num_ranks:
        notes.append(
            f"a step has {workload.batch_size} examples for {num_ranks} ranks: raise train.batch_size"
        )
    return RanksPlan(
        plans, simplest, reason,
        tuple(0 if one.why_not else largest_that_fits(ranks, one.strategy) for one in plans),
        checkpoint_of(ranks), cluster, tuple(notes),
    )  # fmt: skip


def plan_config(config: Config, device: str | None = None, memory: str | None = None) -> Plan:
    """Plan a config without loading a weight.

    Args:
        config: A checked config.
        device: `cpu`, `cuda` or a card's name; None is this machine's own, or a card with `memory`.
        memory: Memory to plan for, such as 12GB; None takes `plan.memory`, or 90% of what is free.

    Raises:
        InputError: The model, the card or the amount is not known.
    """
    return _plan(config, device, memory)[0]


def _plan(
    config: Config, device: str | None, memory: str | None, shares: int = 1, neighbours: int = 1
) -> tuple[Plan, Workload]:
    """Plan one process, with its share of a step; return the workload of all of them too."""
    limit = max_length(config.model)
    dtype, _ = choose_dtype(config.model.dtype, config.train.parameters != "lora")
    lengths, num_labels, why = _read_lengths(config, limit)
    workload = workload_of(config, lengths, num_labels, limit)
    memory_of_one = memory or config.plan.memory
    target = target_of(device, memory_of_one, dtype, named=memory is not None)
    if memory_of_one is None:
        target = target.shared_by(neighbours)
    if target.device == "cuda" != here().type and not config.model.dtype:
        # The card is not here to be asked; what is sold today computes bfloat16.
        dtype = torch.bfloat16 if config.train.parameters == "lora" else torch.float32
    part = replace(
        workload,
        batch_size=-(-workload.batch_size // shares),
        batch_tokens=workload.batch_tokens and -(-workload.batch_tokens // shares),
    )
    plan = make_plan(config, part, target, dtype, advise=shares == 1)
    return replace(plan, notes=(*plan.notes, *([why] if why else []))), workload


def _read_lengths(config: Config, limit: int) -> tuple[list[int] | None, int, str]:
    """Return the examples' lengths, the labels among them, and why they could not be read."""
    if config.data.train in ("", []):
        return None, 0, "data.train names no file"
    sources = find_sources(config.data.train, config.data.weights)
    try:
        tokenizer = load_tokenizer(config.model)
    except InputError:
        return None, 0, f"'{config.model.name}' has no tokenizer here to measure the data with"
    template = set_chat_template(tokenizer, config.model.chat_template)
    try:
        data = prepare(config.data, tokenizer, limit, template)
        check_gates(data.report, config.data.allow)
    except InputError as error:
        if all(source.hub is None for source in sources):
            raise
        return None, 0, f"the data is not here: {error}"  # a Hub id, without a network
    return (
        lengths_of(data.train).tolist(),
        count_labels(data.train),
        "",
    )
