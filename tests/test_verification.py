"""`whet verify`: what it says of a good engine, of a broken one, and of parts that are not fused."""

import json

import pytest
from typer.testing import CliRunner

from whet.cli import app
from whet.config_file import load_config
from whet.engine import mlp_half
from whet.train.recipe import LogListener, fit

FLOAT32 = ["--set", "model.dtype=float32"]


def verify(*arguments):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def read(result):
    return json.loads(result.stdout[result.stdout.index("{") :])


@pytest.mark.parametrize("more", [[], ["--set", "model.load_in_4bit=true"]], ids=["dense", "nf4"])
def test_a_model_passes_and_every_layer_is_fused(tiny_model, more):
    # 64 wide: bitsandbytes' own code for the CPU needs rows of whole blocks.
    targets = ["--set", "lora.targets=[q_proj, v_proj]"]
    result = verify(tiny_model, *FLOAT32, *targets, *more, "--json")
    found = read(result)
    kept = [part for part in found["parts"] if part["verdict"] == "kept"]
    assert result.exit_code == 0 and found["passed"]
    assert found["layers_total"] == 2
    if not more:
        assert found["layers_fused"] == 2 and not kept
    assert {"name", "error", "bound", "verdict", "reason"} <= found["parts"][0].keys()
    names = " ".join(part["name"] for part in found["parts"])
    for part in ("attention", "head", "whole model: loss", "documents of a pack", "q_proj.lora_A"):
        assert part in names


def test_the_table_names_the_parts_and_ends_with_the_verdict(tiny_model):
    result = verify(tiny_model, *FLOAT32, "--set", "train.parameters=full")
    assert result.exit_code == 0
    assert "2 of 2 layers fused, all parts pass" in result.stdout
    assert "gradients: self_attn.q_proj" in result.stdout


def test_rows_of_a_file_can_be_used(tiny_model, rows_file):
    assert verify(tiny_model, *FLOAT32, "--data", rows_file).exit_code == 0


def test_a_missing_file_is_told_before_anything_is_loaded(tiny_model):
    result = verify(tiny_model, "--data", "nofile.jsonl")
    assert "nofile.jsonl" in str(result.exception) and "loading" not in result.output


def test_a_run_is_verified_with_its_own_adapter(config):
    run = fit(load_config(config, ["train.max_steps=2", "lora.dropout=0"]), listener=LogListener())
    result = verify(run.path)
    assert result.exit_code == 0
    assert "all parts pass" in result.stdout


def test_a_broken_kernel_exits_1_and_is_named(tiny_model, monkeypatch):
    right = mlp_half.glu_forward
    monkeypatch.setattr(mlp_half, "glu_forward", lambda *args: right(*args).neg_())
    result = verify(tiny_model, *FLOAT32, "--json")
    found = read(result)
    failed = [part for part in found["parts"] if part["verdict"] == "fail"]
    assert result.exit_code == 1 and not found["passed"]
    assert found["layers_fused"] == 0
    assert any("mlp" in part["name"] and "differs" in part["reason"] for part in failed)


def test_strict_is_an_error_when_a_part_is_not_fused(tiny_model):
    arguments = [*FLOAT32, "--set", "lora.dora=true", "--set", "engine.strict=true"]
    result = verify(tiny_model, *arguments)
    assert result.exit_code != 0
    assert "engine.strict" in str(result.exception)


def test_a_run_reports_what_the_engine_did(config):
    told = []
    listener = LogListener()
    listener.note = told.append
    run = fit(load_config(config, ["train.max_steps=2"]), listener=listener)
    engine = run.report["engine"]
    assert any(note.startswith("not fused while training") and "dropout" in note for note in told)
    assert engine["layers_total"] == 2
    assert engine["taken_out"] == ""
    # The fixture's adapter has a dropout, with which the layers keep their own code while training.
    assert any("dropout" in reason for reason in engine["met"]["fallbacks"])


def test_the_engine_can_be_left_out(config):
    off = fit(
        load_config(config, ["engine.enabled=false", "lora.dropout=0"]), listener=LogListener()
    )
    on = fit(load_config(config, ["run.name=in", "lora.dropout=0"]), listener=LogListener())
    assert "engine" not in off.report
    assert on.report["engine"]["layers_fused"] == 2
    losses = [
        [json.loads(line)["loss"] for line in (run.path / "metrics.jsonl").read_text().splitlines()
         if '"loss"' in line]
        for run in (off, on)
    ]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for part in ("base", "tuned"):
        pair = [run.report["evaluation"][part]["loss"] for run in (off, on)]
        assert pair[1] == pytest.approx(pair[0], rel=1e-4)


def test_recomputing_gives_the_same_losses_as_keeping(config):
    runs = [
        fit(load_config(config, [f"run.name=r{on}", "lora.dropout=0", "train.max_steps=4",
                                 f"plan.policy={on}"]), listener=LogListener())
        for on in ("recompute", "keep")
    ]  # fmt: skip
    losses = [
        [json.loads(line)["loss"] for line in (run.path / "metrics.jsonl").read_text().splitlines()
         if '"loss"' in line]
        for run in runs
    ]  # fmt: skip
    assert losses[0] == losses[1]
