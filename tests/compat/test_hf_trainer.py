"""transformers' own Trainer computes the same with the engine in the model as without."""

import copy
import logging
import shutil

import numpy as np
import pytest
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from tests.compat.runs import (
    SETTINGS,
    arguments,
    assert_same_log,
    make_model,
    pair,
    parameters,
    rows_of,
    run,
)
from whet.engine import swap


@pytest.fixture(scope="module")
def words(tokenizer):
    return copy.deepcopy(tokenizer)


@pytest.mark.parametrize("kind", ["lora", "full", "gpt2"])
@pytest.mark.parametrize("settings", [
    {"eval_strategy": "steps", "eval_steps": 2},
    {"gradient_accumulation_steps": 2, "average_tokens_across_devices": False},
    {"label_smoothing_factor": 0.1, "eval_strategy": "steps", "eval_steps": 3},
    {"gradient_checkpointing": True},
    {"train_sampling_strategy": "group_by_length"},
    {"neftune_noise_alpha": 5.0},
    {"neftune_noise_alpha": 5.0, "gradient_checkpointing": True},
], ids=str)  # fmt: skip
def test_a_run_has_the_plain_models_losses(kind, settings, words, tmp_path):
    ours, theirs = pair(kind, words, tmp_path, settings=settings)
    assert_same_log(ours, theirs)
    assert not swap.met(ours.model)["notes"]


def test_noise_on_the_embeddings_is_the_plain_models_and_gone_afterwards(words, tmp_path):
    settings = {"neftune_noise_alpha": 50.0}
    ours, theirs = pair("lora", words, tmp_path, settings=settings)
    quiet, _ = pair("lora", words, tmp_path)
    assert_same_log(ours, theirs)
    noisy, plain = (t.state.log_history[0]["loss"] for t in (ours, quiet))
    assert abs(noisy - plain) > 1e-2 * plain  # it was there
    embeddings = swap.base_of(ours.model).get_input_embeddings()
    assert not embeddings._forward_hooks and not hasattr(embeddings, "neftune_noise_alpha")
    batch = ours.data_collator(rows_of(words)[:3])
    one, other = ours.model.train()(**batch).loss, ours.model(**batch).loss
    assert torch.equal(one, other)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_collator_for_language_models_pads_on_either_side(side, words, tmp_path):
    padded = copy.deepcopy(words)
    padded.padding_side = side
    rows = [{"input_ids": row["input_ids"]} for row in rows_of(words)]
    collator = DataCollatorForLanguageModeling(padded, mlm=False)
    ours, theirs = pair("lora", padded, tmp_path, rows=rows, data_collator=collator)
    assert_same_log(ours, theirs)


