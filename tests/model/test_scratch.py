"""Random weights: the same for a seed, as their family draws them, and never by mistake."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from whet.config_file import load_config
from whet.errors import InputError
from whet.model.load import load_model, load_tokenizer, resolve
from whet.sections import ModelSection


@pytest.fixture
def bare(tiny_model, tokenizer, tmp_path):
    """A folder with a config and a tokenizer, and no weights."""
    tokenizer.save_pretrained(tmp_path / "bare")
    AutoConfig.from_pretrained(tiny_model).save_pretrained(tmp_path / "bare")
    return tmp_path / "bare"


def weights(bare, seed, dtype=torch.float32, **more):
    section = ModelSection(name=str(bare), init="random", **more)
    return dict(load_model(section, dtype, seed=seed).named_parameters())


def test_a_seed_makes_the_same_weights_and_leaves_the_random_state_alone(bare):
    state = torch.get_rng_state()
    one, again, other = weights(bare, 1), weights(bare, 1), weights(bare, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_the_weights_are_those_of_the_family(bare):
    torch.manual_seed(7)
    expected = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(bare))
    found = weights(bare, 7)
    assert all(torch.equal(found[n], p) for n, p in expected.named_parameters())
    rounded = weights(bare, 7, torch.bfloat16)
    assert all(torch.equal(rounded[n], p.bfloat16()) for n, p in found.items())


def test_a_config_file_names_its_folder(bare):
    assert resolve(str(bare / "config.json")) == str(bare)


def test_a_folder_without_weights_is_not_filled_in_silence(bare):
    with pytest.raises(InputError, match=r"has a config.json and no weights.*model.init: random"):
        load_model(ModelSection(name=str(bare)), torch.float32)


def test_too_few_embeddings_for_the_tokenizer_are_told(bare):
    settings = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({**settings, "vocab_size": 7}))
    with pytest.raises(InputError, match="fewer embeddings than its tokenizer has tokens"):
        load_tokenizer(ModelSection(name=str(bare), init="random"))


@pytest.mark.parametrize("parameters", ["lora", "last_layers"])
def test_random_weights_are_trained_in_full(parameters):
    with pytest.raises(InputError, match="set train.parameters: full"):
        load_config({"model": {"init": "random"}, "train": {"parameters": parameters}})
