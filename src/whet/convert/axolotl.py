"""Axolotl's YAML, after its config reference (docs.axolotl.ai)."""

from __future__ import annotations

from whet.convert.axolotl_data import set_data
from whet.convert.rules import (
    Dialect,
    Reading,
    Rule,
    dtype,
    fatal,
    lost,
    moot,
    names,
    one_of,
    optimizer,
    schedule,
    set_batch,
    set_evaluation,
    set_noise,
    set_place,
    set_schedule,
    set_warmup,
    settings,
    share,
    steps,
    targets,
    to,
    whole,
    with_others,
)

_INIT = {"true": "default", "gaussian": "gaussian", "pissa": "pissa", "loftq": "loftq"}
_TEMPLATES = {
    "chatml": "chatml", "llama3": "llama-3", "gemma": "gemma", "alpaca": "alpaca", "phi_4": "phi-4",
    "mistral_v1": "mistral", "mistral_v2v3": "mistral", "mistral_v3_tekken": "mistral", "qwen_25": "qwen",
    "tokenizer_default": None,
}  # fmt: skip
_KERNELS = moot("the engine has its own")
_NOISE = with_others(
    "train.neftune_alpha", "for sft and pretrain; scaled by each example's own length"
)
_TRACKER = moot("the tracker's environment variables hold")

