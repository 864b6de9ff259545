"""The demo's whole path on the real model, with few steps: it must not rot between releases."""

import json
from pathlib import Path

import pytest
import torch

from whet.chat import opening
from whet.config_file import load_config
from whet.data.template import render_prompt
from whet.evaluate import compare
from whet.export.exports import check_folder, export_gguf
from whet.export.weights import export_adapter, export_merged
from whet.generate import Sampling, generate
from whet.model.load import load_tokenizer
from whet.train.recipe import LogListener, fit
from whet.trained import load_trained
from whet.verification import verify_loaded

QUICKSTART = Path(__file__).resolve().parents[1] / "examples" / "quickstart.yaml"

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = load_config(
        QUICKSTART,
        [
            f"run.dir={tmp_path_factory.mktemp('runs')}",
            "train.max_steps=8",
            "train.learning_rate=1e-3",
            "train.warmup_steps=2",
            "eval.max_rows=4",
        ],
    )
    return fit(config, listener=LogListener())


def test_eight_steps_already_halve_the_loss(run):
    evaluation = run.report["evaluation"]
    assert evaluation["base"]["exact_match"] == 0.0
    assert evaluation["tuned"]["loss"] < 0.5 * evaluation["base"]["loss"]
    assert run.plot_file.is_file() and len(run.metrics()) == 8


def test_the_exports_load_in_plain_libraries_with_the_live_logits(run, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(run.config.model, run.weights_dir)
    export_adapter(run, tmp_path / "adapter")
    dtype = export_merged(run, tmp_path / "merged", "bfloat16")
    assert check_folder(run, tmp_path / "merged", "merged", dtype).passed

    row = json.loads(Path(run.config.data.heldout).read_text().splitlines()[0])
    ids = tokenizer.apply_chat_template(row["messages"], return_tensors="pt")["input_ids"]
    live = load_trained(str(run.path))
    with torch.inference_mode():
        truth = live.model(ids).logits.float()
        with live.base() as base:
            assert (base(ids).logits - truth).abs().max() > 1  # training did change something
        plain = AutoModelForCausalLM.from_pretrained(
            json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())[
                "base_model_name_or_path"
            ],
            dtype=live.model.dtype,
        )
        beside = PeftModel.from_pretrained(plain, tmp_path / "adapter")
        assert torch.equal(beside(ids).logits.float(), truth)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits.float()
        bound = 2 * (live.model.to(dtype)(ids).logits.float() - truth).abs().max()
        assert (merged - truth).abs().max() <= bound + 1e-4 * truth.abs().max()


def test_the_gguf_files_pass_their_gate(run, tmp_path):
    pytest.importorskip("cyllama")
    files, gates = export_gguf(run, tmp_path / "gguf", ["f16", "q8_0", "q4_k_m"])
    assert [gate.causes for gate in gates] == [[], [], []]
    # Fewer bits, a smaller file, and predictions that have moved further.
    assert files[0].stat().st_size > files[1].stat().st_size > files[2].stat().st_size
    assert gates[0].scores["kl"] < gates[1].scores["kl"] < gates[2].scores["kl"]


def test_generate_answers_as_the_evaluation_did(run):
    loaded = load_trained(str(run.path))
    sample = run.report["evaluation"]["tuned_samples"][0]
    turns = [*opening(loaded, None), {"role": "user", "content": sample["question"]}]
    prompt = render_prompt(loaded.tokenizer, turns)
    (found,) = generate(loaded.model, loaded.tokenizer, [prompt], Sampling(max_new_tokens=12))
    assert run.config.data.system in found.prompt
    # One row alone and a padded batch round differently, so only the start must be the same.
    assert found.text[:8] == sample["answer"][:8] and len(found.text) >= 8


def test_eval_measures_what_the_run_measured(run):
    again = compare(load_trained(str(run.path)))
    evaluation = run.report["evaluation"]
    assert again.tuned.loss == pytest.approx(evaluation["tuned"]["loss"], rel=1e-3)
    assert again.base.loss == pytest.approx(evaluation["base"]["loss"], rel=1e-3)


@pytest.mark.slow
def test_nf4_loads_and_learns(tmp_path):
    config = load_config(
        QUICKSTART,
        [
            f"run.dir={tmp_path}", "model.load_in_4bit=true", "train.max_steps=4",
            "train.learning_rate=1e-3", "train.warmup_steps=0", "eval.exact_match=false",
            "eval.max_rows=4", "eval.samples=0",
        ],
    )  # fmt: skip
    evaluation = fit(config, listener=LogListener()).report["evaluation"]
    assert evaluation["tuned"]["loss"] < 0.8 * evaluation["base"]["loss"]


@pytest.mark.parametrize("weights", ["dense", "nf4"])
def test_every_layer_of_the_real_model_is_fused_and_passes(weights):
    more = [f"model.load_in_4bit={str(weights == 'nf4').lower()}", "model.dtype=float32"]
    verification = verify_loaded(load_trained("smollm2-135m", more))
    assert [part for part in verification.parts if part.verdict != "pass"] == []
    assert verification.layers_fused == verification.layers_total == 30


def test_the_engine_changes_no_loss_of_the_real_model(tmp_path):
    losses = []
    for enabled in ("true", "false"):
        config = load_config(
            QUICKSTART,
            [
                f"run.dir={tmp_path}", f"run.name=engine-{enabled}", f"engine.enabled={enabled}",
                "model.dtype=float32", "train.max_steps=6", "data.heldout=null",
            ],
        )  # fmt: skip
        run = fit(config, listener=LogListener())
        losses.append([line["loss"] for line in run.metrics() if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
