"""The examples around GPT-2 and transformers' Trainer run without a network, and learn."""

import csv
import runpy
import sys
from pathlib import Path

import datasets
import pytest
import torch
from typer.testing import CliRunner

from whet.cli import app
from whet.config_file import load_config
from whet.model.load import load_model, load_tokenizer
from whet.train.recipe import fit
from whet.trained import load_trained

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
BYTES = EXAMPLES / "models" / "gpt2-bytes"
SHORT = ["train.max_steps=20", "train.batch_tokens=512", "model.max_length=64", "data.max_rows=120"]


@pytest.fixture(scope="module")
def shakespeare(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return fit(load_config(EXAMPLES / "shakespeare.yaml", [f"run.dir={folder}", *SHORT]))


def test_a_gpt2_from_scratch_learns_bytes(shakespeare):
    found = shakespeare.report["evaluation"]
    assert 200 < found["base"]["perplexity"] < 320  # 257 tokens, and nothing known
    assert found["tuned"]["perplexity"] < 0.4 * found["base"]["perplexity"]
    assert shakespeare.report["engine"]["layers_fused"] == 4


def test_the_base_of_a_run_from_scratch_is_made_again_for_comparison(shakespeare):
    loaded = load_trained(str(shakespeare.path))
    with loaded.base() as base:
        again = load_model(
            loaded.config.model, torch.float32, seed=loaded.config.train.seed
        ).state_dict()
        assert all(torch.equal(value, again[name]) for name, value in base.state_dict().items())


def test_the_tuned_model_goes_on_with_a_text(shakespeare):
    words = ["generate", str(shakespeare.path), "--raw", "--echo", "-p", "The engine"]
    result = CliRunner().invoke(app, [*words, "--max-new-tokens", "12"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("The engine")


def test_the_whole_recipe_for_gpt2_trains_a_csv_file_from_random_weights(tmp_path):
    with (tmp_path / "my.csv").open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["number", "review"])
        writer.writerows([n, f"Dish {n % 7} was good, and cost {n} crowns."] for n in range(60))
    config = load_config(
        EXAMPLES / "gpt2-full.yaml",
        [
            f"run.dir={tmp_path}", f"model.name={BYTES}", "model.init=random",
            f"data.train={tmp_path / 'my.csv'}", "data.columns={text: review}",
            "train.learning_rate=3e-3", "train.max_steps=20",
        ],
    )  # fmt: skip
    found = fit(config).report
    assert found["data"]["heldout"]["examples"] == 6
    tuned, base = (found["evaluation"][name]["perplexity"] for name in ("tuned", "base"))
    assert tuned < 0.4 * base


def test_the_committed_tokenizer_is_what_its_script_writes_and_takes_any_text(run_script, tmp_path):
    from whet.sections import ModelSection

    tokenizer = load_tokenizer(ModelSection(name=str(BYTES), init="random"))
    text = "Zażółć gęślą jaźń, 🙂\n\ttabs  and\r\nends"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    assert len(tokenizer) == 257 and tokenizer.eos_token_id == 256
    before = {file.name: file.read_bytes() for file in BYTES.iterdir()}
    code = (EXAMPLES / "models" / "make_gpt2_bytes.py").read_text()
    (tmp_path / "make.py").write_text(code)
    run_script(tmp_path / "make.py")
    for name, content in before.items():
        if name != "tokenizer_config.json":  # it tells the versions of libraries
            assert (tmp_path / "gpt2-bytes" / name).read_bytes() == content, name


@pytest.fixture
def run_script(monkeypatch, capsys, tmp_path):
    """Run a script as its own program would, in this process, and return what it printed."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run(file, *words):
        monkeypatch.setattr(sys, "argv", [str(file), *words])
        try:
            runpy.run_path(str(file), run_name="__main__")
        except SystemExit as end:
            assert not end.code
        return capsys.readouterr().out

    return run


def test_the_plain_script_prints_a_falling_perplexity_and_a_text(run_script, tmp_path):
    printed = run_script(
        EXAMPLES / "gpt2_trainer.py",
        "--steps",
        "20",
        "--block",
        "32",
        "--out",
        str(tmp_path / "run"),
    )
    assert "engine: 4 of 4 layers fused" in printed
    assert "held-out perplexity" in printed and "The engine" in printed
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_the_trainer_example_stops_goes_on_and_predicts(run_script, tiny_model, tmp_path):
    printed = run_script(
        EXAMPLES / "hf_trainer.py", "--model", str(tiny_model), "--rows", "40", "--steps", "8",
        "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert "stopped after step 4" in printed and "logits of shape" in printed
    assert (tmp_path / "run" / "checkpoint-4").is_dir()
