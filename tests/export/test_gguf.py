"""GGUF files hold what the model holds: llama.cpp computes the same from them, for every family."""

import numpy as np
import pytest
import torch
from tests.engine.families import FAMILIES, SMALL, build
from transformers import AutoConfig, AutoModelForCausalLM

from whet.errors import InputError, WhetError
from whet.export.exports import vocabulary_of, write_files
from whet.export.gguf import parse_types, quantise, write_gguf
from whet.export.gguf_settings import HALF_PRECISION_ACTIVATIONS
from whet.export.live import model_logits
from whet.export.llama_cpp import GGUFModel
from whet.export.tensors import open_weights
from whet.sections import ModelSection

pytest.importorskip("cyllama")

# What llama.cpp cannot be told, by family: those settings are changed, and refused in another test.
CHANGED = {"qwen3_moe": {"norm_topk_prob": True}}
MORE = {
    "yarn": ("llama2", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 32}}),
    "linear": ("qwen2", {"rope_parameters": {
        "rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    # llama.cpp takes the long factors for a context of 256 tokens, its smallest, when 256 is long.
    "longrope": ("phi3", {"max_position_embeddings": 2048, "original_max_position_embeddings": 512,
        "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + 0.1 * n for n in range(8)],
        "long_factor": [2.0 + n for n in range(8)], "original_max_position_embeddings": 512}}),
    "gemma3_local_last": ("gemma3", {"num_hidden_layers": 3, "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention"]}),
}  # fmt: skip
# Relatives of the families that the engine's tests have.
RELATIVES = {
    "gemma": {"head_dim": 16},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                  "shared_expert_intermediate_size": 48, "norm_topk_prob": False},
}  # fmt: skip
CASES = {
    **{name: (name, {}) for name in RELATIVES},
    **{name: (name, CHANGED.get(name, {})) for name in FAMILIES},
    **MORE,
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, tokenizer):
    """Save a family's random model with a tokenizer; return its folder and the model."""

    def make(name, **more):
        size = {"vocab_size": len(tokenizer)}
        model = (relative if name in RELATIVES else build)(name, **{**size, **more}).eval()
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder, model

    return make


REFUSED = {
    "deepseek_without_q_lora": ("deepseek_v3", {"q_lora_rank": None}, "q_lora_rank"),
    "gemma3_global_first": (
        "gemma3", {"layer_types": ["full_attention", "sliding_attention"]}, "every n-th layer"),
    "qwen3_moe_plain": ("qwen3_moe", {}, "always normalises"),
    "relu": ("llama2", {"hidden_act": "relu"}, "activation silu"),
    "dynamic": ("llama2", {"rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}, "dynamic"),
}  # fmt: skip


def relative(name, **more):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **{**SMALL, **RELATIVES[name], **more})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def rows(width):
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, 301, (n,), generator=generator).tolist() for n in (width, 1)]


def worst(ones, twos):
    return max(np.abs(a - b).max() for a, b in zip(ones, twos, strict=True))


def weights_of(folder):
    return open_weights(ModelSection(name=str(folder)))


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same(case, folder_of, tokenizer, tmp_path):
    name, more = CASES[case]
    folder, model = folder_of(name, **more)
    (file,), _ = write_files(weights_of(folder), tokenizer, tmp_path, "tiny", ["f32"])
    texts = rows(6 if name == "mistral" else 17)
    truth = model_logits(model, texts)
    size = max(np.abs(row).max() for row in truth)
    bound = 1e-5 * size
    if model.config.model_type in HALF_PRECISION_ACTIVATIONS:
        bound += 2 * worst(model_logits(model.to(torch.float16), texts), truth)
    with GGUFModel(file) as exported:
        assert worst(exported.logits(texts), truth) <= bound


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(case, folder_of, tokenizer, tmp_path):
    name, more, words = REFUSED[case]
    folder, _ = folder_of(name, **more)
    with pytest.raises(InputError, match=words):
        write_files(weights_of(folder), tokenizer, tmp_path, "tiny", ["f32"])
    assert not list(tmp_path.iterdir())


def test_a_family_without_a_layout_is_refused(folder_of, tokenizer, tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 301}
    GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=32, **size)).save_pretrained(
        tmp_path / "neox"
    )
    with pytest.raises(InputError, match="gpt_neox.*use --to merged"):
        write_files(weights_of(tmp_path / "neox"), tokenizer, tmp_path, "tiny", ["f32"])


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_a_narrow_file_is_as_near_as_its_type_allows(kind, folder_of, tokenizer, tmp_path):
    folder, model = folder_of("llama2")
    (file,), _ = write_files(weights_of(folder), tokenizer, tmp_path, "tiny", [kind])
    texts = rows(17)
    truth = model_logits(model, texts)
    # Rounding of q8_0: half of 1/127 of a block's largest weight; that of bfloat16 is 1/256 of each.
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    bound = 2 * worst(model_logits(model.to(dtype), texts), truth)
    with GGUFModel(file) as exported:
        assert 0 < worst(exported.logits(texts), truth) <= bound


def test_the_tokenizer_and_its_settings_are_in_the_file(folder_of, tokenizer, tmp_path):
    folder, _ = folder_of("llama2")
    (file,), _ = write_files(weights_of(folder), tokenizer, tmp_path, "tiny", ["f32"])
    with GGUFModel(file) as exported:
        assert exported.template == tokenizer.chat_template
        assert not exported.adds_bos()
        assert exported.ends_generation(tokenizer.eos_token_id)
        assert not exported.ends_generation(17)
        text = "turn red into 1234 <|im_end|> naïve"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert exported.tokenize_all([text]) == [ids]
        assert exported.metadata("tokenizer.ggml.eos_token_id") == str(tokenizer.eos_token_id)


def test_a_weight_too_large_for_float16_is_told(folder_of, tokenizer, tmp_path):
    folder, model = folder_of("llama2")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = 1e5
    model.save_pretrained(folder)
    with pytest.raises(InputError, match="blk.0.ffn_up.weight does not fit.*bf16"):
        write_files(weights_of(folder), tokenizer, tmp_path, "tiny", ["f16"])
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_cut_short_is_an_error_in_words(folder_of, tokenizer, tmp_path):
    folder, _ = folder_of("llama2")
    (file,), _ = write_files(weights_of(folder), tokenizer, tmp_path, "tiny", ["f32"])
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(WhetError, match="llama.cpp does not load"):
        GGUFModel(file)
    with pytest.raises(WhetError, match="could not be made"):
        quantise(file, tmp_path / "small.gguf", "q4_k_m")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_crash_while_writing_leaves_no_file(folder_of, tokenizer, tmp_path, monkeypatch):
    folder, _ = folder_of("llama2")
    weights = weights_of(folder)
    vocabulary = vocabulary_of(weights, tokenizer)
    weights.infos["model.norm.weight"].file.unlink()
    with pytest.raises((OSError, WhetError)):
        write_gguf(weights, vocabulary, tmp_path / "out.gguf", "f32", "tiny")
    assert not list(tmp_path.iterdir())


def test_types_are_read_as_people_write_them():
    assert parse_types(["F16,q8_0", "Q4_K_M", "q8_0"]) == ["f16", "q8_0", "q4_k_m"]
    with pytest.raises(InputError, match="did you mean 'q4_k_m'"):
        parse_types(["q4km"])
