import pytest
import torch

from whet.config_file import load_config
from whet.errors import InputError
from whet.model.load import load_model
from whet.model.lora import (
    add_adapter,
    count_parameters,
    decoder_layers,
    freeze_all_but_last,
    prepare_parameters,
)
from whet.model.loss import summed_loss
from whet.sections import LoraSection, ModelSection

IDS = torch.tensor([[5, 6, 7, 8, 9]])
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}


@pytest.fixture
def base(tiny_model):
    return ModelSection(name=str(tiny_model))


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"targets": ["q_proj", "v_proj"]},
        {"targets": "q_proj"},
        {"rslora": True},
        {"dora": True},
        {"init": "gaussian"},
        {"init": "pissa"},
        {"dropout": 0.1},
        {"modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
def test_an_adapter_starts_as_the_base_and_learns(base, settings):
    torch.manual_seed(0)
    model = load_model(base, torch.float32)
    before = model(IDS).logits
    adapted = add_adapter(model, LoraSection(rank=4, **settings), base)
    adapted.eval()
    assert torch.allclose(adapted(IDS).logits, before, atol=1e-4)
    adapted.train()
    loss, _ = summed_loss(adapted, BATCH)
    loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    frozen = [p for name, p in adapted.named_parameters() if name not in trainable(adapted)]
    assert frozen and all(p.grad is None for p in frozen)


def test_targets_and_bias_choose_what_is_trained(base):
    model = add_adapter(load_model(base, torch.float32), LoraSection(targets=["q_proj"]), base)
    assert all("q_proj" in name for name in trainable(model))
    model = add_adapter(load_model(base, torch.float32), LoraSection(), base)
    names = trainable(model)
    for part in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert sum(part in name for name in names) == 4  # A and B in two layers
    assert not any("lm_head" in name for name in names)


def test_alpha_scales_the_update(base):
    for settings, scale in (({"alpha": 12}, 3.0), ({"alpha": 12, "rslora": True}, 6.0)):
        model = add_adapter(load_model(base, torch.float32), LoraSection(rank=4, **settings), base)
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        assert layer.scaling["default"] == scale


def test_loftq_brings_nf4_nearer_to_the_weights_and_keeps_the_base(base):
    exact = load_model(base, torch.float32)
    four_bit = base.model_copy(update={"load_in_4bit": True})
    model = load_model(four_bit, torch.float32)
    quantised = model(IDS).logits
    adapted = add_adapter(model, LoraSection(rank=32, alpha=64, init="loftq"), four_bit)
    truth = exact(IDS).logits
    before = (quantised - truth).pow(2).mean()
    after = (adapted(IDS).logits - truth).pow(2).mean()
    assert after < 0.5 * before
    with adapted.disable_adapter():
        assert torch.equal(adapted(IDS).logits, quantised)  # the base is what it was


@pytest.mark.parametrize("key", ["targets", "modules_to_save"])
def test_a_target_that_does_not_exist_is_named(base, key):
    with pytest.raises(InputError, match=f"lora.{key}.*'q_prj'; did you mean 'q_proj'"):
        add_adapter(load_model(base, torch.float32), LoraSection(**{key: ["q_prj"]}), base)


def test_only_the_last_layers_are_trained(tiny_model):
    config = load_config(
        {"model": {"name": str(tiny_model)}},
        ["train.parameters=last_layers", "train.last_layers=1"],
    )
    model = prepare_parameters(load_model(config.model, torch.float32), config)
    assert trainable(model) and all(".layers.1." in name for name in trainable(model))
    with pytest.raises(InputError, match="2 layers"):
        freeze_all_but_last(model, 3)


def test_full_trains_everything(tiny_model):
    config = load_config({"model": {"name": str(tiny_model)}}, ["train.parameters=full"])
    model = prepare_parameters(load_model(config.model, torch.float32), config)
    num, total = count_parameters(model)
    assert num == total
    assert len(decoder_layers(model)) == 2


def test_four_bit_parameters_are_counted_by_elements(base):
    plain = count_parameters(load_model(base, torch.float32))
    four_bit = base.model_copy(update={"load_in_4bit": True})
    assert count_parameters(load_model(four_bit, torch.float32))[1] == plain[1]
