"""One run, top to bottom: read, check, load, measure, train, save, measure again.

Whatever can be wrong with the input is found before the run folder is touched. The front ends hand
in a Listener and show what it hears; this module prints nothing.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import TrainerCallback

from whet.config import Config
from whet.data.gates import check_gates, require_method
from whet.data.pairs import with_units
from whet.data.prepare import PreparedData, prepare
from whet.data.template import set_chat_template
from whet.engine.embeddings import place_embeddings
from whet.engine.swap import detach, met, set_policies, takes_packed
from whet.engine.verify import compare_pass
from whet.errors import Interrupted, WhetError
from whet.evaluate import Sample, evaluate
from whet.model import CausalLM, Tokenizer
from whet.model.load import (
    attach_engine,
    choose_dtype,
    device,
    load_model,
    load_tokenizer,
    max_length,
    require_weights,
)
from whet.model.lora import check_parameters, count_parameters, prepare_parameters
from whet.runs import RunFolder, require_free, resume_run, start_run
from whet.sections import PREFERENCES, WITH_TRL
from whet.train.callbacks import Metrics, StopAtSignal, peak_memory_bytes
from whet.train.checkpoints import (
    keep_pissa_start,
    load_before_spreading,
    newest_whole,
    save_weights,
    settle,
)
from whet.train.launch import as_launched, goes_on_after_a_restart
from whet.train.listen import Listener, LogListener
from whet.train.optimizer_kinds import check_optimizer
from whet.train.planning import choose_graphs, ease, plan_run, probe_run, tell_event
from whet.train.plot import plot_loss
from whet.train.preference import trainer_of
from whet.train.randoms import seed_share
from whet.train.results import BaseFirst, Training, write_evaluation, write_samples
from whet.train.shards import Shards
from whet.train.steps import StepSettings
from whet.train.strategy import (
    check_strategy,
    join_world,
    loading_options,
    reason_without_engine,
    shards_of,
    spread,
)
from whet.train.trackers import check_trackers, tracking
from whet.train.world import World

TOLD_SECONDS = 5  # between two lines on how far reading the data is


def fit(
    config: Config,
    resume: bool = False,
    listener: Listener | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> RunFolder:
    """Train as a config says.

    Args:
        config: A checked config.
        resume: Go on with the run of that name from its newest checkpoint.
        listener: Hears what happens; None logs it.
        callbacks: Callbacks of transformers' Trainer, called after whet's own.

    Returns:
        The folder of the finished run.

    Raises:
        InputError: The config, the data or the model's name is wrong; nothing was touched.
        Interrupted: The user stopped the run; a checkpoint was written.
        WhetError: The work failed, for instance because the disk is full.
    """
    listener = listener or LogListener()
    started = time.perf_counter()
    config = as_launched(config)
    world = join_world(config)
    listener.stage("reading the data")
    with world.first():  # what it unpacks and tokenises is in the cache for the others
        limit = max_length(config.model)
        require_weights(config.model)
        check_parameters(config)
        check_trackers(config.train.trackers)
        for line in [*check_optimizer(config), *check_strategy(config, world)]:
            listener.note(line)
        tokenizer = load_tokenizer(config.model)
        template = set_chat_template(tokenizer, config.model.chat_template)
        data = prepare(config.data, tokenizer, limit, template, _tell_rows(listener))
    _tell_data(data, listener)
    check_gates(data.report, config.data.allow)
    require_method(config.method, data.report)
    if config.method in WITH_TRL:
        from whet.train.with_trl import fit_with_trl

        return fit_with_trl(config, data, tokenizer, resume, listener, callbacks)
    if config.method in PREFERENCES:
        data, left_out = with_units(data, config.preference.share_prompts)
        if left_out:
            listener.note(
                f"{left_out} answers are left out: their pair has one that teaches nothing"
            )
    asked = config
    plan, config = plan_run(config, data, limit, listener, world)
    shards = shards_of(config, world)
    run, checkpoint = _open_run(asked, data, resume, listener, world)
    with run.lock():
        _write_report_head(run, asked, data, world, config.parallel.strategy)
        if data.refused is not None and run.writes:
            shutil.copyfile(data.refused, run.path / "refused.jsonl")
        model = _load(config, listener, shards, world)
        base_samples: list[Sample] = []
        if shards is None:
            base_samples = _measure_base(run, config, model, tokenizer, data, listener, world)
        training = Training(run, config, tokenizer, data, plan, world, shards)
        model = _train(training, model, checkpoint, listener, callbacks)
        if data.heldout and (world.is_first or shards is not None):
            listener.stage("measuring the tuned model")
            tuned, samples = evaluate(model, tokenizer, data, config.eval)
            write_evaluation(run, tuned=tuned, tuned_samples=samples)
            if run.writes:
                write_samples(run, base_samples or training.base_samples, samples)
                plot_loss(run)
        world.agree(None)
        peak = max(run.report.get("peak_bytes", 0), *world.gather(peak_memory_bytes()))
        run.update_report(seconds=time.perf_counter() - started, peak_bytes=peak)
    return run


def _open_run(
    config: Config, data: PreparedData, resume: bool, listener: Listener, world: World
) -> tuple[RunFolder, Path | None]:
    """Make or open the run's folder in rank 0; the others read there and write nothing."""
    checkpoint, path = None, Path()
    if world.is_first:
        if resume or goes_on_after_a_restart(config):
            run, checkpoint = resume_run(
                config, data.report.sha256, partial(newest_whole, tell=listener.note)
            )
            listener.note(f"going on from {checkpoint}")
        else:
            run, moved = start_run(config)
            if moved:
                listener.note(f"the earlier run '{run.path}' is now '{moved}'")
        path = run.path
    path, checkpoint = world.agree((path, checkpoint))
    return RunFolder(path, writes=world.is_first), checkpoint


