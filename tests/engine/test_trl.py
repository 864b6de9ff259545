"""Inside trl's trainers the engine answers what trl's own fused head would have answered."""

import copy

import pytest
import torch

from tests.engine.families import (
    adapted,
    batch,
    build,
    gradients,
    in_float64,
    packed_batch,
)
from whet.engine import swap
from whet.engine.parity import judge

pytest.importorskip("trl", reason="trl is not installed")
utils = pytest.importorskip("trl.trainer.utils")
if not hasattr(utils, "add_fused_lm_head"):
    pytest.skip("this trl has no fused head", allow_module_level=True)

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def put_trl_head(model, inside, outputs=FIELDS, **more):
    """Put trl's head on a model, and with `inside` the engine below and above it."""
    if inside:
        swap.attach(model)
    utils.add_fused_lm_head(swap.base_of(model), outputs=outputs, **more)
    if inside:
        swap.stay_on_top(model)
    return model


def calls():
    """Labelled batches in every form that trl's trainers make."""
    right, left, packed = batch(), batch("left"), packed_batch()
    shifted = batch()
    labels = shifted.pop("labels")
    shifted["shift_labels"] = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    return {
        "right": right, "left": left, "packed": packed, "shifted": shifted,
        "count": {**right, "num_items_in_batch": 17},
        "counted in a tensor": {**right, "num_items_in_batch": torch.tensor(17)},
    }  # fmt: skip


def answered(model, inputs):
    """What the fused head answers, and the gradients of a mix of all that has one."""
    model.train()
    model.zero_grad()
    output = model(**inputs, fused_lm_head=True, use_cache=False)
    rows = torch.linspace(-1, 1, output.log_probs.numel()).view(output.log_probs.shape)
    mixed = output.loss + (output.log_probs * rows).sum() * 0.1
    if output.entropy is not None:
        mixed = mixed + (output.entropy * rows).sum() * 0.1
    mixed.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output, grads


def truth_of(model):
    return put_trl_head(in_float64(model), False)


@pytest.mark.parametrize("name", calls())
@pytest.mark.parametrize("make", [
    lambda: adapted(build("llama3")), lambda: build("llama2"), 
    lambda: adapted(build("gemma2", sliding_window=64)),  # in a window, padding sees nothing: NaN
], ids=["llama lora", "llama full", "gemma2 lora"])  # fmt: skip
def test_the_answer_has_the_fields_values_and_gradients_of_trls_head(name, make):
    inputs, model = calls()[name], make()
    if name == "left" and "gemma2" in str(model.config.model_type):
        pytest.skip("the original gives NaN in float64 where padding on the left sees nothing")
    truth, exact = answered(truth_of(model), inputs)
    theirs, original = answered(put_trl_head(copy.deepcopy(model), False), inputs)
    ours, found = answered(put_trl_head(model, True), inputs)
    assert type(ours) is type(theirs) and list(ours) == list(theirs)
    assert torch.equal(ours.label_mask, theirs.label_mask)
    for key in theirs:
        assert ours[key].shape == theirs[key].shape, key
        assert ours[key].dtype == theirs[key].dtype, key
        if ours[key].dtype == torch.bool:
            assert torch.equal(ours[key], theirs[key]), key
            continue
        assert judge(key, ours[key], theirs[key], truth[key]).passed, key
        if key != "loss":
            assert not ours[key][~ours.label_mask].any(), key
    assert found.keys() == original.keys()
    for key, grad in found.items():
        assert judge(key, grad, original[key], exact[key]).passed, key


def test_fields_that_were_not_asked_for_are_none():
    model, inputs = put_trl_head(build("llama2"), True, outputs=("log_probs", "is_top1")), batch()
    output = model(**inputs, fused_lm_head=True, use_cache=False)
    assert output.entropy is None and output.mean_logits is None
    assert output.is_top1.dtype == torch.bool and list(output) == [
        "loss", "log_probs", "is_top1", "label_mask"
    ]  # fmt: skip


