"""A model with the engine takes and gives what the model without it takes and gives."""

import copy
import logging

import pytest
import torch

from tests.engine.families import (
    adapted,
    batch,
    build,
    documents,
    gradients,
    in_float64,
    packed_batch,
    true_gradients,
)
from whet.engine import swap
from whet.engine.parity import judge
from whet.engine.swap import EngineSettings
from whet.errors import WhetError

FAMILIES = ["llama3", "gemma2", "gpt2", "qwen3_moe"]
families = pytest.mark.parametrize("family", FAMILIES)


def exact(model, inputs, **more):
    """The original in float64 on the real tokens of a batch, document by document."""
    truth, outputs = in_float64(model), []
    for document in documents(inputs):
        document.pop("labels")
        with torch.no_grad():
            outputs.append(truth(**document, use_cache=False, **more))
    return outputs


def real(inputs, logits):
    return logits[inputs["attention_mask"].bool()]


def judge_logits(inputs, ours, original, truth):
    truth = torch.cat([output.logits[0] for output in truth])
    return judge("logits", real(inputs, ours), real(inputs, original), truth).passed


@families
@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_without_labels_are_the_originals(family, side):
    model, inputs = build(family).eval(), batch(side)
    truth = exact(model, inputs)
    inputs.pop("labels")
    with torch.no_grad():
        original = model(**inputs, use_cache=False).logits
        swap.attach(model)
        ours = model(**inputs, use_cache=False).logits
        again = model.train()(**inputs).logits
    assert judge_logits(inputs, ours, original, truth)
    assert torch.equal(real(inputs, again), real(inputs, ours))


def test_logits_to_keep_are_the_last_ones():
    model = build("llama3").eval()
    ids = batch(rows=2)["input_ids"][:1]
    call = {"input_ids": ids, "use_cache": False, "logits_to_keep": 3}
    with torch.no_grad():
        truth, original = in_float64(model)(**call).logits, model(**call).logits
        swap.attach(model)
        ours = model(**call).logits
    assert ours.shape == (1, 3, 301)
    assert judge("logits", ours, original, truth).passed


def test_logits_to_keep_with_labels_is_the_originals_business():
    model, inputs = build("llama2"), packed_batch((9,))
    labels = inputs["labels"][:, -4:]
    call = {"input_ids": inputs["input_ids"], "labels": labels, "logits_to_keep": 4}
    original = model(**call)
    swap.attach(model)
    ours = model(**call)
    truth = in_float64(model)(**call)
    assert judge("loss", ours.loss, original.loss, truth.loss).passed
    assert ours.logits.shape == (1, 4, 301)


@families
def test_training_makes_logits_when_somebody_looks(family):
    model, inputs = build(family), batch()
    model.train()
    original = model(**inputs, use_cache=False).logits
    truth = exact(model, inputs)
    swap.attach(model)
    output = model(**inputs, use_cache=False)
    assert "logits" not in output and list(output) == ["loss"]
    assert len(output.to_tuple()) == 1
    ours = output.logits
    assert output["logits"] is ours
    assert judge_logits(inputs, ours, original, truth)


def test_logits_made_late_carry_a_gradient():
    model, inputs = build("llama2"), batch()
    swap.attach(model)
    output = model(**inputs, use_cache=False)
    output.logits[:, 3].sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_evaluation_with_labels_gives_loss_and_logits():
    model, inputs = build("llama3").eval(), batch()
    truth = true_gradients(model, inputs)[0]
    with torch.no_grad():
        original = model.eval()(**inputs, use_cache=False)
        swap.attach(model)
        ours = model(**inputs, use_cache=False)
    assert list(ours) == ["loss", "logits"]
    assert judge("loss", ours.loss, original.loss, truth).passed
    assert judge_logits(inputs, ours.logits, original.logits, exact(model, inputs))
    assert torch.equal(ours[1], ours.logits)