def _tell_rows(listener: Listener) -> Callable[[int], None]:
    """Return what tells, every few seconds, how many examples are tokenised."""
    started = told = time.perf_counter()

    def tell(examples: int) -> None:
        nonlocal told
        now = time.perf_counter()
        if now - told >= TOLD_SECONDS:
            told = now
            rate = examples / (now - started)
            listener.stage(f"reading the data: {examples:,} examples, {rate:,.0f} a second")

    return tell


def _tell_data(data: PreparedData, listener: Listener) -> None:
    train, heldout = data.report.train, data.report.heldout
    share = train.tokens_learned / max(1, train.tokens)
    listener.note(
        f"{train.examples} examples ({', '.join(train.formats)}), {train.tokens:,} tokens, {share:.0%} "
        f"of them learned, the longest example {train.longest}"
        + (f"; {heldout.examples} held out" if heldout else "")
    )
    if data.report.chat_template != "the tokenizer's own":
        listener.note(f"chat template: {data.report.chat_template}")
    for warning in data.report.warnings():
        listener.note(warning)
    if heldout is None:
        listener.note("nothing is held out (data.heldout, data.heldout_fraction): no evaluation")


def _load(config: Config, listener: Listener, shards: Shards | None, world: World) -> CausalLM:
    dtype, reason = choose_dtype(config.model.dtype, config.train.parameters != "lora")
    kind = "NF4 weights, products in" if config.model.load_in_4bit else "weights in"
    if config.model.init == "random":
        kind = f"random weights (seed {config.train.seed}) in"
    listener.stage(f"loading {config.model.name}")
    options = loading_options(shards, world)
    model = load_model(config.model, dtype, options=options, seed=config.train.seed)
    name = str(dtype).removeprefix("torch.")
    listener.note(f"{config.model.name} on {device().type}, {kind} {name} {reason}")
    return model


def _measure_base(
    run: RunFolder,
    config: Config,
    model: CausalLM,
    tokenizer: Tokenizer,
    data: PreparedData,
    listener: Listener,
    world: World,
) -> list[Sample]:
    """Measure the model before training, unless an interrupted run already has."""
    if not data.heldout or not (world.is_first or world.tensor > 1):
        return []
    report = run.report
    if "base" in report.get("evaluation", {}):
        return [Sample(**sample) for sample in report["evaluation"]["base_samples"]]
    attach_engine(model, config)
    listener.stage("measuring the base model")
    scores, samples = evaluate(model, tokenizer, data, config.eval)
    write_evaluation(run, base=scores, base_samples=samples)
    return samples