_RULES: dict[str, Rule] = {
    "base_model": to("model.name"),
    "revision_of_model": to("model.revision"),
    "trust_remote_code": to("model.trust_remote_code"),
    "random_init_weights": to("model.init", lambda value: "random" if value else None),
    "load_in_4bit": to("model.load_in_4bit"),
    "load_in_8bit": lost("whet keeps frozen weights in 16 or 4 bits: model.load_in_4bit"),
    "gptq": lost("whet's 4-bit weights are NF4: model.load_in_4bit"),
    "torch_dtype": to("model.dtype", dtype),
    "bf16": with_others("model.dtype"),
    "fp16": with_others("model.dtype"),
    "bfloat16": with_others("model.dtype"),
    "float16": with_others("model.dtype"),
    "tf32": moot("products are in model.dtype"),
    "adapter": with_others("train.parameters, model.load_in_4bit", "none trains every weight"),
    "lora_r": to("lora.rank", whole),
    "lora_alpha": to("lora.alpha", float),
    "lora_dropout": to("lora.dropout", float),
    "lora_target_modules": with_others("lora.targets"),
    "lora_target_linear": with_others("lora.targets", "all-linear"),
    "lora_modules_to_save": to("lora.modules_to_save", names),
    "lora_fan_in_fan_out": moot("read from the module"),
    "lora_on_cpu": moot("the planner sees to the memory"),
    "lora_mlp_kernel": _KERNELS, "lora_qkv_kernel": _KERNELS, "lora_o_kernel": _KERNELS,
    "lora_model_dir": lost("a run starts from a new adapter"),
    "peft_use_dora": to("lora.dora"),
    "peft_use_rslora": to("lora.rslora"),
    "peft_init_lora_weights": to("lora.init", one_of(_INIT)),
    "peft_layers_to_transform": lost("adapters go on every layer"),
    "peft.loftq_config": to("lora.init", lambda value: "loftq" if value else None),
    "loraplus_lr_ratio": to("train.lora_plus_ratio", float),
    "loraplus_lr_embedding": lost("embeddings learn at train.learning_rate"),
    "relora*": lost("ReLoRA is not here"),
    "unfrozen_parameters": lost("train.parameters: last_layers is the nearest"),
    "datasets": with_others("data.train, data.format, data.columns"),
    "pretraining_dataset": with_others("data.train", "with method: pretrain"),
    "test_datasets": with_others("data.heldout"),
    "val_set_size": to("data.heldout_fraction", share, "a share"),
    "chat_template": to("model.chat_template", one_of(_TEMPLATES)),
    "chat_template_jinja": lost("write it to a file and name that in model.chat_template"),
    "default_system_message": to("data.system"),
    "train_on_inputs": to("data.loss_on", lambda value: "all" if value else None),
    "shuffle_merged_datasets": to("train.shuffle"),
    "dataset_processes": to("data.workers", whole),
    "dataset_prepared_path": moot("tokenised rows are kept in the user's cache"),
    "dataset_keep_in_memory": moot("rows are never held in memory"),
    "dataset_exact_deduplication": lost("whet data counts copies; it takes none out"),
    "sequence_len": to("model.max_length", whole),
    "sample_packing": with_others("train.batch_tokens", "whet always packs; see micro_batch_size"),
    "eval_sample_packing": moot("examples are always packed, and see only themselves"),
    "pad_to_sequence_len": moot("nothing is padded"),
    "sample_packing_*": moot("the planner packs"),
    "group_by_length": moot("there is no padding to save"),
    "micro_batch_size": with_others(
        "train.batch_size", "times gradient_accumulation_steps; with sample_packing: train.batch_tokens"
    ),
    "gradient_accumulation_steps": with_others("train.batch_size", "the planner cuts a step into passes"),
    "num_epochs": to("train.epochs", float),
    "max_steps": to("train.max_steps", steps),
    "learning_rate": to("train.learning_rate", float),
    "lr_scheduler": to("train.schedule", schedule),
    "lr_scheduler_kwargs": with_others("train.schedule_args"),
    "cosine_min_lr_ratio": with_others("train.schedule_args", "as min_lr_rate of cosine_with_min_lr"),
    "warmup_steps": with_others("train.warmup_steps"),
    "warmup_ratio": with_others("train.warmup_steps", "as a number; left out: 0.03, at most 100"),
    "weight_decay": to("train.weight_decay", float),
    "max_grad_norm": to("train.max_grad_norm", float),
    "optimizer": to("train.optimizer", optimizer),
    "optim_args": to("train.optimizer_args", settings),
    "optim_target_modules": to("train.optimizer_targets", names),
    "adam_beta1": with_others("train.optimizer_args"),
    "adam_beta2": with_others("train.optimizer_args"),
    "adam_epsilon": with_others("train.optimizer_args"),
    "seed": to("train.seed", whole),
    "logging_steps": to("train.log_steps", steps),
    "save_steps": to("train.checkpoint_steps", steps),
    "saves_per_epoch": lost("set train.checkpoint_steps"),
    "save_total_limit": to("train.keep_checkpoints", whole),
    "eval_steps": with_others("eval.steps"),
    "eval_strategy": with_others("eval.steps"),
    "evals_per_epoch": lost("set eval.steps"),
    "eval_batch_size": to("eval.batch_size", whole),
    "early_stopping_patience": with_others("eval.patience"),
    "load_best_model_at_end": with_others("eval.keep_best"),
    "output_dir": with_others("run.dir, run.name"),
    "wandb_project": with_others("train.trackers", "wandb"),
    "use_tensorboard": with_others("train.trackers", "tensorboard"),
    "mlflow_tracking_uri": with_others("train.trackers", "mlflow"),
    "wandb_*": _TRACKER, "mlflow_*": _TRACKER, "hf_mlflow_log_artifacts": _TRACKER,
    "use_comet": lost("whet does not write to Comet"),
    "rl": with_others("method", "dpo, ipo, orpo, kto, grpo"),
    "reward_model": with_others("method", "reward"),
    "rl_beta": to("preference.beta", float), "dpo_beta": to("preference.beta", float),
    "orpo_alpha": to("preference.beta", float),
    "kto_desirable_weight": to("preference.desirable_weight", float),
    "kto_undesirable_weight": to("preference.undesirable_weight", float),
    "dpo_label_smoothing": to("preference.label_smoothing", float),
    "dpo_use_*": lost("whet's losses over pairs are in docs/preference.md"),
    "dpo_norm_loss": lost("whet's losses over pairs are in docs/preference.md"),
    "rpo_alpha": lost("dpo has no plain loss beside it"),
    "trl.beta": to("grpo.beta", float),
    "trl.num_generations": to("grpo.num_generations", whole),
    "trl.max_completion_length": to("grpo.max_new_tokens", whole),
    "trl.temperature": to("grpo.temperature", float),
    "trl.reward_funcs": to("grpo.reward", lambda value: [_function(name) for name in value]),
    "trl.use_vllm": lost("answers are sampled by transformers"),
    "trl.vllm_*": lost("answers are sampled by transformers"),
    "s2_attention": lost("attention is the model's own"),
    "gradient_checkpointing*": moot("the planner decides what is recomputed (plan.policy)"),
    "flash_attention": moot("the engine chooses the attention"),
    "flash_attn_*": moot("the engine chooses the attention"),
    "xformers_attention": moot("the engine chooses the attention"),
    "sdp_attention": moot("the engine chooses the attention"),
    "eager_attention": moot("the engine chooses the attention"),
    "attn_implementation": moot("the engine chooses the attention"),
    "torch_compile*": moot("the engine computes layers and loss"),
    "liger_*": moot("the engine computes layers and loss"),
    "cut_cross_entropy": moot("the loss makes no logits of all tokens"),
    "plugins": with_others("", "Liger and cut cross entropy are not needed; others are not here"),
    "model_type": moot("read from the model's config"),
    "tokenizer_type": moot("read from the tokenizer's config"),
    "tokenizer_use_fast": moot("read from the tokenizer's config"),
    "is_*": moot("read from the model's config"),
    "strict": moot("whet's configs are always strict"),
    "debug": moot("--debug"),
    "local_rank": moot("one process needs none"),
    "resume_from_checkpoint": moot("whet train --resume"),
    "auto_resume_from_checkpoints": moot("whet train --resume"),
    "save_safetensors": moot("weights are always safetensors"),
    "device_map": moot("the planner decides"),
    "hf_use_auth_token": moot("the Hub's own login holds"),
    "remove_unused_columns": moot("only the columns of the format are read"),
    "dataloader_*": moot("rows are tokenised once and read from the cache"),
    "tokenizer_config": lost("the model's own tokenizer is used"),
    "base_model_config": lost("the model's own config is used"),
    "tokenizer_legacy": moot("read from the tokenizer's config"),
    "peft_layers_pattern": lost("adapters go on every layer"),
    "lora_target_parameters": lost("adapters go on modules (lora.targets)"),
    "embedding_lr": to("train.embedding_learning_rate", float),
    "embedding_lr_scale": lost("set train.embedding_learning_rate to this times train.learning_rate"),
    "lr_groups": lost("all parameters learn at train.learning_rate"),
    "lr_quadratic_warmup": lost("the warm-up is linear"),
    "cosine_constant_lr_ratio": lost("the cosine goes on to its end"),
    "batch_size": lost("set train.batch_size"),
    "auto_find_batch_size": moot("the planner finds the largest pass that fits"),
    "save_only_model": moot("checkpoints can always be resumed"),
    "save_strategy": moot("a checkpoint comes every train.checkpoint_steps and at the end"),
    "save_first_step": moot("a checkpoint comes every train.checkpoint_steps and at the end"),
    "eval_max_new_tokens": moot("see eval.max_new_tokens"),
    "eval_table_size": moot("samples.md has answers of both models (eval.samples)"),
    "eval_causal_lm_metrics": lost("whet measures perplexity and, with eval.exact_match, equal answers"),
    "do_causal_lm_eval": lost("whet measures perplexity and, with eval.exact_match, equal answers"),
    "include_tokens_per_second": moot("metrics.jsonl has tokens per second"),
    "ddp*": lost("whet train CONFIG --nproc N --strategy ddp"),
    "special_tokens": lost("the tokenizer's own are used; whet names a padding token itself"),
    "tokens": lost("the tokenizer's own are used"),
    "overrides_of_model_config": lost("the model's own config is used"),
    "bnb_config_kwargs": lost("4 bits are NF4 with double quantisation"),
    "neftune_noise_alpha": _NOISE, "noisy_embedding_alpha": _NOISE,
    "hub_*": lost("whet export RUN --push REPO"),
    "deepspeed": lost("whet train CONFIG --nproc N --strategy deepspeed"),
    "fsdp*": lost("whet train CONFIG --nproc N --strategy fsdp"),
    "sequence_parallel_degree": lost("processes share examples, not one sequence"),
}  # fmt: skip