@families
def test_generation_gives_the_same_tokens(family):
    model = build(family).eval()
    inputs = batch("left", width=12)
    call = {
        "input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"],
        "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    before = model.generate(**call)
    swap.attach(model)
    assert torch.equal(model.generate(**call), before)
    model.train()
    assert torch.equal(model.generate(**call), before)
    assert torch.equal(model.generate(**call, use_cache=False), before)


def test_a_cache_runs_the_original():
    model = build("llama3").eval()
    ids = batch(rows=1, width=12)["input_ids"]
    with torch.no_grad():
        whole = model(ids, use_cache=True)
        swap.attach(model)
        first = model(ids[:, :8], use_cache=True)
        rest = model(ids[:, 8:], past_key_values=first.past_key_values)
        labelled = model(ids, labels=ids, past_key_values=None, use_cache=True)
    assert first.past_key_values is not None and labelled.past_key_values is not None
    truth = in_float64(model)(ids, use_cache=False).logits[:, 8:]
    assert judge("logits", rest.logits, whole.logits[:, 8:], truth).passed


@families
def test_hidden_states_of_every_layer_are_the_originals(family):
    model, inputs = build(family), batch()
    truth = exact(model, inputs, output_hidden_states=True)
    original = model(**inputs, output_hidden_states=True, use_cache=False)
    swap.attach(model)
    ours = model(**inputs, output_hidden_states=True, use_cache=False)
    assert judge("loss", ours.loss, original.loss, true_gradients(model, inputs)[0]).passed
    assert len(ours.hidden_states) == len(original.hidden_states) == 3
    for number in range(3):
        exactly = torch.cat([output.hidden_states[number][0] for output in truth])
        found = [real(inputs, x.hidden_states[number]) for x in (ours, original)]
        assert judge("hidden", *found, exactly).passed, number


def test_a_tuple_is_given_to_who_asks_for_one():
    model, inputs = build("llama2"), batch()
    original = model(**inputs, return_dict=False, use_cache=False)
    swap.attach(model)
    ours = model(**inputs, return_dict=False, use_cache=False)
    assert isinstance(ours, tuple) and len(ours) == len(original) == 2
    assert judge("loss", ours[0], original[0], true_gradients(model, inputs)[0]).passed
    assert judge_logits(inputs, ours[1], original[1], exact(model, inputs))


def test_positional_arguments_are_understood():
    model, inputs = build("llama2"), batch()
    swap.attach(model)
    named = model(**inputs, use_cache=False).loss
    by_place = model(inputs["input_ids"], inputs["attention_mask"], None, None, None,
                     inputs["labels"], use_cache=False)  # fmt: skip
    assert torch.equal(by_place.loss, named)


@pytest.mark.parametrize("side", ["right", "left"])
def test_labels_on_padding_are_learned_as_the_original_learns_them(side):
    model, inputs = build("llama2"), batch(side)
    inputs["labels"] = inputs["input_ids"].clone()  # padding has labels like all the rest
    truth = gradients(in_float64(model), inputs)
    original = gradients(model, inputs)
    swap.attach(model)
    ours = gradients(model, inputs)
    assert judge("loss", ours[0], original[0], truth[0]).passed
    for name, grad in ours[1].items():
        assert judge(name, grad, original[1][name], truth[1][name]).passed, name


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_batch_without_labels_is_loss_0_with_zero_gradients_and_one_warning(method, caplog):
    model, inputs = build("llama2"), batch()
    model = adapted(model) if method == "lora" else model
    inputs["labels"].fill_(-100)
    swap.attach(model)
    caplog.set_level(logging.WARNING, logger="whet")
    for _ in range(3):
        loss, grads = gradients(model, inputs)
        assert loss == 0
        assert all(not grad.any() for grad in grads.values())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(grads) == trained
    assert [r.message for r in caplog.records] == [
        "a batch has no labelled token; it counts as loss 0"
    ]
    assert vars(swap.base_of(model))["_whet"].unlabelled_batches == 3


