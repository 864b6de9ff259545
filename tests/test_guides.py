"""The examples that guides show train, in small; so do configs of other trainers, once translated."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from whet.cli import app
from whet.config_file import load_config
from whet.train.recipe import fit

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
THEIRS = sorted(f for f in (EXAMPLES / "convert").iterdir() if f.name != "dataset_info.json")
SMALL = [
    "model.max_length=240", "data.max_rows=16", "data.cache=false", "data.workers=1", "train.max_steps=4",
    "train.warmup_steps=1", "train.checkpoint_steps=2", "train.trackers=[]", "eval.max_rows=4",
    "eval.exact_match=false", "eval.samples=0", "engine.check=off", "plan.probe=off",
]  # fmt: skip


@pytest.fixture
def small(tiny_model, tmp_path):
    return [f"run.dir={tmp_path}", f"model.name={tiny_model}", *SMALL]


def test_evaluate_measures_on_the_way_and_keeps_the_best(small):
    run = fit(load_config(EXAMPLES / "evaluate.yaml", [*small, "eval.steps=2"]))
    measured = [row["step"] for row in run.metrics() if "heldout_loss" in row]
    assert measured == [2, 4], "every eval.steps"
    assert run.report["evaluation"]["tuned"]["perplexity"] > 1


def test_grpo_samples_and_is_judged(small):
    pytest.importorskip("trl")
    wanted = [*small, "train.max_steps=2", "grpo.max_new_tokens=4", "grpo.num_generations=2"]
    run = fit(load_config(EXAMPLES / "grpo.yaml", wanted))
    assert run.report["reward"]["num_answers"] > 0


@pytest.mark.parametrize("theirs", THEIRS, ids=lambda file: file.name)
def test_a_translated_config_is_planned_and_trains(theirs, small, tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)  # where its paths begin
    ours = tmp_path / "ours.yaml"
    told = CliRunner().invoke(app, ["init", str(ours), "--from", str(theirs)])
    assert told.exit_code == 0 and "does not know" not in told.output, told.output
    changes = [part for change in small for part in ("--set", change)]
    told = CliRunner().invoke(app, ["data", str(ours), "--json", *changes])
    assert told.exit_code == 0 and json.loads(told.stdout)["train"]["tokens_learned"], told.output
    run = fit(load_config(ours, [*small, "eval.steps=null"]))
    assert run.report["plan"]["fits"] and len(run.metrics()) >= 4


def test_there_is_one_of_each_trainer():
    assert [file.name for file in THEIRS] == ["axolotl.yml", "llamafactory.yaml", "unsloth.yaml"]
