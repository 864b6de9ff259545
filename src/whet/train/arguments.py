"""The config in transformers' words."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments

from whet.config import Config
from whet.runs import RunFolder
from whet.sections import TrainSection
from whet.train.optimizer_kinds import optimizer_arguments
from whet.train.trackers import PROJECT


def _checkpointing(on: bool) -> dict[str, Any]:
    """Turn gradient checkpointing on under the name that this transformers has for it."""
    new = "activation_checkpointing"
    return {new if new in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing": on}


def _schedule(train: TrainSection) -> dict[str, Any]:
    """Translate the schedule and its settings."""
    settings = dict(train.schedule_args)
    if "min_lr" in settings:  # transformers divides by a rate that only its own optimizers keep
        settings["min_lr_rate"] = float(settings.pop("min_lr")) / train.learning_rate
    name = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    return {"lr_scheduler_type": name, "lr_scheduler_kwargs": settings}


def training_arguments(
    config: Config, run: RunFolder, checkpoints: bool, more: dict[str, Any] | None = None
) -> TrainingArguments:
    """Translate the config into transformers' arguments.

    Args:
        config: The run's config.
        run: The run's folder.
        checkpoints: Turn on transformers' gradient checkpointing.
        more: What several processes need (strategy.py).
    """
    from whet.model.load import choose_dtype, device

    train = config.train
    on_cuda = device().type == "cuda"
    dtype, _ = choose_dtype(config.model.dtype, train.parameters != "lora")
    bf16 = dtype is torch.float32 and train.parameters != "lora" and config.model.dtype is None
    settings: dict[str, Any] = dict(
        output_dir=str(run.checkpoints_dir),
        per_device_train_batch_size=train.batch_size,  # the loader's batch is a whole step
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        learning_rate=train.learning_rate,
        **_schedule(train),
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        **_checkpointing(checkpoints),
        seed=train.seed,
        # Float32 weights that are trained themselves are multiplied in bfloat16 where a GPU has it.
        bf16=bf16 and on_cuda and torch.cuda.is_bf16_supported(including_emulation=False),
        # Float16 gradients underflow without loss scaling, which comes with the mixed precision.
        fp16=dtype is torch.float16 and on_cuda,
        use_cpu=not on_cuda,
        dataloader_pin_memory=on_cuda,
        logging_steps=train.log_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=train.checkpoint_steps or 10**9,
        eval_strategy="steps" if config.eval.steps else "no",
        eval_steps=config.eval.steps,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        report_to=train.trackers,
        run_name=run.path.name,
        project=PROJECT,  # of trackio
    )
    arguments = TrainingArguments(**{**settings, **optimizer_arguments(train), **(more or {})})
    # One process drives one GPU. Left alone, transformers puts DataParallel over all it sees.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments
