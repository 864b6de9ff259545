"""Plain transformers + peft: Trainer with its own collators."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.peers.job import TARGETS, Job
from benchmarks.peers.worker import Watch


def load(job: Job) -> Any:
    """Load the model and put the adapter on it, as their documentation does."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    work, dtype = job.work, getattr(torch, job.work.dtype)
    options: dict[str, Any] = {"dtype": dtype}
    if work.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if job.device == "cuda":
        options["device_map"] = {"": 0}
    if attention := job.settings.get("attention"):
        options["attn_implementation"] = attention
    model: Any = AutoModelForCausalLM.from_pretrained(job.model, **options)
    model.config.use_cache = False
    if work.load_in_4bit and job.settings.get("prepare", True):
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=bool(job.settings.get("checkpointing"))
        )
    if work.parameters == "lora":
        settings = LoraConfig(
            task_type="CAUSAL_LM", r=work.rank, lora_alpha=2 * work.rank, target_modules=TARGETS
        )
        model = get_peft_model(model, settings)
    return model


def arguments(job: Job) -> dict[str, Any]:
    """Return what every trainer built on transformers' arguments is given."""
    work, settings = job.work, job.settings
    whole = work.batch_size * work.accumulation
    size = min(whole, settings.get("batch_size", work.batch_size))
    return {
        "output_dir": f"{job.folder}/out",
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": whole // size,
        "max_steps": work.steps,
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": job.device == "cpu",
        "bf16": settings.get("autocast", False),
        "seed": job.seed,
        # Checkpointing's name has changed and the old one goes on working (transformers 5.23).
        "gradient_checkpointing": settings.get("checkpointing", False),
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": job.device == "cuda",
    }


def run(job: Job, watch: Watch, **more: Any) -> None:
    """Train through transformers' Trainer.

    Args:
        job: What is to be done.
        watch: Is told when the model is loaded, and keeps the turns.
        **more: Further training arguments.
    """
    from transformers import (
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        DataCollatorWithFlattening,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = load(job)
    watch.loaded(model)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments(job), **more),
        train_dataset=job.read_rows(),  # type: ignore[arg-type]
        data_collator=DataCollatorWithFlattening()
        if job.settings.get("flatten")
        else DataCollatorForSeq2Seq(tokenizer),
        callbacks=[watch.callback()],
    )
    trainer.train()
    trainer.save_model(str(job.trained))
