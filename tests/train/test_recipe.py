"""Whole runs of a tiny model: what is learned, written, interrupted and resumed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from whet.config_file import load_config, to_yaml
from whet.errors import InputError, Interrupted, WhetError
from whet.runs import RunFolder
from whet.train.recipe import LogListener, fit
from whet.trained import load_trained


class Heard(LogListener):
    """Remembers what it hears; can act at a step."""

    def __init__(self, at=None):
        self.notes, self.steps, self.at = [], [], at or {}

    def note(self, text):
        self.notes.append(text)

    def progress(self, progress):
        self.steps.append(progress)
        if progress.step in self.at:
            self.at[progress.step]()


def losses(run):
    return {row["step"]: row["loss"] for row in run.metrics() if "loss" in row}


def test_a_run_learns_and_its_folder_tells_everything(config):
    heard = Heard()
    run = fit(config, listener=heard)
    report = run.report
    base, tuned = report["evaluation"]["base"], report["evaluation"]["tuned"]
    assert tuned["perplexity"] < 0.9 * base["perplexity"]
    assert (
        0 <= base["exact_match"] <= 1
        and base["num_answers"] == report["data"]["heldout"]["examples"]
    )
    assert report["versions"]["transformers"] and len(report["data"]["sha256"]) == 64
    assert run.config == config
    steps = losses(run)
    assert list(steps) == list(range(1, report["training"]["steps"] + 1))
    assert [p.step for p in heard.steps] == list(steps)
    assert report["training"]["tokens_seen"] == run.metrics()[-1]["tokens_seen"] > 0
    assert run.plot_file.read_bytes()[:4] == b"\x89PNG"
    text = run.samples_file.read_text()
    assert text.count("**reference**") == base["num_answers"] and "**tuned**" in text
    assert [p.name for p in run.checkpoints()] == [f"step-{n}" for n in (12, max(steps))]
    hidden = {p.name for p in run.path.rglob(".*")}
    assert not hidden, "nothing temporary is left"


@pytest.mark.parametrize(
    "assignments",
    [
        ["model.load_in_4bit=true"],
        ["train.parameters=full", "train.learning_rate=1e-3"],
        ["train.parameters=last_layers", "train.last_layers=1", "train.learning_rate=1e-3"],
        ["lora.init=pissa"],
        ["lora.init=loftq", "model.load_in_4bit=true"],
        ["lora.dora=true"],
        ["lora.bias=all"],
        ["model.dtype=bfloat16"],
        ["plan.policy=recompute"],
        ["plan.policy=offload"],
        ["pack.enabled=false"],
        ["plan.embeddings=cpu"],
        ["plan.embeddings=8bit"],
        ["train.batch_tokens=120"],
        ["eval.steps=3", "train.optimizer=adamw_8bit"],
    ],
    ids=" ".join,
)
def test_every_method_learns_and_loads_again_as_it_was(config, assignments):
    config = load_config(config, ["train.epochs=2", "lora.dropout=0", *assignments])
    run = fit(config, listener=Heard())
    evaluation = run.report["evaluation"]
    assert evaluation["tuned"]["loss"] < evaluation["base"]["loss"]
    from whet.evaluate import compare

    again = compare(load_trained(str(run.path)))
    inexact = "model.dtype=bfloat16" in assignments or "plan.embeddings=8bit" in assignments
    rounding = 2e-2 if inexact else 1e-4
    assert again.tuned.loss == pytest.approx(evaluation["tuned"]["loss"], rel=rounding)
    assert again.base.loss == pytest.approx(evaluation["base"]["loss"], rel=rounding)


def test_passes_do_not_change_the_numbers(config):
    """Passes of a whole step, of two examples or of one: the same losses and norms, to rounding."""
    config = load_config(config, ["lora.dropout=0", "train.max_steps=6"])
    runs = [
        fit(
            load_config(config, [f"plan.tokens_per_pass={n}", f"run.name=r{n}"]),
            listener=Heard(),
        )
        for n in (400, 70, 1)
    ]
    rows = [run.metrics() for run in runs]
    for one, two, four in zip(*rows, strict=True):
        for key in ("loss", "grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=2e-5)
            assert four[key] == pytest.approx(one[key], rel=2e-5)


def test_the_same_seed_gives_the_same_run(config):
    first = losses(fit(config, listener=Heard()))
    assert losses(fit(config, listener=Heard())) == first
    assert losses(fit(load_config(config, ["train.seed=1"]), listener=Heard())) != first


@pytest.mark.parametrize("method", [[], ["lora.init=pissa"], ["train.parameters=full"]], ids=str)
@pytest.mark.parametrize("stop_at", [3, 4, 7])
def test_ctrl_c_keeps_a_checkpoint_and_resume_gives_the_very_same_losses(config, method, stop_at):
    """Stopped inside the first epoch, at a checkpoint, and inside the second; with dropout on."""
    config = load_config(config, ["plan.tokens_per_pass=70", *method])
    whole = fit(load_config(config, ["run.name=whole"]), listener=Heard())
    heard = Heard({stop_at: lambda: os.kill(os.getpid(), signal.SIGINT)})
    with pytest.raises(Interrupted, match="--resume") as stopped:
        fit(config, listener=heard)
    assert stopped.value.exit_code == 130
    path = whole.path.with_name("tiny")
    assert RunFolder(path).checkpoints()[-1].name == f"step-{heard.steps[-1].step}"
    resumed = fit(config, resume=True, listener=Heard())
    assert losses(resumed) == losses(whole)
    assert resumed.report["evaluation"] == whole.report["evaluation"]
    assert resumed.report["training"] == whole.report["training"]


def test_a_killed_run_resumes_with_the_losses_it_would_have_had(config, tmp_path):
    """kill -9 in the middle of a step, from outside."""
    whole = fit(load_config(config, ["run.name=whole"]), listener=Heard())
    file = tmp_path / "c.yaml"
    file.write_text(to_yaml(config))
    run = RunFolder(whole.path.with_name("tiny"))
    process = subprocess.Popen(
        [sys.executable, "-m", "whet", "train", str(file)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not run.checkpoints() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert run.checkpoints() and run.lock_file.exists()
    resumed = fit(config, resume=True, listener=Heard())
    assert losses(resumed) == losses(whole)


def test_a_finished_run_that_is_resumed_only_measures_again(config):
    run = fit(config, listener=Heard())
    before = losses(run)
    heard = Heard()
    again = fit(config, resume=True, listener=heard)
    assert not heard.steps and losses(again) == before


def test_wrong_input_leaves_an_earlier_run_where_it_is(config):
    run = fit(load_config(config, ["train.max_steps=1"]), listener=Heard())
    for wrong in ("data.train=nowhere.jsonl", "model.name=./nowhere", "model.max_length=9999"):
        with pytest.raises(InputError):
            fit(load_config(config, [wrong]), listener=Heard())
    assert run.weights_dir is not None
    assert [p.name for p in run.path.parent.iterdir()] == ["tiny"]


def test_a_loss_that_is_no_number_ends_the_run(config):
    wild = load_config(config, ["train.learning_rate=1e30", "train.parameters=full"])
    with pytest.raises(
        WhetError, match=r"no longer a number at step .* lower train\.learning_rate"
    ):
        fit(wild, listener=Heard())


def test_an_unknown_optimizer_is_named(config):
    with pytest.raises(InputError, match="did you mean 'adamw_torch'"):
        fit(load_config(config, ["train.optimizer=adam_torch"]), listener=Heard())


def test_a_full_disk_ends_the_run_in_one_sentence(config, tmp_path):
    """A limit on the size of files, set by the kernel, stands in for the full disk."""
    file = tmp_path / "c.yaml"
    file.write_text(to_yaml(config))
    code = f"""
