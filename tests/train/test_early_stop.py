"""Held-out loss during training: stopping in time, the best checkpoint, and both after a resume."""

import os
import signal

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from whet.config_file import load_config
from whet.errors import InputError, Interrupted
from whet.train.callbacks import HeldOutWatch
from whet.train.listen import LogListener
from whet.train.recipe import fit
from whet.train.trainer import WhetTrainer

pytestmark = pytest.mark.usefixtures("quick")
LOSSES = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.0, 10: 1.0}  # the best is after step 4 until step 10


class Heard(LogListener):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def lines(run):
    return [
        (row["step"], row.get("loss"), row.get("heldout_loss"))
        for row in run.metrics()
        if "loss" in row or "heldout_loss" in row
    ]


@pytest.fixture
def watched(config, monkeypatch):
    """A run that measures every two steps, and finds what LOSSES says."""

    def evaluate(self, *_, **__):
        metrics = {"eval_loss": LOSSES[self.state.global_step]}
        self.log(metrics)
        return metrics

    monkeypatch.setattr(WhetTrainer, "evaluate", evaluate)
    return load_config(
        config,
        ["train.max_steps=10", "eval.steps=2", "eval.exact_match=false", "eval.samples=0",
         "train.checkpoint_steps=3", "plan.probe=off"],
    )  # fmt: skip


def test_training_stops_when_patience_runs_out(watched):
    heard = Heard()
    run = fit(load_config(watched, ["eval.patience=2"]), listener=heard)
    training = run.report["training"]
    assert training["steps"] == training["saved_step"] == 8 and training["stopped_early"]
    assert (training["best_step"], training["best_heldout_loss"]) == (4, 2.0)
    assert [row["step"] for row in run.metrics() if "heldout_loss" in row] == [2, 4, 6, 8]
    assert any("2 measurements in a row without a better" in note for note in heard.notes)
    assert run.weights_dir is not None and "tuned" in run.report["evaluation"]


def test_without_patience_the_run_goes_to_its_end(watched):
    run = fit(watched, listener=Heard())
    training = run.report["training"]
    assert training["steps"] == training["best_step"] == 10 and not training["stopped_early"]


def test_the_best_weights_are_kept_and_saved(watched):
    config = load_config(
        watched, ["eval.patience=2", "eval.keep_best=true", "train.keep_checkpoints=1"]
    )
    heard = Heard()
    run = fit(config, listener=heard)
    assert [path.name for path in run.checkpoints()] == ["step-4", "step-8"]
    best, last, saved = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (*run.checkpoints(), run.adapter_dir)
    )
    assert all(saved[name].equal(tensor) for name, tensor in best.items())
    assert any(not saved[name].equal(tensor) for name, tensor in last.items())
    assert run.report["training"]["saved_step"] == 4
    assert any("the weights of step 4 are saved" in note for note in heard.notes)


def test_a_best_checkpoint_that_is_damaged_leaves_the_last_weights(watched):
    config = load_config(watched, ["eval.patience=2", "eval.keep_best=true"])

    class Damage(TrainerCallback):
        def on_train_end(self, args, *_, **__):
            open(os.path.join(args.output_dir, "step-4", "optimizer.pt"), "w").close()

    heard = Heard()
    run = fit(config, listener=heard, callbacks=[Damage()])
    assert run.report["training"]["saved_step"] == 8
    assert any(
        "the last weights are saved" in note and "optimizer.pt" in note for note in heard.notes
    )


@pytest.mark.parametrize("stop_at", [3, 6])
def test_a_resumed_run_stops_where_the_whole_one_does(watched, stop_at):
    settings = ["eval.patience=2", "eval.keep_best=true", "train.schedule=constant"]
    config = load_config(watched, settings)
    whole = fit(load_config(config, ["run.name=whole"]), listener=Heard())

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, *_, **__):
            if state.global_step == stop_at - 1:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        fit(config, listener=Heard(), callbacks=[Stop()])
    resumed = fit(config, resume=True, listener=Heard())
    assert lines(resumed) == lines(whole)
    assert resumed.report["training"] == whole.report["training"]
    assert resumed.report["evaluation"] == whole.report["evaluation"]


def test_a_stopped_run_goes_on_only_with_more_patience(watched):
    config = load_config(watched, ["eval.patience=2", "eval.keep_best=true"])
    run = fit(config, listener=Heard())
    before, report = lines(run), run.report["training"]
    again = fit(config, resume=True, listener=Heard())
    assert lines(again) == before and again.report["training"] == report
    more = fit(load_config(config, ["eval.patience=3"]), resume=True, listener=Heard())
    assert more.report["training"]["steps"] == more.report["training"]["best_step"] == 10


def test_a_loss_that_is_no_number_is_never_the_best():
    from transformers import TrainerControl, TrainerState

    watch, control = HeldOutWatch(2, keep=True), TrainerControl()
    for step, loss in enumerate([float("nan"), 2.0, float("nan"), float("nan")], start=1):
        watch.on_evaluate(None, TrainerState(global_step=step), control, {"eval_loss": loss})
    assert (watch.best_step, watch.best_loss) == (2, 2.0) and watch.stopped
    kept = HeldOutWatch(None, keep=True)
    kept.load(watch.to_dict())
    assert kept.kept_step == 2 and not kept.stopped


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["eval.patience=2"], "set eval.steps"),
        (["eval.keep_best=true"], "set eval.steps"),
        (["eval.steps=2", "data.heldout_fraction=0"], "set data.heldout"),
        (["train.parameters=full", "train.lora_plus_ratio=2"], "lora_plus_ratio is for adapters"),
    ],
    ids=str,
)
def test_settings_that_cannot_both_hold_are_told(config, settings, words):
    with pytest.raises(InputError, match=words):
        load_config(config, settings)