def _function(name: str) -> str:
    """Write `module.function` as whet does."""
    return ":".join(str(name).rsplit(".", 1))


def _together(reading: Reading) -> None:
    _set_method(reading)
    _set_parameters(reading)
    set_data(reading)
    # Rows of a pretraining set are always packed there.
    packed = bool(reading.get("sample_packing") or reading.get("pretraining_dataset"))
    set_batch(reading, "micro_batch_size", "sequence_len", packed)
    set_warmup(reading, usual=(0.03, 100))
    set_schedule(reading)
    _set_lowest_rate(reading)
    set_place(reading)
    set_evaluation(reading)
    set_noise(reading, "neftune_noise_alpha", "noisy_embedding_alpha")
    arguments = {
        key.removeprefix("adam_"): reading.get(key)
        for key in ("adam_beta1", "adam_beta2", "adam_epsilon")
    }
    if given := {key: value for key, value in arguments.items() if value is not None}:
        reading.set(
            "train.optimizer_args", {**reading.ours.get("train.optimizer_args", {}), **given}
        )
    wished = (
        ("wandb_project", "wandb"),
        ("use_tensorboard", "tensorboard"),
        ("mlflow_tracking_uri", "mlflow"),
    )
    reading.set("train.trackers", [name for key, name in wished if reading.get(key)] or None)
    for plugin in names(reading.get("plugins", [])):
        if not any(word in plugin.lower() for word in ("liger", "cut_cross_entropy")):
            reading.lose("plugins", f"{plugin} is not here")


