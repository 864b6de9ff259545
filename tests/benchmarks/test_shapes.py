import json
import math

import pytest
import torch
from benchmarks.shapes import SHAPES, make_model

from benchmarks import shapes

# Weights of the published checkpoints, tied ones once.
PUBLISHED = {
    "qwen2.5-0.5b": 494_032_768,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "qwen3-14b": 14_768_307_200,
    "llama-3.1-70b": 70_553_706_496,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_model):
    """The tiny shape in bfloat16 and in NF4."""
    base = tmp_path_factory.mktemp("shapes")
    return {nf4: make_model("tiny", base, nf4, tokenizer=str(tiny_model)) for nf4 in (False, True)}


@pytest.fixture
def ids():
    return torch.randint(3, 49_000, (2, 48), generator=torch.Generator().manual_seed(0))


def load(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).train()


def loss_of(model, ids):
    return float(model(input_ids=ids, labels=ids).loss.detach())


def nf4_config():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_has_as_many_weights_as_the_published_model(name, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    (tmp_path / "config.json").write_text(json.dumps(SHAPES[name]))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def test_random_tokens_cost_little_more_than_a_uniform_guess(folders, ids):
    loss = loss_of(load(folders[False]), ids)
    assert math.log(49152) < loss < math.log(49152) + 0.5


def test_what_is_quantised_ahead_is_what_loading_quantises(folders, ids):
    ahead, loading = load(folders[True]), load(folders[False], quantization_config=nf4_config())
    name = "model.layers.1.mlp.down_proj"
    weights = [model.get_submodule(name).weight for model in (ahead, loading)]
    assert torch.equal(weights[0].data, weights[1].data)
    assert weights[0].quant_state.nested
    assert loss_of(ahead, ids) == loss_of(loading, ids)


def test_a_quantised_folder_may_be_asked_for_in_four_bits_again(folders, ids):
    asked = load(folders[True], quantization_config=nf4_config())
    assert loss_of(asked, ids) == loss_of(load(folders[True]), ids)


def test_whet_loads_a_quantised_folder_and_fuses_all_of_it(folders, ids):
    from whet.engine import swap
    from whet.model.load import load_model
    from whet.sections import ModelSection

    section = ModelSection(name=str(folders[True]), load_in_4bit=True)
    model = load_model(section, torch.bfloat16).train()
    plain = loss_of(model, ids)
    assert not swap.attach(model).kept
    # The loss's last bit in bfloat16 logits of 11 is 1/16 of a logit; over 94 tokens it averages out.
    assert abs(loss_of(model, ids) - plain) < 2**-4


def test_weights_depend_on_the_seed_alone(folders, tmp_path, tiny_model):
    from safetensors.torch import load_file

    def tensors(folder):
        return load_file(next(folder.glob("*.safetensors")))

    again = make_model("tiny", tmp_path, tokenizer=str(tiny_model))
    other = make_model("tiny", tmp_path, seed=1, tokenizer=str(tiny_model))
    first, name = tensors(folders[False]), "model.layers.0.self_attn.q_proj.weight"
    assert all(torch.equal(first[key], value) for key, value in tensors(again).items())
    assert not torch.equal(first[name], tensors(other)[name])


def test_shards_hold_every_tensor_once_and_stay_small(tmp_path, tiny_model, monkeypatch):
    from safetensors import safe_open

    monkeypatch.setattr(shapes, "SHARD_BYTES", 100_000)
    folder = make_model("tiny", tmp_path, tokenizer=str(tiny_model))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            found |= dict.fromkeys(names, file.name)
            size = sum(tensors.get_tensor(name).nbytes for name in names)
        assert size <= 100_000 or len(names) == 1
    assert found == index["weight_map"]
    assert load(folder).lm_head.weight.shape == (49152, 64)


def test_a_model_that_fails_half_way_is_absent(tmp_path, tiny_model, monkeypatch):
    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(shapes, "_write_shards", fail)
    with pytest.raises(OSError, match="no space"):
        make_model("tiny", tmp_path / "models", tokenizer=str(tiny_model))
    assert not list((tmp_path / "models").iterdir())