def test_in_mixed_precision_a_labelled_output_still_has_its_logits(words, tmp_path):
    shapes = []

    class Looks(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            assert "loss" in outputs and outputs[0] is outputs.loss
            shapes.append(tuple(outputs.logits.shape))
            assert outputs.get("logits") is outputs["logits"] is outputs[1] is outputs.logits
            assert outputs.logits.dtype == torch.float32
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    ours, theirs = pair("full", words, tmp_path, trainer_class=Looks, settings={"bf16": True})
    assert shapes[:3] == shapes[3:] and shapes[0][-1] == 331
    assert_same_log(ours, theirs, relative=0.02)


class Weighted(Trainer):
    """A loss of its own, as the documentation shows it: the labels are taken out of the inputs."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        return self.weighted(outputs, labels, return_outputs)

    def weighted(self, outputs, labels, return_outputs):
        logits = outputs.get("logits")[:, :-1].flatten(0, 1)
        weight = torch.linspace(0.5, 2, logits.shape[-1])
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), weight)
        return (loss, outputs) if return_outputs else loss


class WeightedWithLabels(Weighted):
    """The same with the labels left in: the model computes its own loss for nothing."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.weighted(model(**inputs), inputs["labels"], return_outputs)


@pytest.mark.parametrize("trainer_class", [Weighted, WeightedWithLabels])
def test_a_weighted_loss_is_the_same(trainer_class, words, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 3, "gradient_accumulation_steps": 2}
    ours, theirs = pair("lora", words, tmp_path, trainer_class=trainer_class, settings=settings)
    assert_same_log(ours, theirs)


def test_a_loss_function_handed_to_the_trainer_is_the_same(words, tmp_path):
    def own(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        total = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return total / (num_items_in_batch if num_items_in_batch is not None else len(labels))

    ours, theirs = pair("lora", words, tmp_path, compute_loss_func=own)
    assert_same_log(ours, theirs)


def test_a_call_without_labels_is_unpadded_though_it_carries_their_number(words):
    model, shapes = make_model("full"), []
    swap.attach(model)
    model.model.norm.register_forward_hook(lambda module, args, out: shapes.append(args[0].shape))
    rows = DataCollatorForSeq2Seq(words)(rows_of(words)[:4])
    rows.pop("labels")
    model.train()(**rows, num_items_in_batch=torch.tensor(9))
    assert shapes == [(1, int(rows["attention_mask"].sum()), 64)]


class Everything(Trainer):
    """Overrides all that people override, and writes down what was called."""

    def __init__(self, *args, **kwargs):
        self.called = set()
        super().__init__(*args, **kwargs)

    def get_train_dataloader(self):
        self.called.add("get_train_dataloader")
        return torch.utils.data.DataLoader(
            self.train_dataset, batch_size=3, collate_fn=self.data_collator
        )

    def log(self, logs, *args, **kwargs):
        self.called.add("log")
        super().log({**logs, "mine": 1.0}, *args, **kwargs)

    def create_optimizer_and_scheduler(self, num_training_steps):
        self.called.add("create_optimizer_and_scheduler")
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=0.5)

    def training_step(self, *args, **kwargs):
        self.called.add("training_step")
        return super().training_step(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        self.called.add("prediction_step")
        loss, logits, labels = super().prediction_step(model, inputs, False, ignore_keys)
        assert logits.shape == (*labels.shape, 331)
        return loss, None if prediction_loss_only else logits, labels

    def evaluate(self, *args, **kwargs):
        self.called.add("evaluate")
        return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        self.called.add("predict")
        return super().predict(*args, **kwargs)


def test_every_method_may_be_overridden(words, tmp_path):
    ours, theirs = pair("lora", words, tmp_path, trainer_class=Everything, train=False)
    for trainer in (ours, theirs):
        trainer.create_optimizer_and_scheduler(3)
        trainer.train()
        trainer.evaluate()
    found, expected = (t.predict(rows_of(words)[5:9]) for t in (ours, theirs))
    real = expected.label_ids != -100  # on padding the engine gives zeros, the plain model anything
    mine, other = found.predictions[real], expected.predictions[real]
    np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-4)
    assert ours.called == theirs.called == {name for name in vars(Everything) if name[0] != "_"}
    assert isinstance(ours.optimizer.optimizer, torch.optim.SGD)
    assert_same_log(ours, theirs)


def test_metrics_and_predictions_see_the_plain_models_logits(words, tmp_path):
    def accuracy(found):
        return {"accuracy": float((found.predictions[:, :-1] == found.label_ids[:, 1:]).mean())}

    ours, theirs = pair(
        "gpt2", words, tmp_path, train=False, compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        settings={"eval_accumulation_steps": 1, "per_device_eval_batch_size": 2},
    )  # fmt: skip
    mine, other = ours.evaluate(), theirs.evaluate()
    assert mine["eval_accuracy"] == other["eval_accuracy"]
    assert mine["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-4)
    found, expected = (t.predict(rows_of(words)[:7]) for t in (ours, theirs))
    assert found.predictions.shape == expected.predictions.shape
    real = expected.label_ids != -100
    assert (found.predictions == expected.predictions)[real].all()


def test_a_callback_ends_training_and_hears_everything(words, tmp_path):
    heard = []

    class StopAfterTwo(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            heard.append(swap.is_attached(model))
            control.should_training_stop = state.global_step >= 2
            return control

    model = make_model()
    swap.attach(model)
    trainer = run(model, words, tmp_path, settings={"max_steps": 9}, callbacks=[StopAfterTwo()])
    assert trainer.state.global_step == 2 and heard == [True, True]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_early_stopping_and_the_best_model_at_the_end(kind, words, tmp_path):
    settings = {  # the largest loss is called the best, so that every step makes it worse
        "max_steps": 6, "eval_strategy": "steps", "eval_steps": 1,
        "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss", "greater_is_better": True, "save_total_limit": 2,
    }  # fmt: skip
    ours, theirs = pair(
        kind, words, tmp_path, settings=settings, callbacks=[EarlyStoppingCallback(2)]
    )
    assert_same_log(ours, theirs)
    assert ours.state.global_step == 3 and ours.state.best_global_step == 1
    best = max(line["eval_loss"] for line in ours.state.log_history if "eval_loss" in line)
    assert ours.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_resumed_run_is_bit_equal_to_one_without_a_break(kind, words, tmp_path):
    settings = {
        "max_steps": 5,
        "save_strategy": "steps",
        "save_steps": 2,
        "lr_scheduler_type": "cosine",
    }

    def fresh():
        model = make_model(kind)
        swap.attach(model)
        return run(model, words, tmp_path, settings=settings, train=False)

    whole = fresh()
    whole.train()
    expected = parameters(whole.model)
    shutil.rmtree(tmp_path / "checkpoint-5")  # as if it had been stopped before
    for checkpoint in (True, str(tmp_path / "checkpoint-2")):  # the latest one, or a named one
        trainer = fresh()
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step == 5
        for name, value in parameters(trainer.model).items():
            assert torch.equal(value, expected[name]), name


def test_a_checkpoint_goes_from_the_plain_model_to_the_engine_and_back(words, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    ours, theirs = pair("lora", words, tmp_path, settings=settings)
    ours.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))
    theirs.train(resume_from_checkpoint=str(tmp_path / "fused" / "checkpoint-2"))
    assert ours.state.log_history[-2]["loss"] == pytest.approx(
        theirs.state.log_history[-2]["loss"], rel=1e-4
    )


def test_the_sequence_trainer_trains_and_predicts_by_generating(words, tmp_path):
    left = copy.deepcopy(words)
    left.padding_side = "left"
    args = Seq2SeqTrainingArguments(
        str(tmp_path), **SETTINGS, predict_with_generate=True, generation_max_length=24
    )
    ours, theirs = pair(
        "lora", left, tmp_path, trainer_class=Seq2SeqTrainer, args=args, processing_class=left,
        data_collator=DataCollatorForSeq2Seq(left),
    )  # fmt: skip
    assert_same_log(ours, theirs)
    found, expected = (t.predict(rows_of(left)[:4], max_length=24) for t in (ours, theirs))
    assert np.array_equal(found.predictions, expected.predictions)
    assert found.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-4)


@pytest.mark.parametrize(("level", "shown"), [("warning", False), ("info", True)])
def test_log_levels_are_transformers_own(level, shown, words, tmp_path, caplog):
    model = make_model()
    swap.attach(model)
    before = logging.getLogger("transformers").level
    settings = {"log_level": level, "log_level_replica": "error", "log_on_each_node": False}
    try:
        logging.getLogger("transformers").propagate = True
        args = arguments(tmp_path, **settings)
        assert args.get_process_log_level() == getattr(logging, level.upper())
        run(model, words, tmp_path, args=args)
    finally:
        logging.getLogger("transformers").propagate = False
        logging.getLogger("transformers").setLevel(before)
    assert any("Running training" in line for line in caplog.messages) == shown


@pytest.mark.parametrize(("each", "level"), [(True, logging.INFO), (False, logging.ERROR)])
def test_the_first_process_of_another_node_logs_when_it_is_asked_to(each, level, tmp_path):
    class OtherNode(TrainingArguments):
        local_process_index, process_index = 0, 2

    args = OtherNode(
        str(tmp_path),
        use_cpu=True,
        log_level="info",
        log_level_replica="error",
        log_on_each_node=each,
    )
    assert args.get_process_log_level() == level
