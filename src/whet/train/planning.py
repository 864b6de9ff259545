"""The plan of a run: made before anything is loaded, probed before training, followed in it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from whet.config import Config
from whet.data.prepare import PreparedData
from whet.data.store import count_labels, lengths_of
from whet.engine.swap import current_policies, set_policies, takes_packed
from whet.model import CausalLM
from whet.model.load import choose_dtype, device
from whet.plan.plan import Plan, gib, make_plan, require_fit, workload_of
from whet.plan.policy import describe
from whet.plan.probe import corrected, largest_pass, may_matter, probe
from whet.plan.target import target_of
from whet.runs import RunFolder
from whet.train.callbacks import Metrics
from whet.train.listen import Listener
from whet.train.optimizer_kinds import kind_of
from whet.train.trainer import WhetTrainer


def plan_run(config: Config, data: PreparedData, limit: int, listener: Listener) -> Plan:
    """Plan the memory, before anything is loaded or written."""
    listener.stage("planning the memory")
    dtype, _ = choose_dtype(config.model.dtype, config.train.parameters != "lora")
    lengths = lengths_of(data.train).tolist()
    workload = workload_of(config, lengths, count_labels(data.train), limit)
    target = target_of(device().type, config.plan.memory, dtype)
    plan = make_plan(config, workload, target, dtype, advise=False)
    require_fit(plan)
    _tell_plan(plan, listener)
    return plan


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
        if found is not None:
            better = corrected(plan, found)
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
