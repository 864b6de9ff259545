"""Keys of transformers.TrainingArguments, which several projects take as they are."""

from __future__ import annotations

from whet.convert.rules import (
    Rule,
    lost,
    moot,
    names,
    optimizer,
    schedule,
    settings,
    steps,
    to,
    trackers,
    whole,
    with_others,
)

TRAINING: dict[str, Rule] = {
    "output_dir": with_others("run.dir, run.name"),
    "per_device_train_batch_size": with_others(
        "train.batch_size", "times gradient_accumulation_steps; with packing: train.batch_tokens"
    ),
    "gradient_accumulation_steps": with_others(
        "train.batch_size", "the planner cuts a step into passes"
    ),
    "num_train_epochs": to("train.epochs", float),
    "max_steps": to("train.max_steps", steps),
    "learning_rate": to("train.learning_rate", float),
    "lr_scheduler_type": to("train.schedule", schedule),
    "warmup_steps": with_others("train.warmup_steps"),
    "warmup_ratio": with_others("train.warmup_steps", "as a number of steps"),
    "weight_decay": to("train.weight_decay", float),
    "max_grad_norm": to("train.max_grad_norm", float),
    "optim": to("train.optimizer", optimizer),
    "optim_args": to("train.optimizer_args", settings),
    "optim_target_modules": to("train.optimizer_targets", names),
    "seed": to("train.seed", whole),
    "logging_steps": to("train.log_steps", steps),
    "save_steps": to("train.checkpoint_steps", steps),
    "save_total_limit": to("train.keep_checkpoints", whole),
    "report_to": to("train.trackers", trackers),
    "per_device_eval_batch_size": to("eval.batch_size", whole),
    "eval_steps": with_others("eval.steps"),
    "eval_strategy": with_others("eval.steps", "steps, or no measurement during training"),
    "early_stopping_patience": with_others("eval.patience"),
    "load_best_model_at_end": with_others("eval.keep_best"),
    "bf16": moot(
        "weights and products are in model.dtype; null takes what the device computes fastest"
    ),
    "fp16": moot(
        "weights and products are in model.dtype; null takes what the device computes fastest"
    ),
    "tf32": moot("products are in model.dtype"),
    "gradient_checkpointing": moot("the planner decides what is recomputed (plan.policy)"),
    "gradient_checkpointing_kwargs": moot("the planner decides what is recomputed (plan.policy)"),
    "group_by_length": moot("there is no padding to save"),
    "dataloader_num_workers": moot("rows are tokenised once and read from the cache"),
    "dataloader_pin_memory": moot("rows are tokenised once and read from the cache"),
    "remove_unused_columns": moot("only the columns of the format are read"),
    "overwrite_output_dir": moot("an earlier run of the name is moved aside"),
    "resume_from_checkpoint": moot("whet train --resume"),
    "do_train": moot("whet train"),
    "do_eval": moot("held-out rows are always measured at the end"),
    "save_strategy": moot("a checkpoint comes every train.checkpoint_steps and at the end"),
    "save_only_model": moot("checkpoints can always be resumed"),
    "logging_strategy": moot("see train.log_steps"),
    "logging_dir": moot("everything is in the run's folder"),
    "logging_first_step": moot("the first step is logged"),
    "ddp_timeout": moot("one process needs none"),
    "ddp_find_unused_parameters": moot("one process needs none"),
    "use_liger_kernel": moot("the engine computes layers and loss"),
    "torch_compile*": moot("the engine computes layers and loss"),
    "neftune_noise_alpha": with_others(
        "train.neftune_alpha", "for sft and pretrain; scaled by each example's own length"
    ),
    "label_smoothing_factor": lost("label smoothing of the loss is not here"),
    "lr_scheduler_kwargs": with_others("train.schedule_args"),
    "deepspeed": lost("whet train CONFIG --nproc N --strategy deepspeed"),
    "fsdp*": lost("whet train CONFIG --nproc N --strategy fsdp"),
    "push_to_hub": lost("whet export RUN --push REPO"),
    "hub_*": lost("whet export RUN --push REPO"),
}
