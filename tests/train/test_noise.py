"""NEFTune: what noise an example gets, and that neither passes, processes nor an end change it."""

import math
import os
import signal

import pytest
import torch
from tests.train.test_recipe import Heard, losses
from transformers import AutoModelForCausalLM

from whet.config_file import load_config
from whet.data.tokenize import Tokens
from whet.errors import InputError, Interrupted
from whet.train.noise import noisy_embeddings
from whet.train.recipe import fit

pytestmark = pytest.mark.usefixtures("quick")
ALPHA = 5.0


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def row(*ids):
    return Tokens(list(ids), list(ids), "here")


def noise_of(model, ids_BL, rows, seed=1, step=0):
    """Return what a batch's embeddings got on top."""
    embeddings = model.get_input_embeddings()
    with torch.no_grad():
        with noisy_embeddings(model, rows, ALPHA, seed, step):
            noisy = embeddings(ids_BL)
        return noisy - embeddings(ids_BL)


def test_the_noise_is_the_papers_by_each_examples_own_length_and_none_on_padding(model):
    rows = [row(*range(5, 45)), row(7, 8, 9)]
    packed = torch.tensor([[*rows[0].input_ids, *rows[1].input_ids, 0, 0]])
    noise = noise_of(model, packed, rows)[0]
    width = noise.shape[1]
    for part, length in ((noise[:40], 40), (noise[40:43], 3)):
        most = ALPHA / math.sqrt(length * width)
        assert (
            0.95 * most < part.abs().max() < most * (1 + 1e-4)
        )  # rounded by the sum it is read from
        # Uniform: no mean, and a variance of a third of the square.
        assert abs(part.mean()) < 0.1 * most
        assert part.square().mean() == pytest.approx(most**2 / 3, rel=0.2)
    assert not noise[43:].any()


def test_an_example_has_its_noise_wherever_it_stands_and_another_in_each_step(model):
    one, two = row(*range(5, 15)), row(7, 8, 9)
    packed = noise_of(model, torch.tensor([[*two.input_ids, *one.input_ids]]), [two, one])[0]
    padded = noise_of(model, torch.tensor([one.input_ids, [7, 8, 9] + [0] * 7]), [one, two])
    assert torch.equal(packed[3:], padded[0]) and torch.equal(packed[:3], padded[1, :3])
    assert not padded[1, 3:].any()
    alone = torch.tensor([two.input_ids])
    assert torch.equal(noise_of(model, alone, [two])[0], packed[:3])
    for other in ({"step": 1}, {"seed": 2}):
        assert not torch.equal(noise_of(model, alone, [two], **other)[0], packed[:3])


def test_the_noise_is_gone_after_the_body(model):
    with pytest.raises(ZeroDivisionError), noisy_embeddings(model, [], ALPHA, 1, 0):
        raise ZeroDivisionError
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize(
    "assignment",
    [
        "plan.tokens_per_pass=70",
        "plan.tokens_per_pass=1",
        "pack.enabled=false",
        "engine.enabled=false",
    ],
)
def test_passes_and_the_engine_do_not_change_the_noise(config, assignment):
    config = load_config(
        config, ["lora.dropout=0", "train.max_steps=4", f"train.neftune_alpha={ALPHA}"]
    )
    whole = fit(load_config(config, ["plan.tokens_per_pass=400"]), listener=Heard()).metrics()
    cut = fit(load_config(config, [assignment, "run.name=cut"]), listener=Heard()).metrics()
    for one, two in zip(whole, cut, strict=True):
        for key in ("loss", "grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=5e-5)


def test_noise_changes_what_is_learned_from_and_not_what_is_measured(config):
    config = load_config(config, ["train.max_steps=2", "train.learning_rate=1e-12"])
    plain = fit(config, listener=Heard())
    noisy = fit(
        load_config(config, ["run.name=noisy", f"train.neftune_alpha={ALPHA}"]), listener=Heard()
    )
    assert abs(losses(noisy)[1] - losses(plain)[1]) > 1e-4
    measured = [run.report["evaluation"]["tuned"]["loss"] for run in (plain, noisy)]
    assert measured[0] == pytest.approx(measured[1], rel=1e-6)


def test_a_resumed_run_has_the_noise_it_would_have_had(config):
    config = load_config(config, ["train.max_steps=6", f"train.neftune_alpha={ALPHA}"])
    whole = fit(load_config(config, ["run.name=whole"]), listener=Heard())
    heard = Heard({3: lambda: os.kill(os.getpid(), signal.SIGINT)})
    with pytest.raises(Interrupted):
        fit(config, listener=heard)
    assert losses(fit(config, resume=True, listener=Heard())) == losses(whole)


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_methods_that_compare_answers_refuse_it(config, method):
    with pytest.raises(InputError, match="train.neftune_alpha is for sft and pretrain"):
        load_config(config, [f"method={method}", "train.neftune_alpha=5"])