def test_a_temperature_divides_the_logits():
    model, inputs = build("llama2"), batch()
    theirs, original = answered(put_trl_head(copy.deepcopy(model), False, temperature=0.7), inputs)
    truth, exact = answered(put_trl_head(in_float64(model), False, temperature=0.7), inputs)
    ours, found = answered(put_trl_head(model, True, temperature=0.7), inputs)
    for key in ("loss", "log_probs", "entropy", "mean_logits"):
        assert judge(key, ours[key], theirs[key], truth[key]).passed, key
    for key, grad in found.items():
        assert judge(key, grad, original[key], exact[key]).passed, key


def test_a_temperature_behind_a_soft_cap_is_answered_as_trl_answers_it():
    model, inputs = build("gemma2", sliding_window=64), batch()
    theirs, original = answered(put_trl_head(copy.deepcopy(model), False, temperature=0.7), inputs)
    truth, exact = answered(put_trl_head(in_float64(model), False, temperature=0.7), inputs)
    ours, found = answered(put_trl_head(model, True, temperature=0.7), inputs)
    assert judge("loss", ours.loss, theirs.loss, truth.loss).passed
    for key, grad in found.items():
        assert judge(key, grad, original[key], exact[key]).passed, key


def test_a_head_in_float32_is_answered_as_trl_answers_it():
    model, inputs = build("llama2", torch.bfloat16), batch()
    more = {"cast_lm_head_to_fp32": True}
    theirs = put_trl_head(copy.deepcopy(model), False, **more)(**inputs, fused_lm_head=True)
    truth = truth_of(model)(**inputs, fused_lm_head=True).loss
    ours = put_trl_head(model, True, **more)(**inputs, fused_lm_head=True)
    assert ours.log_probs.dtype == theirs.log_probs.dtype
    assert abs(ours.loss - truth) <= 2 * abs(theirs.loss - truth) + 2**-9 * truth


@pytest.mark.parametrize("inside", [False, True])
def test_a_batch_without_labels_is_loss_0_with_zero_gradients(inside):
    model, inputs = put_trl_head(adapted(build("llama2")), inside), batch()
    inputs["labels"].fill_(-100)
    output, grads = answered(model, inputs)
    assert output.loss == 0 and not output.log_probs.any() and not output.label_mask.any()
    assert grads and not any(grad.any() for grad in grads.values())


def test_without_the_flag_the_model_is_the_original():
    model, inputs = build("llama2"), batch()
    plain = gradients(copy.deepcopy(model), inputs)
    put_trl_head(model, True)
    ours = gradients(model, inputs)
    assert judge("loss", ours[0], plain[0], gradients(in_float64(model), inputs)[0]).passed
    ids = inputs["input_ids"][:1]
    with torch.no_grad():
        logits = model.eval()(ids, use_cache=False).logits
    assert logits.shape == (1, 17, 301)
    call = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert model.generate(ids, **call).shape == (1, 21)


def test_on_top_twice_is_on_top_once():
    model, inputs = put_trl_head(build("llama2"), True), batch()
    swap.stay_on_top(model)
    assert model(**inputs, fused_lm_head=True).log_probs.shape == (3, 16)
    assert model(input_ids=inputs["input_ids"]).logits.shape == (3, 17, 301)


def test_detached_below_trls_head_the_model_still_computes():
    model, inputs = build("llama2"), batch()
    expected = put_trl_head(copy.deepcopy(model), False)(**inputs, fused_lm_head=True)
    put_trl_head(model, True)
    swap.detach(model)
    again = model(**inputs, fused_lm_head=True)
    assert torch.equal(again.log_probs, expected.log_probs)
    assert model(**inputs).logits.shape == (3, 17, 301)
    assert not any(k.startswith("_whet") for m in model.modules() for k in vars(m))


def test_paused_trls_own_head_answers():
    model, inputs = build("llama2"), batch()
    expected = put_trl_head(copy.deepcopy(model), False)(**inputs, fused_lm_head=True)
    put_trl_head(model, True)
    with swap.paused(model):
        found = model(**inputs, fused_lm_head=True)
    assert torch.equal(found.log_probs, expected.log_probs)


SETTINGS = {
    "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", "report_to": [],
    "use_cpu": True, "bf16": False, "disable_tqdm": True, "seed": 3, "max_length": 24,
}  # fmt: skip


