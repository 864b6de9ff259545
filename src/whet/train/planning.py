"""The plan of a run: made before anything is loaded, probed before training, followed in it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from whet.config import Config
from whet.data.prepare import PreparedData
from whet.data.store import count_labels, lengths_of
from whet.engine.graphs import LAUNCH_SECONDS, CudaRecorder, GraphedPasses, reason_against
from whet.engine.swap import current_policies, set_policies, takes_packed
from whet.model import CausalLM
from whet.model.load import choose_dtype, device
from whet.plan.plan import Plan, gib, make_plan, require_fit, workload_of
from whet.plan.policy import Target, describe
from whet.plan.probe import corrected, largest_pass, may_matter, probe
from whet.plan.target import target_of
from whet.runs import RunFolder
from whet.sections import PREFERENCES
from whet.train.callbacks import Metrics
from whet.train.listen import Listener
from whet.train.optimizer_kinds import kind_of
from whet.train.strategy import faults
from whet.train.trainer import WhetTrainer
from whet.train.world import World


def plan_run(
    config: Config, data: PreparedData, limit: int, listener: Listener, world: World
) -> tuple[Plan, str]:
    """Plan the memory of a process, before anything is loaded or written.

    Args:
        config: The run's config.
        data: The prepared rows.
        limit: Longest example the config allows.
        listener: Hears the plan.
        world: The processes.

    Returns:
        The plan, and the strategy: what `auto` comes to, or none for one process.
    """
    listener.stage("planning the memory")
    dtype, _ = choose_dtype(config.model.dtype, config.train.parameters != "lora")
    lengths = lengths_of(data.train).tolist()
    workload = workload_of(config, lengths, count_labels(data.train), limit)
    # A process plans for its part of a step, and all plan for the one with the least memory.
    workload = replace(
        workload,
        batch_size=-(-workload.batch_size // world.shares),
        batch_tokens=workload.batch_tokens and -(-workload.batch_tokens // world.shares),
    )
    target = target_of(device().type, config.plan.memory, dtype)
    least = min(world.gather(_budget(target, config, world)))
    target = replace(world.agree(target), budget_bytes=least)
    strategy, num = config.parallel.strategy, world.size
    if num == 1:
        strategy = "none"
    spread = 1 if strategy in ("none", "auto", "ddp") else num
    plan = make_plan(config, workload, target, dtype, advise=False, spread=spread)
    if strategy == "auto":
        strategy, why = "ddp", "the whole model fits into each process"
        if not plan.fits and not list(faults(config, "fsdp")):
            other = make_plan(config, workload, target, dtype, advise=False, spread=num)
            if other.fits:
                plan, strategy = other, "fsdp"
                why = f"the whole model does not fit into a process, and a part in {num} does"
        listener.note(f"{num} processes, strategy {strategy}: {why}")
    elif num > 1:
        listener.note(f"{num} processes, strategy {strategy}")
    require_fit(plan)
    _tell_plan(plan, listener)
    return plan, strategy


def _budget(target: Target, config: Config, world: World) -> int:
    """Return the memory of one process; those of one machine share its RAM."""
    if target.device == "cpu" and config.plan.memory is None:
        return target.budget_bytes // world.local_size
    return target.budget_bytes


def _tell_plan(plan: Plan, listener: Listener) -> None:
    choice = plan.choice
    ways = ", ".join(f"{kind} {way}" for kind, way in describe(choice.policies).items())
    listener.note(
        f"{gib(choice.peak_bytes)} of {gib(plan.target.budget_bytes)} at the peak, "
        f"{choice.passes_per_step:.1f} passes a step of up to {choice.tokens_per_pass:,} tokens; {ways}"
    )
    if not plan.fits:
        listener.note(f"this is more than should be used: {plan.changes[0]}")


def probe_run(
    run: RunFolder,
    config: Config,
    model: CausalLM,
    data: PreparedData,
    plan: Plan,
    trainer: WhetTrainer,
    metrics: Metrics,
    listener: Listener,
) -> None:
    """Run the longest pass once, correct the plan, and write both down."""
    report = {"plan": plan.to_dict()}
    steps_in_backward = kind_of(config.train.optimizer).in_backward
    wish = config.plan.probe
    if not steps_in_backward and (wish == "on" or (wish == "auto" and may_matter(plan))):
        listener.stage("trying the longest pass")
        model.train()
        rows = largest_pass(plan, data.train)
        found = trainer.try_passes(rows, partial(probe, model, plan))
        if None in trainer.world.gather(found and found.tokens):
            least = min(trainer.world.gather(trainer.packing.tokens_per_pass))
            trainer.packing = replace(trainer.packing, tokens_per_pass=least)
        elif found is not None:
            better = corrected(plan, found)
            sizes = trainer.world.gather(better.choice.tokens_per_pass)
            better = replace(better, choice=replace(better.choice, tokens_per_pass=min(sizes)))
            listener.note(
                f"{found.tokens:,} tokens: {gib(found.measured_bytes)} for the pass, "
                f"{gib(found.estimated_bytes)} were estimated"
            )
            if better.choice.tokens_per_pass != plan.choice.tokens_per_pass:
                _tell_plan(better, listener)
            report = {"plan": better.to_dict(), "plan_before_probe": plan.to_dict()}
            report["plan"]["probe"] = found.to_dict()
            _use(model, trainer, better)
            metrics.plan = better
    run.update_report(**report)


def _use(model: CausalLM, trainer: WhetTrainer, plan: Plan) -> None:
    """Train by a plan from now on."""
    set_policies(model, plan.choice.policies)
    smaller = min(trainer.packing.tokens_per_pass, plan.choice.tokens_per_pass)
    trainer.packing = replace(trainer.packing, tokens_per_pass=smaller)


def ease(model: CausalLM, plan: Plan) -> str | None:
    """Let the layers keep the least there is; say how, or None when they do already."""
    least = plan.chooser.least()
    if not takes_packed(model) or current_policies(model) == least:
        return None
    set_policies(model, least)
    return ", ".join(f"{kind} {way}" for kind, way in describe(least).items())


def tell_event(metrics: Metrics, listener: Listener, event: dict[str, Any], text: str) -> None:
    """Write an event to metrics.jsonl and say it."""
    metrics.write(event)
    listener.note(text)


def choose_graphs(
    config: Config, model: CausalLM, plan: Plan, packs: bool, listener: Listener, world: World
) -> GraphedPasses | None:
    """Choose whether passes are recorded as CUDA graphs; where they cannot be, that is said."""
    wish, on_cuda = config.engine.cuda_graphs, device().type == "cuda"
    if wish == "off" or (wish == "auto" and not (on_cuda and _waits_for_launches(plan))):
        return None
    reason = "there is no CUDA device" if not on_cuda else reason_against(model)
    if not packs:
        reason = reason or "passes are padded rectangles"
    if world.size > 1:
        reason = reason or "several processes share the work, and their reductions are not recorded"
    if config.method in PREFERENCES:
        reason = reason or "whole answers are compared, and their passes do not repeat"
    if reason:
        listener.note(f"no CUDA graphs: {reason}")
        return None
    listener.note("passes are recorded as CUDA graphs (engine.cuda_graphs)")
    return GraphedPasses(
        model, CudaRecorder(device()), lambda why: listener.note(f"no CUDA graphs: {why}")
    )


def _waits_for_launches(plan: Plan) -> bool:
    """Estimate whether a layer's kernels are done before the next layer's are launched."""
    num, lengths = plan.choice.tokens_per_pass, plan.workload.lengths
    documents = max(1, num * len(lengths) // sum(lengths))
    flops, _ = plan.flops_of([num // documents] * documents, 0)
    layers, speed = len(plan.choice.policies), plan.target.speed
    # Half of a step's operations are the forward pass where all weights are frozen, else a third.
    return flops / 2 / layers / (speed.flops * speed.efficiency) < LAUNCH_SECONDS