def test_embeddings_may_come_instead_of_tokens():
    model, inputs = build("llama2"), batch()
    truth, original = true_gradients(model, inputs), gradients(model, inputs)
    ids = inputs.pop("input_ids")
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    swap.attach(model)
    ours = gradients(model, {"inputs_embeds": embeddings, **inputs})
    assert judge("loss", ours[0], original[0], truth[0]).passed
    assert not embeddings.grad[inputs["attention_mask"] == 0].any()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert judge(name, ours[1][name], original[1][name], truth[1][name]).passed


def test_labels_that_are_shifted_already_are_not_shifted_again():
    model, inputs = build("llama2"), packed_batch()
    swap.attach(model)
    plain = gradients(model, inputs)
    labels = inputs.pop("labels")
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    count = int((shifted != -100).sum())
    ours = gradients(model, {**inputs, "labels": labels, "shift_labels": shifted},
                     num_items_in_batch=count)  # fmt: skip
    assert torch.equal(ours[0], plain[0])
    assert all(torch.equal(ours[1][n], grad) for n, grad in plain[1].items())


def test_a_paused_engine_runs_the_original_to_the_bit():
    model, inputs = build("llama2"), batch()
    original = gradients(model, inputs)
    swap.attach(model)
    with swap.paused(model):
        again = gradients(model, inputs)
    assert torch.equal(again[0], original[0])
    assert all(torch.equal(again[1][n], grad) for n, grad in original[1].items())


def trained(model, tmp_path, inside, **settings):
    """Losses of a few steps of transformers' own trainer."""
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(9)
    lengths = (7, 12, 3, 9, 15, 5, 11, 8, 6, 13, 4, 10)
    rows = []
    for length in lengths:
        ids = torch.randint(1, 301, (length,), generator=generator)
        pad = 16 - length
        rows.append({
            "input_ids": torch.nn.functional.pad(ids, (0, pad)),
            "attention_mask": torch.tensor([1] * length + [0] * pad),
            "labels": torch.nn.functional.pad(ids, (0, pad), value=-100),
        })  # fmt: skip
    if inside:
        swap.attach(model)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
        eval_strategy="steps", eval_steps=3, seed=3, disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4])
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    losses += [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    return torch.tensor(losses), trainer.predict(rows[:2]).predictions


@pytest.mark.parametrize("method", ["lora", "full"])
def test_transformers_trainer_gets_the_same_losses(method, tmp_path):
    model = build("llama3")
    model = adapted(model) if method == "lora" else model
    ours, predictions = trained(copy.deepcopy(model), tmp_path / "ours", True)
    theirs, original = trained(copy.deepcopy(model), tmp_path / "theirs", False)
    assert ours.shape == theirs.shape == (4,)
    # Three steps of Adam over rounding: a step that was wrong moves the loss by a percent.
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=0)
    assert predictions.shape == original.shape


def test_debug_names_the_layer_whose_weights_overflow():
    model, inputs = build("llama2"), batch()
    swap.attach(model, EngineSettings(debug=True))
    assert gradients(model, inputs)[0].isfinite()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("inf")
    with pytest.raises(WhetError, match="layer 1 gave a value that is not finite"):
        gradients(model, inputs)


def test_debug_names_the_layer_whose_input_gets_a_gradient_that_overflows():
    model, inputs = build("llama2"), batch()
    swap.attach(model, EngineSettings(debug=True))
    loss = model(**inputs, use_cache=False).loss
    with pytest.raises(WhetError, match="the gradient of what .* gave is not finite"):
        (loss * float("inf")).backward()


def test_a_cheap_check_of_a_frozen_model_needs_no_gradient():
    model, inputs = build("llama2").requires_grad_(False), batch()
    swap.attach(model)
    loss = model.train()(**inputs, use_cache=False).loss
    assert not loss.requires_grad and loss > 0
