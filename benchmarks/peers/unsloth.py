"""Unsloth: its FastLanguageModel under trl's trainers, which it changes when it is imported."""

from __future__ import annotations

from typing import Any

from unsloth import FastLanguageModel  # isort: skip  (before transformers, or it does not take hold)

import torch

from benchmarks.peers import trl
from benchmarks.peers.job import TARGETS, Job
from benchmarks.peers.worker import Watch


def run(job: Job, watch: Watch) -> None:
    """Train as its notebooks do."""
    work, settings = job.work, job.settings
    checkpointing = settings.get("checkpointing", "unsloth")
    model: Any
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=job.model,
        max_seq_length=work.length,
        dtype=getattr(torch, work.dtype),
        load_in_4bit=work.load_in_4bit,
        full_finetuning=work.parameters == "full",
        use_gradient_checkpointing=checkpointing,
    )
    if work.parameters == "lora":
        model = FastLanguageModel.get_peft_model(
            model,
            r=work.rank,
            lora_alpha=2 * work.rank,
            lora_dropout=0,
            bias="none",
            target_modules=TARGETS,
            use_gradient_checkpointing=checkpointing,
            random_state=job.seed,
        )
    watch.loaded(model)
    trl.train(job, watch, model, tokenizer)
