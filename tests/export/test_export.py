"""Exports load in plain transformers and peft, and give the live model's logits."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from whet.config_file import load_config
from whet.errors import InputError
from whet.export.exports import check_folder, compare_bases, export_hf
from whet.export.live import live_of
from whet.export.weights import export_adapter, export_merged
from whet.model.load import load_model, load_tokenizer
from whet.sections import ModelSection
from whet.train.recipe import LogListener, fit
from whet.trained import load_trained

IDS = torch.tensor([[5, 6, 7, 80, 9, 33]])


@pytest.fixture
def trained(config, request):
    return fit(
        load_config(config, ["train.epochs=2", *getattr(request, "param", [])]),
        listener=LogListener(),
    )


def logits(model):
    model.eval()
    with torch.inference_mode():
        return model(IDS).logits.float()


METHODS = [
    [],
    ["lora.dora=true"],
    ["lora.init=pissa", "lora.rslora=true"],
    ["lora.bias=all"],
    ["lora.modules_to_save=[embed_tokens]"],
]


@pytest.mark.parametrize("trained", METHODS, ids=str, indirect=True)
def test_the_adapter_loads_with_plain_peft(trained, tmp_path, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export_adapter(trained, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, tmp_path / "out")
    live = logits(load_trained(str(trained.path)).model)
    assert torch.equal(logits(plain), live)
    with plain.disable_adapter():
        assert not torch.equal(logits(plain), live)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


@pytest.mark.parametrize("trained", [*METHODS, ["train.parameters=full"]], ids=str, indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_merged_model_loads_with_plain_transformers(trained, tmp_path, dtype):
    from transformers import AutoModelForCausalLM

    kind = export_merged(trained, tmp_path / "out", dtype)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype is kind is getattr(torch, dtype)
    live = load_trained(str(trained.path)).model
    truth = logits(live)
    # Twice what the live model itself loses when it is cast, and float32's own rounding.
    bound = 2 * (logits(live.to(kind)) - truth).abs().max() + 1e-5 * truth.abs().max()
    assert (logits(plain) - truth).abs().max() <= bound
    assert check_folder(trained, tmp_path / "out", "merged", kind).passed


@pytest.mark.parametrize("trained", [["model.load_in_4bit=true"]], ids=str, indirect=True)
def test_a_qlora_run_is_merged_into_the_original_weights(trained, tmp_path, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    export_merged(trained, tmp_path / "out", "float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    beside = logits(PeftModel.from_pretrained(base, trained.adapter_dir))
    assert (logits(merged) - beside).abs().max() <= 1e-5 * beside.abs().max()


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_a_corrupted_export_is_caught(trained, tmp_path, kind):
    folder = tmp_path / "out"
    if kind == "merged":
        export_merged(trained, folder, "float32")
        file = folder / "model.safetensors"
    else:
        export_adapter(trained, folder)
        file = folder / "adapter_model.safetensors"
    live = live_of(trained, load_tokenizer(trained.config.model, trained.weights_dir))

    def causes():
        return check_folder(trained, folder, kind, torch.float32, live=live).causes

    assert causes() == []
    tensors = load_file(file)
    name = next(name for name in tensors if "down_proj" in name)
    save_file({**tensors, name: -tensors[name]}, file, metadata={"format": "pt"})
    assert causes() == ["logits: the weights are not those that were trained"]
    save_file({**tensors, name: tensors[name] * torch.nan}, file, metadata={"format": "pt"})
    assert causes() == ["logits: the weights are not those that were trained"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert causes() == []
    template = folder / "chat_template.jinja"
    text = template.read_text()
    template.write_text("{{ messages[0]['content'] }}")
    assert causes() == ["chat template: the exported template renders conversations otherwise"]
    template.unlink()
    assert causes() == ["chat template: the file has no chat template"]
    template.write_text(text)
    if kind == "merged":
        settings = folder / "generation_config.json"
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token_id": 77}))
        assert causes() == ["end of turn: generation goes on after '<|im_end|>'"]


def test_a_tokenizer_that_cuts_otherwise_is_caught(trained, tmp_path):
    export_merged(trained, tmp_path / "out", "float32")
    file = tmp_path / "out" / "tokenizer.json"
    described = json.loads(file.read_text())
    described["model"]["merges"] = described["model"]["merges"][:-20]
    file.write_text(json.dumps(described))
    (cause,) = check_folder(trained, tmp_path / "out", "merged", torch.float32).causes
    assert cause.startswith("tokens: ") and "strings become other tokens, such as" in cause


def test_the_table_is_stored_and_in_the_card(trained, tmp_path):
    (gate,) = export_hf(trained, tmp_path / "out", "merged")
    (stored,) = json.loads((tmp_path / "out" / "check.json").read_text())
    assert stored["passed"] and stored == json.loads(json.dumps(gate.to_dict()))
    assert [f["name"] for f in stored["findings"]] == [
        "tokens", "chat template", "end of turn", "logits", "perplexity", "KL", "greedy answers",
    ]  # fmt: skip
    assert len(stored["answers"]) == 3
    assert "| out | logits | differ by" in (tmp_path / "out" / "README.md").read_text()


def test_a_merged_model_in_4_bit_loads_and_is_near(trained, tmp_path):
    from transformers import AutoModelForCausalLM

    (gate,) = export_hf(trained, tmp_path / "out", "merged", bits=4)
    assert gate.passed and gate.kind == "nf4" and gate.scores["kl"] > 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.is_loaded_in_4bit


@pytest.mark.parametrize("trained", [["model.load_in_4bit=true"]], ids=str, indirect=True)
def test_a_qlora_run_can_be_merged_into_what_it_was_trained_on(trained, tmp_path):
    from transformers import AutoModelForCausalLM

    (gate,) = export_hf(trained, tmp_path / "out", "merged", "float32", base="dequantised")
    assert gate.passed
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    as_trained = logits(load_trained(str(trained.path)).model)
    assert (logits(merged) - as_trained).abs().max() <= 1e-5 * as_trained.abs().max()
    (other,) = export_hf(trained, tmp_path / "original", "merged", "float32")
    assert other.passed
    found = compare_bases(trained)
    assert found["kl"] > 0
    assert found["perplexity_original"] == pytest.approx(other.scores["perplexity"], rel=1e-4)
    assert found["perplexity_dequantised"] == pytest.approx(gate.scores["perplexity"], rel=1e-4)


def test_the_folder_has_what_vllm_reads(trained, tmp_path):
    export_merged(trained, tmp_path / "out", "bfloat16", shard_bytes=100_000)
    found = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
            "chat_template.jinja", "model.safetensors.index.json"} <= found  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {name for name in found if name.endswith(".safetensors")}
    assert set(index["weight_map"].values()) == files and len(files) > 2
    held = {name for file in files for name in load_file(tmp_path / "out" / file)}
    assert held == set(index["weight_map"])


def test_a_base_published_in_4_bit_is_merged_whole(tiny_model, config, tmp_path):
    from transformers import AutoModelForCausalLM

    section = ModelSection(name=str(tiny_model), load_in_4bit=True)
    load_model(section, torch.float32).save_pretrained(tmp_path / "nf4")
    load_tokenizer(section).save_pretrained(tmp_path / "nf4")
    more = [f"model.name={tmp_path / 'nf4'}", "model.load_in_4bit=true", "train.max_steps=2"]
    run = fit(load_config(config, more), listener=LogListener())
    export_merged(run, tmp_path / "out", "float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    live = logits(load_trained(str(run.path)).model)
    assert (logits(merged) - live).abs().max() <= 1e-4 * live.abs().max()


def test_a_run_on_the_original_weights_has_no_dequantised_base(trained, tmp_path):
    with pytest.raises(InputError, match="leave --base out"):
        export_merged(trained, tmp_path / "out", base="dequantised")


def test_the_export_stops_where_training_taught_it(trained, tmp_path):
    export_merged(trained, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    tokenizer = load_tokenizer(trained.config.model, trained.weights_dir)
    ends = settings["eos_token_id"]
    assert tokenizer.eos_token_id in ([ends] if isinstance(ends, int) else ends)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "perplexity" in card and "rank: 4" in card


@pytest.mark.parametrize("trained", [["train.parameters=full"]], ids=str, indirect=True)
def test_a_full_run_has_no_adapter_to_export(trained, tmp_path):
    with pytest.raises(InputError, match="use --to merged"):
        export_adapter(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()
