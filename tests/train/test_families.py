"""Whatever transformers can load trains, saves, loads again and merges: one tiny model a family."""

import pytest
import torch

from whet.config_file import load_config
from whet.export.weights import export_merged
from whet.train.recipe import LogListener, fit
from whet.trained import load_trained

SMALL = {
    "vocab_size": 301,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "llama": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 16},
    "phi3": {"pad_token_id": 0},
    "mixtral": {"num_local_experts": 4},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_and_merges(family, method, config, tokenizer, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id}
    size = {"vocab_size": 301} if family == "gpt2" else SMALL
    settings = AutoConfig.for_model(family, **{**size, **ends, **FAMILIES[family]})
    folder = tmp_path / "base"
    AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = load_config(
        config,
        [
            f"model.name={folder}", "lora.dropout=0", "eval.exact_match=false", "eval.samples=1",
            f"train.parameters={method}", f"train.learning_rate={'1e-2' if method == 'lora' else '2e-3'}",
            "train.epochs=4",
        ],
    )  # fmt: skip
    run = fit(config, listener=LogListener())
    evaluation = run.report["evaluation"]
    assert evaluation["tuned"]["loss"] < 0.95 * evaluation["base"]["loss"]

    ids = torch.tensor([[5, 6, 7, 80, 9, 33, 100, 4]])
    export_merged(run, tmp_path / "merged", "float32")
    with torch.inference_mode():
        live = load_trained(str(run.path)).model(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    assert (merged - live).abs().max() <= 1e-5 * live.abs().max()
