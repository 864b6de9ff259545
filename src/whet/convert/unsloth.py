"""Unsloth: the YAML of its command line and studio, and the arguments of its notebooks as a YAML.

A script written for Unsloth needs no translation: see docs/compat.md.
"""

from __future__ import annotations

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
    set_batch,
    set_evaluation,
    set_noise,
    set_place,
    set_schedule,
    set_warmup,
    steps,
    targets,
    to,
    whole,
    with_others,
)
from whet.convert.training import TRAINING

_FORMATS = {
    "auto": None, "alpaca": "alpaca", "sharegpt": "sharegpt", "chatml": "messages",
    "conversational": "messages", "raw": "text",
}  # fmt: skip
_INIT = {"true": "default", "gaussian": "gaussian", "pissa": "pissa", "loftq": "loftq"}
_TABLES = ("embed_tokens", "lm_head")  # as targets, they are trained in full there
_VISION = moot("whet trains language models")
_TRACKER = moot("the tracker's environment variables hold")

_RULES: dict[str, Rule] = TRAINING | {
    "model": to("model.name"),
    "model_name": to("model.name"),
    "dtype": to("model.dtype", dtype),
    "load_in_4bit": to("model.load_in_4bit"),
    "load_in_8bit": lost("whet keeps frozen weights in 16 or 4 bits: model.load_in_4bit"),
    "full_finetuning": with_others("train.parameters", "full"),
    "trust_remote_code": to("model.trust_remote_code"),
    "rope_scaling": lost("whet's config uses the model's own; FastLanguageModel takes it"),
    "max_seq_length": to("model.max_length", whole),
    "training_type": with_others("train.parameters"),
    "r": to("lora.rank", whole),
    "lora_r": to("lora.rank", whole),
    "lora_alpha": to("lora.alpha", float),
    "lora_dropout": to("lora.dropout", float),
    "target_modules": to("lora.targets", targets, "embed_tokens, lm_head: lora.modules_to_save"),
    "bias": to("lora.bias"),
    "modules_to_save": to("lora.modules_to_save", names),
    "use_rslora": to("lora.rslora"),
    "use_dora": to("lora.dora"),
    "use_loftq": to("lora.init", lambda value: "loftq" if value else None),
    "init_lora_weights": to("lora.init", one_of(_INIT)),
    "loftq_config": to("lora.init", lambda value: "loftq" if value else None),
    "finetune_language_layers": moot("whet trains language models"),
    "finetune_attention_modules": moot("see lora.targets"),
    "finetune_mlp_modules": moot("see lora.targets"),
    "finetune_vision_layers": _VISION,
    "vision_all_linear": _VISION,
    "dataset": with_others("data.train"),
    "local_dataset": with_others("data.train"),
    "format_type": to("data.format", one_of(_FORMATS)),
    "dataset_text_field": to(
        "data.columns", lambda value: None if value == "text" else {"text": value}
    ),
    "chat_template": to("model.chat_template"),
    "train_on_completions": with_others("data.loss_on", "false, or left out: every token"),
    "dataset_num_proc": to("data.workers", whole),
    "packing": with_others("train.batch_tokens", "whet always packs; see batch_size"),
    "batch_size": with_others(
        "train.batch_size", "times gradient_accumulation_steps; with packing: train.batch_tokens"
    ),
    "num_epochs": to("train.epochs", float),
    "random_seed": to("train.seed", whole),
    "random_state": to("train.seed", whole),
    "save_steps": to("train.checkpoint_steps", steps),
    "use_gradient_checkpointing": moot("the planner decides what is recomputed (plan.policy)"),
    "embedding_learning_rate": to("train.embedding_learning_rate", float),
    "fast_inference": lost("whet serve RUN"),
    "gpu_memory_utilization": moot("see plan.memory"),
    "enable_wandb": with_others("train.trackers", "wandb"),
    "enable_tensorboard": with_others("train.trackers", "tensorboard"),
    "wandb_project": _TRACKER,
    "wandb_token": _TRACKER,
    "tensorboard_dir": moot("everything is in the run's folder"),
    "hf_token": moot("the Hub's own login holds"),
    "token": moot("the Hub's own login holds"),
    "save_model": moot("a run always keeps what it learned"),
    "save_method": lost("whet export RUN --to merged"),
    "save_gguf": lost("whet export RUN --to gguf"),
    "quantization*": lost("whet export RUN --to gguf --quant q4_k_m"),
}


def _together(reading: Reading) -> None:
    kind = str(
        reading.get("training_type", "full" if reading.get("full_finetuning") else "lora")
    ).lower()
    if kind not in ("lora", "qlora", "full"):
        raise fatal("training_type", kind, "whet has lora, qlora and full")
    reading.set("train.parameters", kind.removeprefix("q"))
    if kind == "qlora":
        reading.set("model.load_in_4bit", True)
    named = reading.ours.get("lora.targets")
    if isinstance(named, list) and (tables := [n for n in named if n in _TABLES]):
        reading.set("lora.targets", [name for name in named if name not in tables])
        kept = reading.ours.get("lora.modules_to_save", [])
        reading.set("lora.modules_to_save", list(dict.fromkeys([*kept, *tables])))
    # The command line's rank; get_peft_model has another.
    if kind != "full":
        reading.ours.setdefault("lora.rank", 16 if "model_name" in reading.theirs else 64)
    if kind == "full":
        reading.ours.pop("model.load_in_4bit", None)
    if str(reading.get("format_type", "")).lower() == "raw":
        reading.set("method", "pretrain")
    elif not reading.get("train_on_completions"):
        reading.set("data.loss_on", "all")
    files = reading.get("local_dataset") or reading.get("dataset")
    reading.set("data.train", files[0] if isinstance(files, list) and len(files) == 1 else files)
    rows = "batch_size" if "batch_size" in reading.theirs else "per_device_train_batch_size"
    set_batch(reading, rows, "max_seq_length", bool(reading.get("packing")))
    set_warmup(reading)
    set_schedule(reading)
    set_place(reading)
    set_evaluation(reading)
    set_noise(reading, "neftune_noise_alpha")
    wished = (("enable_wandb", "wandb"), ("enable_tensorboard", "tensorboard"))
    if found := [name for key, name in wished if reading.get(key)]:
        reading.set("train.trackers", found)


UNSLOTH = Dialect(
    "Unsloth",
    _RULES,
    {
        "load_in_4bit": True, "max_seq_length": 2048, "warmup_steps": 5, "learning_rate": 2e-4,
        "random_seed": 3407, "weight_decay": 0.01, "gradient_accumulation_steps": 4, "batch_size": 2,
        "lora_alpha": 16, "num_epochs": 3,
    },
    _together,
    sections={"data": "", "training": "", "lora": "", "logging": ""},
)  # fmt: skip
