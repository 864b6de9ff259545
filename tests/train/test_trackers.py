"""Trackers are told what metrics.jsonl is told, and write into the run's folder."""

import importlib.util
import sys
import types

import pytest

from whet.config_file import load_config
from whet.errors import InputError, WhetError
from whet.train.listen import LogListener
from whet.train.recipe import fit
from whet.train.trackers import check_trackers

pytestmark = pytest.mark.usefixtures("quick")


class Quiet(LogListener):
    def note(self, text):
        pass


def losses(run):
    return {row["step"]: row["loss"] for row in run.metrics() if "loss" in row}


@pytest.fixture
def short(config):
    return load_config(
        config,
        ["train.max_steps=4", "eval.steps=2", "eval.exact_match=false", "eval.samples=0",
         "plan.probe=off"],
    )  # fmt: skip


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "mlflow"])
def test_a_missing_tracker_is_named_with_the_extra_that_brings_it(short, monkeypatch, name):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda package, *_: None if package == name else found(package)
    )
    with pytest.raises(InputError, match=rf"pip install 'whet\[{name}\]'"):
        fit(load_config(short, [f"train.trackers=[{name}]"]), listener=Quiet())


def test_no_tracker_needs_no_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    check_trackers([])


def test_tensorboard_is_written_in_the_runs_folder(short):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = fit(load_config(short, ["train.trackers=[tensorboard]"]), listener=Quiet())
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    told = {event.step: event.value for event in events.Scalars("train/loss")}
    assert told == pytest.approx(losses(run)) and len(told) == 4
    assert [event.step for event in events.Scalars("eval/loss")] == [2, 4]


def test_wandb_offline_is_written_in_the_runs_folder(short, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = fit(load_config(short, ["train.trackers=[wandb]"]), listener=Quiet())
    (folder,) = (run.path / "wandb").glob("offline-run-*")
    assert list(folder.glob("run-*.wandb")) and len(losses(run)) == 4
    assert wandb.run is None, "the next run of this process gets one of its own"


def stand_in_trackio(told):
    class Config(dict):
        def update(self, values, allow_val_change=False):
            super().update(values)

    variable = types.SimpleNamespace(get=lambda: None)
    made = types.ModuleType("trackio")
    made.__version__, made.config = "0.0", Config()
    made.context_vars = types.SimpleNamespace(current_space_id=variable, current_project=variable)
    made.init = lambda **settings: told.append(("init", settings))
    made.log = lambda values: told.append(("log", values))
    made.finish = lambda: told.append(("finish", None))
    return made


def test_trackio_is_told_every_step_under_the_runs_name(short, monkeypatch):
    """A stand-in for the package, which would start a database and a web app's libraries."""
    told = []
    made = stand_in_trackio(told)
    made.__spec__ = importlib.util.spec_from_loader("trackio", loader=None)
    monkeypatch.setitem(sys.modules, "trackio", made)
    run = fit(load_config(short, ["train.trackers=[trackio]"]), listener=Quiet())
    (start,) = [values for kind, values in told if kind == "init"]
    assert start["name"] == "tiny" and start["project"] == "whet"
    logged = [values for kind, values in told if kind == "log"]
    assert {v["train/global_step"]: v["train/loss"] for v in logged if "train/loss" in v} == losses(
        run
    )
    assert told[-1][0] == "finish"


def stand_in_mlflow(told):
    limits = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=250, MAX_PARAMS_TAGS_PER_BATCH=100)
    made = types.ModuleType("mlflow")
    made.__version__ = "2.9.0"
    made.utils = types.SimpleNamespace(validation=limits)
    made.is_tracking_uri_set, made.get_tracking_uri = (lambda: True), (lambda: "stand-in")
    made.active_run = lambda: None
    made.log_params = lambda *_, **__: None
    made.log_metrics = lambda metrics, step, synchronous: told.append((step, metrics))
    active = types.SimpleNamespace(info=types.SimpleNamespace(run_id="1"))

    def start_run(run_name, nested):
        told.append(("start", run_name))
        made.active_run = lambda: active

    def end_run():
        told.append(("end", None))
        made.active_run = lambda: None

    made.start_run, made.end_run = start_run, end_run
    return made


def test_mlflow_is_told_every_step_under_the_runs_name(short, monkeypatch):
    """A stand-in for the package, which is a hundred others."""
    told = []
    made = stand_in_mlflow(told)
    made.__spec__ = importlib.util.spec_from_loader("mlflow", loader=None)
    monkeypatch.setitem(sys.modules, "mlflow", made)
    run = fit(load_config(short, ["train.trackers=[mlflow]"]), listener=Quiet())
    assert told[0] == ("start", "tiny") and told[-1] == ("end", None)
    assert {step: m["loss"] for step, m in told[1:-1] if "loss" in m} == losses(run)


@pytest.mark.parametrize("when", ["start", "step 3"])
def test_a_tracker_that_fails_ends_a_run_only_before_it_begins(short, monkeypatch, when):
    told, notes = [], []
    made = stand_in_mlflow(told)
    made.__spec__ = importlib.util.spec_from_loader("mlflow", loader=None)

    def refuse(*_, **more):
        if when == "start" or more.get("step") == 3:
            raise ConnectionError("the server is gone\nand a second line")

    setattr(made, "start_run" if when == "start" else "log_metrics", refuse)
    monkeypatch.setitem(sys.modules, "mlflow", made)
    listener = Quiet()
    listener.note = notes.append
    config = load_config(short, ["train.trackers=[mlflow]"])
    if when == "start":
        with pytest.raises(
            WhetError, match="tracker 'mlflow' cannot be started: the server is gone"
        ):
            fit(config, listener=listener)
        return
    run = fit(config, listener=listener)
    assert len(losses(run)) == 4, "the run went on, and metrics.jsonl is complete"
    (said,) = [note for note in notes if "mlflow" in note]
    assert "failed and is told nothing more" in said and said.endswith("the server is gone")
