"""Exports load in plain transformers and peft, and give the live model's logits."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from whet.config_file import load_config
from whet.errors import InputError
from whet.export.check import check_export
from whet.export.weights import export_adapter, export_merged
from whet.model.load import load_tokenizer
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
    tokenizer = load_tokenizer(trained.config.model, trained.weights_dir)
    assert check_export(trained, tmp_path / "out", "merged", kind, tokenizer).passed


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
    tokenizer = load_tokenizer(trained.config.model, trained.weights_dir)

    def check():
        return check_export(trained, folder, kind, torch.float32, tokenizer)

    assert check().passed
    tensors = load_file(file)
    name = next(name for name in tensors if "down_proj" in name)
    save_file({**tensors, name: -tensors[name]}, file, metadata={"format": "pt"})
    assert not check().passed
    save_file(tensors, file, metadata={"format": "pt"})
    assert check().passed
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert not check().passed and not check().same_tokens


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
