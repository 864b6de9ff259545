"""Trainer runs on a tiny model, with the engine in it and without, and how they are compared."""

import copy

import torch
from transformers import Trainer, TrainingArguments

from tests.engine.families import adapted, build
from whet.engine import swap

WORDS = ["turn red", "into a colour", "four", "a number and a user", "the assistant answers"]
SETTINGS = {
    "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1,
    "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 3,
}  # fmt: skip
METRICS = ("loss", "grad_norm", "eval_loss", "train_loss")


def make_model(kind="lora"):
    """A tiny Llama (full, or with an adapter) or GPT-2, in float32."""
    if kind == "gpt2":
        return build("gpt2", vocab_size=331)
    model = build("llama3", vocab_size=331)
    return adapted(model) if kind == "lora" else model


def rows_of(tokenizer, mask=True):
    """Twenty-five texts of different lengths; the first two tokens of each are not learned."""
    rows = []
    for text in (f"{a} {b}" for a in WORDS for b in WORDS):
        ids = tokenizer(text).input_ids
        row = {"input_ids": ids, "labels": [-100, -100, *ids[2:]]}
        rows.append({**row, "attention_mask": [1] * len(ids)} if mask else row)
    return rows


def arguments(folder, **more):
    return TrainingArguments(str(folder), **{**SETTINGS, **more})


def run(model, tokenizer, folder, trainer_class=Trainer, settings=None, train=True, **more):
    """Train a model by transformers' own Trainer, and give it back."""
    from transformers import DataCollatorForSeq2Seq

    rows = more.pop("rows", None) or rows_of(tokenizer)
    args = more.pop("args", None) or arguments(folder, **(settings or {}))
    trainer = trainer_class(
        model=model, args=args, train_dataset=rows, eval_dataset=rows[:5],
        data_collator=more.pop("data_collator", None) or DataCollatorForSeq2Seq(tokenizer), **more,
    )  # fmt: skip
    if train:
        trainer.train()
    return trainer


def pair(kind, tokenizer, folder, **more):
    """The same run with the engine in the model, and without it; the first trainer is the engine's."""
    plain = make_model(kind)
    fused = copy.deepcopy(plain)
    swap.attach(fused)
    runs = []
    for name, model in (("fused", fused), ("plain", plain)):
        torch.manual_seed(0)
        runs.append(run(model, tokenizer, folder / name, **more))
    assert swap.is_attached(fused) and not swap.is_attached(plain)
    return runs


def assert_same_log(ours, theirs, relative=1e-4):
    """Every logged number of two trainers agrees."""
    assert len(ours.state.log_history) == len(theirs.state.log_history) > 0
    compared = 0
    for mine, other in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        assert mine.keys() == other.keys()
        for key in METRICS:
            if key in other:
                compared += 1
                # The log rounds to four places where it is printed, not where it is kept.
                assert abs(mine[key] - other[key]) <= relative * abs(other[key]), (key, mine, other)
    assert compared


def parameters(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
