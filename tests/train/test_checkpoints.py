"""Checkpoints are whole or refused, and a run that is killed ends with the numbers it would have had."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal

import pytest
from transformers import TrainerCallback

from whet.config_file import load_config, to_yaml
from whet.data.store import TokenStore
from whet.errors import InputError
from whet.plan import target
from whet.runs import RunFolder
from whet.train import checkpoints, recipe
from whet.train.checkpoints import fault_of, newest_whole, write_manifest
from whet.train.listen import LogListener
from whet.train.recipe import fit

pytestmark = pytest.mark.usefixtures("quick")


class Heard(LogListener):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def losses(run):
    return {row["step"]: row["loss"] for row in run.metrics() if "loss" in row}


@pytest.fixture
def short(config):
    return load_config(
        config, ["train.max_steps=8", "data.heldout_fraction=0", "plan.probe=off"]
    )  # checkpoints after steps 4 and 8


def test_a_checkpoint_has_weights_states_and_a_manifest_of_all_of_it(short):
    run = fit(short, listener=Heard())
    folder = run.checkpoints()[-1]
    files = {file.name for file in folder.iterdir()}
    assert {
        "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
        "trainer_state.json", "whet_state.json", "manifest.json",
    } <= files  # fmt: skip
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == files - {"manifest.json"} and manifest["step"] == 8
    state = json.loads((folder / "whet_state.json").read_text())
    assert state["sampler"]["step"] == 8 % 6 and state["sampler"]["epoch"] == 1
    assert state["tokens_per_pass"] == run.report["plan"]["tokens_per_pass"]
    assert fault_of(folder) == ""


def cut(folder):
    with open(folder / "optimizer.pt", "r+b") as file:
        file.truncate(100)


def edit(folder):
    file = folder / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "cut": (cut, r"optimizer\.pt has 100 bytes and had"),
    "edited": (edit, r"adapter_model\.safetensors is not what was written"),
    "removed": (lambda f: (f / "scheduler.pt").unlink(), r"scheduler\.pt is missing"),
    "added": (lambda f: (f / "pytorch_model.bin").touch(), r"pytorch_model\.bin was added"),
    "manifest removed": (lambda f: (f / "manifest.json").unlink(), r"manifest\.json is missing"),
    "manifest cut": (lambda f: (f / "manifest.json").write_text("{"), "not readable"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(short, kind):
    whole = fit(short, listener=Heard())
    before = losses(whole)
    first, last = whole.checkpoints()
    damage, words = DAMAGE[kind]
    damage(last)
    heard = Heard()
    if kind != "edited":  # one kind goes all the way
        assert newest_whole(whole.checkpoints(), heard.note) == first
    else:
        shutil.rmtree(whole.weights_dir)
        resumed = fit(short, resume=True, listener=heard)
        assert losses(resumed) == before
        assert [fault_of(path) for path in resumed.checkpoints()] == ["", ""]
        assert any(f"going on from {first}" in note for note in heard.notes)
    (note,) = [note for note in heard.notes if "is damaged:" in note]
    assert str(last) in note and re.search(words, note)


def test_when_every_checkpoint_is_damaged_nothing_is_touched(short):
    run = fit(short, listener=Heard())
    for folder in run.checkpoints():
        cut(folder)
    before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    with pytest.raises(InputError, match=r"step-8' is damaged: optimizer(.|\n)*step-4' is damaged"):
        fit(load_config(short, ["train.log_steps=2"]), resume=True, listener=Heard())
    assert {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()} == before


def test_a_renamed_checkpoint_is_refused(short, tmp_path):
    run = fit(load_config(short, ["train.max_steps=4"]), listener=Heard())
    other = run.checkpoints()[-1].rename(run.checkpoints_dir / "step-6")
    assert fault_of(other) == "it was written after step 4"


def test_rows_in_another_order_end_the_resume(short):
    run = fit(load_config(short, ["train.max_steps=4"]), listener=Heard())
    folder = run.checkpoints()[-1]
    state = json.loads((folder / "whet_state.json").read_text())
    state["sampler"]["order_sha256"] = "0" * 64  # as another torch would have drawn it
    (folder / "whet_state.json").write_text(json.dumps(state))
    (folder / "manifest.json").unlink()
    write_manifest(folder, 4)
    with pytest.raises(InputError, match="another order of the rows"):
        fit(short, resume=True, listener=Heard())


def test_a_resumed_run_reads_only_the_rows_it_has_not_seen(short, monkeypatch):
    """Step 5 of 8: the sampler starts there; rows of the steps before are not read to be skipped."""
    fit(load_config(short, ["train.max_steps=4"]), listener=Heard())
    short = load_config(short, ["train.schedule=constant"])
    run = RunFolder(short.run.dir + "/tiny")
    (run.config_file).write_text(to_yaml(load_config(short, ["train.max_steps=4"])))
    read, tokens = [], TokenStore.tokens

    class Reading(TrainerCallback):
        def on_train_begin(self, *_, **__):
            def counted(store, number):
                read.append(number)
                return tokens(store, number)

            monkeypatch.setattr(TokenStore, "tokens", counted)

        def on_train_end(self, *_, **__):
            monkeypatch.setattr(TokenStore, "tokens", tokens)

    fit(short, resume=True, listener=Heard(), callbacks=[Reading()])
    # 22 rows, 4 a step, 6 steps an epoch: the rest of the first epoch, 2 steps of the second, and the
    # batch that the loader has ready beyond the end.
    assert len(read) == (22 - 16) + 2 * 4 + 4


def test_the_best_checkpoint_and_later_ones_are_not_dropped(tmp_path):
    run = RunFolder(tmp_path)
    for step in (2, 4, 6, 8, 10):
        (run.checkpoints_dir / f"step-{step}").mkdir(parents=True)
    checkpoints._drop_old(run, 8, keep=1, best=4)  # step 10 was refused when the run was resumed
    assert [path.name for path in run.checkpoints()] == ["step-4", "step-8", "step-10"]


class Die(TrainerCallback):
    """Kills its own process at a moment of the n-th step of this life."""

    def __init__(self, moment, after):
        self.moment, self.after, self.steps = moment, after, 0

    def now(self, moment):
        if moment == self.moment and self.steps >= self.after:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_begin(self, *_, **__):
        self.steps += 1
        self.now("before the step")

    def on_pre_optimizer_step(self, *_, **__):
        self.now("between backward and optimizer")

    def on_step_end(self, *_, **__):
        self.now("after the step")

    def on_log(self, *_, **__):
        self.now("after the line of metrics.jsonl")


def live(file, moment, after, speed):
    """One life of a run: from its newest checkpoint until it is killed, or to its end."""
    recipe.plot_loss, target.measure_speed = (lambda run: None), (lambda *_: speed)  # as in `quick`
    config = load_config(file)
    resume = bool(RunFolder(os.path.join(config.run.dir, config.run.name)).checkpoints())
    die, manifest = Die(moment, after), checkpoints.write_manifest

    def write(*args):
        die.now("while a checkpoint is written")
        manifest(*args)

    checkpoints.write_manifest = write
    fit(config, resume=resume, listener=Heard(), callbacks=[die])


MOMENTS = (
    "before the step", "between backward and optimizer", "after the step",
    "after the line of metrics.jsonl", "while a checkpoint is written",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "settings"),
    [
        (1, ["plan.tokens_per_pass=70", "eval.steps=3", "eval.keep_best=true"]),
        (2, ["data.streaming=true", "train.parameters=full", "train.learning_rate=1e-3",
             "train.batch_tokens=90"]),
    ],
    ids=["packing, adapter with dropout", "streaming from the cache, all weights"],
)  # fmt: skip
def test_a_run_that_is_killed_five_times_has_the_losses_it_would_have_had(
    config, tmp_path, machine_speed, seed, settings
):
    """kill -9 at random steps and moments, ten times in both cases together."""
    config = load_config(config, ["train.checkpoint_steps=2", "eval.exact_match=false", *settings])
    whole = fit(load_config(config, ["run.name=whole"]), listener=Heard())
    file = tmp_path / "c.yaml"
    file.write_text(to_yaml(config))
    # A server that has imported everything forks a process for each life: imports take seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["whet.train.recipe", "peft", "bitsandbytes", __name__])
    draw, kills = random.Random(seed), 0
    moments = draw.sample(MOMENTS, len(MOMENTS))
    while True:
        moment = moments[kills] if kills < len(moments) else ""
        process = context.Process(
            target=live, args=(str(file), moment, draw.randint(1, 3), machine_speed)
        )
        process.start()
        process.join(300)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills == len(MOMENTS)
    run = RunFolder(whole.path.with_name("tiny"))
    assert losses(run) == losses(whole) and len(losses(run)) >= 12
    assert run.report["training"] == whole.report["training"]
    assert run.report["evaluation"] == whole.report["evaluation"]
    assert not list(run.path.rglob("*.tmp"))
