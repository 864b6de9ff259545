"""The plan of a run: made before anything is loaded, probed before training, followed in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from whet.config import Config
from whet.config_file import load_config
from whet.data.prepare import PreparedData
from whet.data.store import count_labels, lengths_of
from whet.engine.graphs import LAUNCH_SECONDS, CudaRecorder, GraphedPasses, reason_against
from whet.engine.swap import current_policies, set_policies, takes_packed
from whet.model import CausalLM
from whet.model.load import choose_dtype, device
from whet.plan.parallel import plan_of_rank, ranks_of
from whet.plan.pieces import Strategy
from whet.plan.plan import Plan, gib, make_plan, require_fit, workload_of
from whet.plan.policy import describe
from whet.plan.probe import corrected, largest_pass, may_matter, probe
from whet.plan.target import SHARE, free_host_bytes, target_of
from whet.plan.traffic import Cluster
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
) -> tuple[Plan, Config]:
    """Plan the memory of a process, before anything is loaded or written.

    Args:
        config: The run's config.
        data: The prepared rows.
        limit: Longest example the config allows.
        listener: Hears the plan.
        world: The processes.

    Returns:
        The plan, and the config with the strategy that `auto` comes to.

    Raises:
        InputError: The strategy cannot be used.
        WhetError: Nothing fits.
    """
    listener.stage("planning the memory")
    dtype, _ = choose_dtype(config.model.dtype, config.train.parameters != "lora")
    lengths = lengths_of(data.train).tolist()
    workload = workload_of(config, lengths, count_labels(data.train), limit)
    target = target_of(device().type, config.plan.memory, dtype)
    if config.plan.memory is None:
        target = target.shared_by(world.local_size)
    # All plan for the process with the least memory.
    least = min(world.gather(target.budget_bytes))
    target = replace(world.agree(target), budget_bytes=least)
    # A process plans for its part of a step.
    part = replace(
        workload,
        batch_size=-(-workload.batch_size // world.shares),
        batch_tokens=workload.batch_tokens and -(-workload.batch_tokens // world.shares),
    )
    plan = make_plan(config, part, target, dtype, advise=False)
    if world.size > 1:
        nodes = max(1, world.size // world.local_size)
        host = min(world.gather(int(SHARE * free_host_bytes())))
        cluster = Cluster(world.size, nodes, host_bytes=host)
        ranks = ranks_of(config, plan, cluster, workload)
        strategy, plan, why = plan_of_rank(ranks, list(_candidates(config, world)))
        settings = strategy.settings(world.size) or {}
        config = load_config(config, [f"{key}={value}" for key, value in settings.items()])
        listener.note(f"{world.size} processes, strategy {strategy.name(world.size)}: {why}")
    require_fit(plan)
    _tell_plan(plan, listener)
    return plan, config


def _candidates(config: Config, world: World) -> Iterator[Strategy]:
    """Yield the strategies that the config allows, the simplest first.

    What `auto` may take is what needs no other way to join the processes: FSDP2 spreads all that ZeRO 3
    does.
    """
    parallel = config.parallel
    wished = parallel.strategy
    on_cuda = device().type == "cuda"
    if wished == "tp":
        yield Strategy("ddp", tensor=world.size)
    elif wished == "deepspeed":
        kind = "zero3" if parallel.zero_stage == 3 else "zero2"
        yield Strategy(kind, parallel.offload and on_cuda)
    elif wished == "fsdp":
        yield Strategy("fsdp", parallel.offload and on_cuda)
    else:
        yield Strategy("ddp")
        if wished == "auto" and not list(faults(config, "fsdp")):
            yield Strategy("fsdp")
            if on_cuda:
                yield Strategy("fsdp", offload=True)


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
    if config.train.neftune_alpha is not None:
        reason = reason or "embeddings get noise, and a recorded pass would repeat it"
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