def _train(
    training: Training,
    model: CausalLM,
    checkpoint: Path | None,
    listener: Listener,
    callbacks: Sequence[TrainerCallback],
) -> CausalLM:
    run, config, tokenizer = training.run, training.config, training.tokenizer
    data, plan, world, shards = training.data, training.plan, training.world, training.shards
    from transformers import set_seed

    set_seed(config.train.seed)
    tuned = prepare_parameters(model, config)
    trainable, total = count_parameters(tuned)
    listener.note(f"training {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
    if config.plan.embeddings != "device":
        for line in place_embeddings(tuned, config.plan.embeddings):
            listener.note(line)
    _put_engine(run, config, tuned, data, listener, shards)
    set_policies(tuned, plan.choice.policies)
    if shards is not None:
        if checkpoint is not None:
            load_before_spreading(tuned, checkpoint)
        tuned = spread(tuned, shards, config, world)
    # Weights and two AdamW moments, each in float32 at most, in every checkpoint and one more aside.
    num_bytes = 12 * trainable * (config.train.keep_checkpoints + 1 + config.eval.keep_best)
    require_free(run.path, num_bytes, "keeping the checkpoints")
    metrics, stop = Metrics(run, listener.progress, plan, world), StopAtSignal()
    packs = config.pack.enabled and takes_packed(tuned)
    graphs = choose_graphs(config, tuned, plan, packs, listener, world)
    buckets = config.pack.buckets == "on" or (config.pack.buckets == "auto" and graphs is not None)
    with TemporaryDirectory() as start:
        if config.lora.init == "pissa" and config.train.parameters == "lora":
            keep_pissa_start(tuned, start)
        trainer = trainer_of(config.method)(
            tuned,
            tokenizer,
            config,
            run,
            data.train,
            data.judged or data.heldout,
            [
                metrics,
                stop,
                *callbacks,
                *([] if shards is None else [BaseFirst(training, listener)]),
            ],
            StepSettings(
                replace(plan.packing, padded=not packs, buckets=buckets),
                plan.flops_of,
                partial(ease, tuned, plan),
                partial(tell_event, metrics, listener),
                checkpoints=any("recompute" in (p.qkv, p.gate_up) for p in plan.choice.policies),
                graphs=graphs,
                world=world,
                shards=shards,
            ),
        )
        metrics.trainer, trainer.stop = trainer, stop
        if checkpoint is None and shards is None:
            probe_run(run, config, tuned, data, plan, trainer, metrics, listener)
        listener.stage("training")
        if checkpoint is None:
            seed_share(trainer, 0)
        elif run.writes:
            run.forget_metrics_after(int(checkpoint.name.removeprefix("step-")))
        trackers = config.train.trackers if run.writes else []
        heard = trainer.callback_handler.callbacks
        tracks = tracking(run, trackers, heard, listener.note)
        with stop.listening(listener.note), tracks:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        done, steps = trainer.state.global_step, trainer.state.max_steps
        if done < steps and not trainer.watch.stopped:
            raise Interrupted(
                f"stopped after step {done} of {steps}, with a checkpoint in {run.checkpoints_dir}",
                fix="go on with the same command and --resume",
            )
        ended = settle(trainer, listener.note)
        if data.judged and (world.is_first or shards is not None):
            run.update_report(preference=trainer.evaluate())
        save_weights(run, config, trainer, tokenizer, start)
    while_training = peak_memory_bytes()
    run.update_report(
        peak_bytes=max(metrics.peak_before, while_training),
        training_peak_bytes=while_training,
        training={
            "steps": done, "tokens_seen": trainer.tokens_seen,
            "parameters_trained": trainable, "parameters": total, **ended,
        }
    )  # fmt: skip
    if config.engine.enabled and run.writes:
        run.update_report(engine={**run.report["engine"], "met": met(tuned)})
    if run.writes:
        plot_loss(run)
    return tuned


def _put_engine(
    run: RunFolder,
    config: Config,
    model: CausalLM,
    data: PreparedData,
    listener: Listener,
    shards: Shards | None,
) -> None:
    """Put the engine into the model as it will be trained, and compare one real pass."""
    import torch

    if reason := reason_without_engine(shards):
        if config.engine.enabled:
            listener.note(f"engine: stands aside, because {reason}")
            run.update_report(engine={"stands_aside": reason})
        return
    report = attach_engine(model, config)
    if report is None:
        listener.note("engine: off (engine.enabled)")
        return
    notes, apart = report.lines(), ""
    if config.engine.check != "off":
        shortest = data.train[int(data.train.lengths.argmin())]
        ids, labels = (
            torch.tensor([values], device=model.device)
            for values in (shortest.input_ids, shortest.labels)
        )
        model.train()
        apart = compare_pass(model, ids, labels)
    if apart:
        detach(model)
        notes = [f"engine: taken out again, because {apart}"]
        if config.engine.strict:
            raise WhetError(f"engine.strict is set, and the engine differs: {apart}")
    else:
        # What a training pass met, and a look at the structure could not see: adapters with dropout.
        found = met(model).get("fallbacks", [])
        notes += [f"not fused while training, {why}" for why in found if why not in report.kept]
    for line in notes:
        listener.note(line)
    run.update_report(engine={**report.to_dict(), "taken_out": apart})


def _write_report_head(
    run: RunFolder, config: Config, data: PreparedData, world: World, strategy: str
) -> None:
    from whet.doctor import versions

    run.update_report(
        config=config.model_dump(), versions=versions(), device=device().type,
        data=data.report.to_dict(), processes=world.size,
        strategy=strategy if world.size > 1 else "none",
    )  # fmt: skip
