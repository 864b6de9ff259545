"""trl's SFTTrainer and DPOTrainer over plain transformers + peft."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.peers import hf
from benchmarks.peers.job import Job
from benchmarks.peers.worker import Watch


def tokenizer_of(job: Job) -> Any:
    """Return the model's tokenizer with a pad token."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(job.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def train(
    job: Job,
    watch: Watch,
    model: Any,
    tokenizer: Any,
    prepared: Callable[[], None] = lambda: None,
) -> None:
    """Train a loaded model through trl's trainer for the workload's method.

    Args:
        job: What is to be done.
        watch: Keeps the turns.
        model: With its adapter.
        tokenizer: The model's.
        prepared: Called once the trainer is made.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    options = {k: v for k, v in hf.arguments(job).items() if v is not None}
    for name in ("autocast", "checkpointing"):  # where nothing is set, trl's own defaults hold
        if name not in job.settings:
            options.pop({"autocast": "bf16", "checkpointing": "gradient_checkpointing"}[name])
    rows = Dataset.from_list(job.read_rows())
    common = {"model": model, "train_dataset": rows, "processing_class": tokenizer}
    trainer: Any
    if job.work.method == "dpo":
        options["max_length"] = job.work.length
        trainer = DPOTrainer(**common, args=DPOConfig(**options), callbacks=[watch.callback()])
    else:
        options["padding_free"] = job.settings.get("padding_free", False)
        options["max_length"] = None if options["padding_free"] else job.work.length
        options["dataset_kwargs"] = {"skip_prepare_dataset": True}
        trainer = SFTTrainer(**common, args=SFTConfig(**options), callbacks=[watch.callback()])
    prepared()
    trainer.train()
    trainer.save_model(str(job.trained))


def run(job: Job, watch: Watch) -> None:
    """Train."""
    tokenizer = tokenizer_of(job)
    model = hf.load(job)
    watch.loaded(model)
    train(job, watch, model, tokenizer)