def _set_lowest_rate(reading: Reading) -> None:
    rate = reading.get("cosine_min_lr_ratio")
    if rate and reading.ours.get("train.schedule") == "cosine":
        reading.set("train.schedule", "cosine_with_min_lr")
        reading.set("train.schedule_args", {"min_lr_rate": float(rate)})
    elif rate:
        reading.moot.append(("cosine_min_lr_ratio", "the schedule is no cosine"))


def _set_method(reading: Reading) -> None:
    rl = str(reading.get("rl") or "").lower()
    if rl not in ("", "dpo", "ipo", "orpo", "kto", "grpo"):
        raise fatal("rl", rl, "whet has dpo, ipo, orpo, kto and grpo")
    if rl == "ipo":
        reading.set("preference.loss_type", "ipo")
    method = {"ipo": "dpo"}.get(rl, rl) or ("reward" if reading.get("reward_model") else "")
    reading.set("method", method or ("pretrain" if reading.get("pretraining_dataset") else None))


def _set_parameters(reading: Reading) -> None:
    adapter = str(reading.get("adapter") or "").lower()
    if adapter not in ("", "lora", "qlora"):
        raise fatal(
            "adapter", adapter, "whet has lora and qlora; without one every weight is trained"
        )
    reading.set("train.parameters", "lora" if adapter else "full")
    if adapter == "qlora":
        reading.set("model.load_in_4bit", True)
    if reading.get("lora_target_linear"):
        reading.set("lora.targets", "all-linear")
    elif reading.get("lora_target_modules"):
        reading.set("lora.targets", targets(reading.get("lora_target_modules")))
    # `auto` is what the device computes fastest, as null is here.
    for key, name in (
        ("bf16", "bfloat16"),
        ("bfloat16", "bfloat16"),
        ("fp16", "float16"),
        ("float16", "float16"),
    ):
        if reading.get(key) in (True, "true", "full"):
            reading.set("model.dtype", name)


AXOLOTL = Dialect(
    "Axolotl",
    _RULES,
    {
        "lr_scheduler": "cosine", "seed": 42, "num_epochs": 1, "micro_batch_size": 1,
        "optimizer": "adamw_torch_fused",
    },
    _together,
    sections={"trl": "trl.", "peft": "peft."},
)  # fmt: skip
