"""A tuned model's weights are read and merged one at a time, exactly as peft merges the whole model."""

import pytest
import torch
from safetensors import safe_open

from whet.config_file import load_config
from whet.export.gguf import write_gguf
from whet.export.gguf_tokenizer import read_vocabulary
from whet.export.tensors import NotStreamable, nf4_rounded, open_weights
from whet.export.weights import write_merged
from whet.model.load import load_model
from whet.plan.count import AllocationCounter
from whet.sections import ModelSection
from whet.train.recipe import LogListener, fit
from whet.trained import load_adapted

METHODS = [
    [],
    ["lora.dora=true"],
    ["lora.init=pissa", "lora.rslora=true"],
    ["lora.bias=all"],
    ["lora.bias=lora_only", "lora.targets=[q_proj, down_proj]"],
    ["lora.modules_to_save=[embed_tokens]"],
    ["lora.modules_to_save=[lm_head]"],
]


@pytest.mark.parametrize("more", METHODS, ids=str)
def test_every_tensor_is_what_peft_merges(more, config):
    run = fit(
        load_config(config, ["train.max_steps=2", "eval.samples=0", *more]), listener=LogListener()
    )
    merged = load_adapted(run.config.model, torch.float32, run).merge_and_unload(safe_merge=True)
    weights, truth = open_weights(run.config.model, run.adapter_dir), merged.state_dict()
    assert weights.config.tie_word_embeddings == merged.config.tie_word_embeddings
    tied = {"lm_head.weight"} if merged.config.tie_word_embeddings else set()
    assert set(weights.infos) == set(truth) - tied
    for name, value in weights:
        assert torch.equal(value.float(), truth[name]), name
        assert tuple(value.shape) == weights.infos[name].shape
    assert weights.merges


def test_an_adapter_on_a_tied_embedding_parts_it_from_the_head(config):
    more = ["train.max_steps=2", "eval.samples=0", "lora.targets=[embed_tokens, q_proj]"]
    run = fit(load_config(config, more), listener=LogListener())
    weights, base = open_weights(run.config.model, run.adapter_dir), open_weights(run.config.model)
    assert not weights.config.tie_word_embeddings
    before = base.read("model.embed_tokens.weight")
    assert torch.equal(weights.read("lm_head.weight"), before)
    assert not torch.equal(weights.read("model.embed_tokens.weight"), before)


def test_dequantised_weights_are_those_of_a_qlora_run(tiny_model):
    from bitsandbytes.functional import dequantize_4bit

    section = ModelSection(name=str(tiny_model))
    weights = open_weights(section, dequantised=torch.bfloat16)
    model = load_model(section.model_copy(update={"load_in_4bit": True}), torch.bfloat16)
    layers = {
        f"{n}.weight": m for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"
    }
    assert set(weights.rounded) == set(layers)
    for name, module in layers.items():
        truth = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        assert torch.equal(weights.read(name), truth)
    plain = open_weights(section).read("model.layers.0.mlp.up_proj.weight")
    assert not torch.equal(plain, nf4_rounded(plain, torch.bfloat16))


def test_a_model_published_in_4_bit_is_not_read_so(tiny_model, tmp_path):
    section = ModelSection(name=str(tiny_model), load_in_4bit=True)
    load_model(section, torch.float32).save_pretrained(tmp_path / "nf4")
    with pytest.raises(NotStreamable, match="published in few bits"):
        open_weights(ModelSection(name=str(tmp_path / "nf4")))


@pytest.fixture(scope="module")
def deep(tmp_path_factory, tokenizer):
    """A model of forty layers with an adapter on all of them; the weights of one are 0.4 MB."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("deep")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=40,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    adapted.save_pretrained(folder / "adapter")
    return folder


def all_bytes(folder):
    return sum(4 * torch.Size(i.shape).numel() for i in open_weights(
        ModelSection(name=str(folder / "base"))).infos.values())  # fmt: skip


def opened(folder):
    return open_weights(ModelSection(name=str(folder / "base")), folder / "adapter")


SHARD = 300_000  # bytes


def test_merging_and_writing_hold_a_shard_at_most(deep, tokenizer, tmp_path):
    weights = opened(deep)
    largest = max(4 * torch.Size(i.shape).numel() for i in weights.infos.values())
    with AllocationCounter() as counter:
        write_merged(weights, tokenizer, tmp_path, torch.float32, shard_bytes=SHARD)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 40 and all_bytes(deep) > 50 * SHARD
    # The shard, and of the tensor that is being merged the base, the product and the sum.
    assert counter.peak <= SHARD + 5 * largest
    names = set()
    for shard in shards:
        with safe_open(shard, "pt") as reader:
            names |= set(reader.keys())
    assert names == set(weights.infos)


def test_a_gguf_file_is_written_a_tensor_at_a_time(deep, tokenizer, tmp_path):
    weights = opened(deep)
    largest = max(4 * torch.Size(i.shape).numel() for i in weights.infos.values())
    vocabulary = read_vocabulary(tokenizer, weights.config.vocab_size)
    with AllocationCounter() as counter:
        write_gguf(weights, vocabulary, tmp_path / "m.gguf", "f32", "deep")
    assert (tmp_path / "m.gguf").stat().st_size > all_bytes(deep)
    assert counter.peak <= 6 * largest