def sft(model, tokenizer, folder, inside, **more):
    """Logged losses of a short supervised run, and what else was logged with them."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    words = ["turn red", "into a colour", "four", "a number and a user", "the assistant answers"]
    rows = Dataset.from_dict({"text": [f"{a} {b}" for a in words for b in words]})
    if inside:
        swap.attach(model)
    trainer = SFTTrainer(
        model, SFTConfig(str(folder), **{**SETTINGS, **more}), train_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip
    if inside:
        swap.stay_on_top(trainer.model)
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.fixture(scope="module")
def words(tokenizer):
    return copy.deepcopy(tokenizer)


@pytest.mark.parametrize("settings", [
    {}, {"padding_free": True, "max_length": None}, {"gradient_checkpointing": False},
], ids=str)  # fmt: skip
def test_a_supervised_run_has_the_same_losses(settings, words, tmp_path):
    model = adapted(build("llama3", vocab_size=331))
    runs = [
        sft(copy.deepcopy(model), words, tmp_path / str(inside), inside, **settings)
        for inside in (True, False)
    ]
    for ours, theirs in zip(*runs, strict=True):
        for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy"):
            # Two steps of Adam over rounding; the logged numbers themselves have four places.
            assert abs(ours[key] - theirs[key]) <= 1e-4 * abs(theirs[key]) + 1e-4, key


PAIRS = {
    "prompt": ["turn red", "a user", "four"] * 3,
    "chosen": [" into a colour", " answers a user", " and a number"] * 3,
    "rejected": [" four", " red", " the assistant answers"] * 3,
}  # fmt: skip


def comparing(method):
    """trl's trainer of a method, its arguments, rows as it wants them, and the numbers that it logs."""
    import trl

    both = ("logps/chosen", "logps/rejected")
    if method == "dpo":
        return trl.DPOTrainer, trl.DPOConfig, PAIRS, both
    if method == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOTrainer, ORPOConfig, PAIRS, (*both, "nll_loss", "log_odds_ratio")
    if method == "kto":
        labels = [True, False, True] * 3
        rows = {"prompt": PAIRS["prompt"], "completion": PAIRS["chosen"], "label": labels}
        return trl.KTOTrainer, trl.KTOConfig, rows, ("kl", "logps/chosen")
    texts = {side: [p + t for p, t in zip(PAIRS["prompt"], PAIRS[side], strict=True)]
             for side in ("chosen", "rejected")}  # fmt: skip
    return trl.RewardTrainer, trl.RewardConfig, texts, ("mean_reward", "margin", "accuracy")


def scoring():
    """A small model that scores answers, with an adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForSequenceClassification

    config = build("llama3", vocab_size=331).config
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    settings = LoraConfig(r=4, task_type="SEQ_CLS", target_modules="all-linear")
    return get_peft_model(model, settings)


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo", "reward"])
def test_a_comparing_run_has_the_same_losses(method, words, tmp_path):
    """trl's own trainers, given a model with the engine in it and the same one without."""
    from datasets import Dataset

    trainer_class, arguments, rows, logged = comparing(method)
    model = scoring() if method == "reward" else adapted(build("llama3", vocab_size=331))
    settings, found = {**SETTINGS, "gradient_accumulation_steps": 1}, []
    for inside in (True, False):
        one = copy.deepcopy(model)
        if inside:
            assert swap.attach(one).layers_fused == 2
        trainer = trainer_class(
            one, args=arguments(str(tmp_path / str(inside)), **settings),
            train_dataset=Dataset.from_dict(rows), processing_class=copy.deepcopy(words),
        )  # fmt: skip
        if inside:
            swap.stay_on_top(trainer.model)
        trainer.train()
        found.append([line for line in trainer.state.log_history if "loss" in line])
    assert len(found[0]) == len(found[1]) >= 2
    for ours, theirs in zip(*found, strict=True):
        for key in ("loss", "grad_norm", *logged):
            assert abs(ours[key] - theirs[key]) <= 1e-4 * abs(theirs[key]) + 1e-4, key