import resource, sys
sys.argv = ["whet", "train", {str(file)!r}]
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from whet.cli import main
main()
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.returncode == 1, told.stderr
    assert "Traceback" not in told.stderr
    assert "could not be written" in told.stderr and "--resume" in told.stderr
    run = RunFolder(config.run.dir + "/tiny")
    assert run.checkpoints() == [] and run.weights_dir is None
    assert json.loads(run.report_file.read_text())


def test_too_little_room_is_told_before_training(config, monkeypatch):
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30, 1000))
    heard = Heard()
    with pytest.raises(WhetError, match="keeping the checkpoints needs"):
        fit(config, listener=heard)
    assert not heard.steps


def test_a_run_without_held_out_rows_trains_and_says_so(config):
    config = load_config(config, ["data.heldout_fraction=0", "train.max_steps=2"])
    heard = Heard()
    run = fit(config, listener=heard)
    assert any("nothing is held out" in note for note in heard.notes)
    assert "evaluation" not in run.report and run.weights_dir == run.adapter_dir


def test_plain_text_is_learned_whole(config, tmp_path):
    (tmp_path / "book.txt").write_text("the assistant answers a user. " * 200)
    config = load_config(
        config,
        [f"data.train={tmp_path / 'book.txt'}", "model.max_length=64", "train.max_steps=8",
         "data.heldout_fraction=0", f"data.heldout={tmp_path / 'book.txt'}", "eval.max_rows=4",
         "data.allow=[overlap]"],
    )  # fmt: skip
    run = fit(config, listener=Heard())
    train = run.report["data"]["train"]
    assert train["tokens_learned"] == train["tokens"] - train["examples"]
    assert run.report["evaluation"]["tuned"]["loss"] < run.report["evaluation"]["base"]["loss"]
    assert torch.isfinite(torch.tensor(list(losses(run).values()))).all()
