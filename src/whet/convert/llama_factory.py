"""LLaMA-Factory's YAML, after its examples and its data/README.md."""

from __future__ import annotations

import json
import posixpath
from pathlib import Path
from typing import Any

from whet.convert.rules import (
    Dialect,
    Reading,
    Rule,
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
    share,
    targets,
    to,
    whole,
    with_others,
)
from whet.convert.training import TRAINING

_TEMPLATES = {
    "llama3": "llama-3", "chatml": "chatml", "qwen": "qwen", "qwen3": "qwen", "qwen3_nothink": "qwen",
    "mistral": "mistral", "gemma": "gemma", "gemma2": "gemma", "phi4": "phi-4", "alpaca": "alpaca",
    "zephyr": "zephyr",
}  # fmt: skip
_PROJECTED = "rank, interval, scale and kind of projection become train.optimizer_args"

_RULES: dict[str, Rule] = TRAINING | {
    "model_name_or_path": to("model.name"),
    "model_revision": to("model.revision"),
    "trust_remote_code": to("model.trust_remote_code"),
    "adapter_name_or_path": lost("a run starts from a new adapter"),
    "quantization_bit": with_others("model.load_in_4bit", "4"),
    "quantization_method": moot("4 bits are NF4, by bitsandbytes"),
    "double_quantization": moot("4-bit scales are always quantised, too"),
    "stage": with_others("method"),
    "finetuning_type": with_others("train.parameters"),
    "freeze_trainable_layers": with_others("train.last_layers"),
    "freeze_trainable_modules": lost("a layer is trained whole"),
    "lora_rank": to("lora.rank", whole),
    "lora_alpha": with_others("lora.alpha", "twice the rank when it is left out"),
    "lora_dropout": to("lora.dropout", float),
    "lora_target": to("lora.targets", targets),
    "additional_target": to("lora.modules_to_save", names),
    "loraplus_lr_ratio": to("train.lora_plus_ratio", float),
    "loraplus_lr_embedding": lost("embeddings learn at train.learning_rate"),
    "use_rslora": to("lora.rslora"),
    "use_dora": to("lora.dora"),
    "pissa_init": to("lora.init", lambda value: "pissa" if value else None),
    "pissa_iter": moot("peft's own number of iterations"),
    "pissa_convert": lost("a pissa adapter is exported merged"),
    "create_new_adapter": moot("an adapter is always new"),
    "pref_beta": to("preference.beta", float),
    "pref_loss": with_others("method, preference.loss_type"),
    "pref_ftx": lost("dpo has no plain loss beside it"),
    "dpo_label_smoothing": to("preference.label_smoothing", float),
    "kto_chosen_weight": to("preference.desirable_weight", float),
    "kto_rejected_weight": to("preference.undesirable_weight", float),
    "ref_model": lost("the reference is the model before training (preference.reference)"),
    "use_galore": with_others("train.optimizer", "galore_adamw; " + _PROJECTED),
    "use_apollo": with_others("train.optimizer", "apollo_adamw; " + _PROJECTED),
    "galore_*": with_others("train.optimizer_args, train.optimizer_targets"),
    "apollo_*": with_others("train.optimizer_args, train.optimizer_targets"),
    "use_muon": with_others("train.optimizer", "muon"),
    "use_badam": lost("BAdam is not here"),
    "badam_*": lost("BAdam is not here"),
    "use_adam_mini": lost("Adam-mini is not here"),
    "dataset": with_others("data.train, data.columns", "looked up in dataset_info.json"),
    "eval_dataset": with_others("data.heldout", "looked up in dataset_info.json"),
    "dataset_dir": with_others("data.train"),
    "template": to("model.chat_template", one_of(_TEMPLATES)),
    "default_system": to("data.system"),
    "cutoff_len": to("model.max_length", whole),
    "max_samples": to("data.max_rows", whole),
    "val_size": to("data.heldout_fraction", share, "a share"),
    "train_on_prompt": to("data.loss_on", lambda value: "all" if value else None),
    "mask_history": lost("every turn of the assistant is learned"),
    "packing": with_others("train.batch_tokens", "whet always packs; see per_device_train_batch_size"),
    "neat_packing": moot("packed examples see only themselves"),
    "media_dir": moot("whet trains language models"),
    "buffer_size": moot("rows are shuffled as a whole"),
    "ignore_pad_token_for_loss": moot("nothing is padded"),
    "eval_on_each_dataset": lost("whet eval RUN --data FILE"),
    "eval_num_beams": lost("whet samples, or takes the likeliest token"),
    "infer_dtype": moot("weights are in model.dtype"),
    "low_cpu_mem_usage": moot("the planner sees to the memory"),
    "cache_dir": moot("the Hub's own settings hold (HF_HOME)"),
    "offload_folder": moot("the planner sees to the memory"),
    "use_fast_tokenizer": moot("read from the tokenizer's config"),
    "split_special_tokens": lost("special tokens in the data are tokens"),
    "new_special_tokens": lost("the tokenizer's own are used"),
    "add_tokens": lost("the tokenizer's own are used"),
    "shift_attn": lost("attention is the model's own"),
    "mixture_of_depths": lost("the model's own layers are used"),
    "moe_aux_loss_coef": lost("the model's own config is used"),
    "hf_hub_token": moot("the Hub's own login holds"),
    "compute_accuracy": lost("set eval.exact_match"),
    "streaming": to("data.streaming"),
    "preprocessing_num_workers": to("data.workers", whole),
    "preprocessing_batch_size": moot("rows are read one by one"),
    "overwrite_cache": moot("tokenised rows are found again by a hash of what made them"),
    "tokenized_path": moot("tokenised rows are kept in the user's cache"),
    "mix_strategy": lost("the sources' rows are put together (data.weights)"),
    "interleave_probs": lost("set data.weights"),
    "tool_format": lost("the chat template writes tools"),
    "enable_thinking": lost("the chat template decides"),
    "rope_scaling": lost("the model's own is used"),
    "resize_vocab": lost("the vocabulary stays as it is"),
    "flash_attn": moot("the engine chooses the attention"),
    "enable_liger_kernel": moot("the engine computes layers and loss"),
    "use_unsloth": moot("the engine computes layers and loss"),
    "use_unsloth_gc": moot("the planner decides what is recomputed (plan.policy)"),
    "disable_gradient_checkpointing": moot("the planner decides what is recomputed (plan.policy)"),
    "upcast_layernorm": moot("norms are computed in float32"),
    "pure_bf16": moot("weights are in model.dtype"),
    "plot_loss": moot("a run always draws its loss"),
    "include_num_input_tokens_seen": moot("metrics.jsonl counts tokens"),
    "run_name": to("run.name"),
    "use_swanlab": lost("whet does not write to SwanLab"),
    "predict_with_generate": lost("set eval.exact_match"),
}  # fmt: skip


def _together(reading: Reading) -> None:
    _set_method(reading)
    _set_parameters(reading)
    _set_optimizer(reading)
    for key, ours in (("dataset", "data.train"), ("eval_dataset", "data.heldout")):
        if reading.get(key):
            _set_data(reading, key, ours)
    packed = bool(
        reading.get("packing", reading.get("stage") == "pt") or reading.get("neat_packing")
    )
    set_batch(reading, "per_device_train_batch_size", "cutoff_len", packed)
    set_warmup(reading)
    set_schedule(reading)
    run_name = reading.ours.get("run.name")
    set_place(reading)
    reading.set("run.name", run_name)
    set_evaluation(reading)
    set_noise(reading, "neftune_noise_alpha")


def _set_method(reading: Reading) -> None:
    stage = str(reading.get("stage", "sft"))
    methods = {"pt": "pretrain", "sft": None, "rm": "reward", "dpo": "dpo", "kto": "kto"}
    if stage not in methods:
        raise fatal("stage", stage, "whet has pt, sft, rm, dpo and kto")
    method = methods[stage]
    if stage == "dpo":
        kind = str(reading.get("pref_loss", "sigmoid"))
        if kind not in ("sigmoid", "ipo", "hinge", "orpo"):
            raise fatal("pref_loss", kind, "whet has sigmoid, ipo, hinge and orpo")
        method = "orpo" if kind == "orpo" else "dpo"
        reading.set("preference.loss_type", None if kind in ("orpo", "sigmoid") else kind)
    reading.set("method", method)


def _set_parameters(reading: Reading) -> None:
    kind = str(reading.get("finetuning_type", "lora"))
    if kind not in ("lora", "full", "freeze"):
        raise fatal("finetuning_type", kind, "whet has lora, full and freeze")
    reading.set("train.parameters", {"freeze": "last_layers"}.get(kind, kind))
    if kind == "freeze":
        layers = whole(reading.get("freeze_trainable_layers", 2))
        if layers < 1:
            raise fatal(
                "freeze_trainable_layers", layers, "whet trains the last layers, not the first"
            )
        reading.set("train.last_layers", layers)
    if kind == "lora":
        rank = whole(reading.get("lora_rank"))
        reading.set("lora.alpha", float(reading.get("lora_alpha", 2 * rank)))
    bits = reading.get("quantization_bit")
    if bits is not None and whole(bits) == 4:
        reading.set("model.load_in_4bit", True)
    elif bits is not None:
        reading.lose("quantization_bit", f"{bits}: whet keeps frozen weights in 16 or 4 bits")


def _set_optimizer(reading: Reading) -> None:
    if reading.get("use_muon"):
        reading.set("train.optimizer", "muon")
    for name in ("galore", "apollo"):
        if not reading.get(f"use_{name}"):
            continue
        layerwise = "_layerwise" if reading.get(f"{name}_layerwise") else ""
        reading.set("train.optimizer", f"{name}_adamw{layerwise}")
        same = {
            "rank": "rank", "update_interval": "update_proj_gap", "scale": "scale", "proj": "proj",
            "proj_type": "proj_type", "scale_type": "scale_type",
        }  # fmt: skip
        found = {ours: reading.get(f"{name}_{key}") for key, ours in same.items()}
        reading.set(
            "train.optimizer_args", {k: v for k, v in found.items() if v is not None} or None
        )
        wished = names(reading.get(f"{name}_target", "all"))
        reading.set("train.optimizer_targets", None if wished == ["all"] else wished)


# Their columns -> ours, by the layout of the rows; and the columns that theirs are without a word.
_COLUMNS = {
    "pretrain": {"prompt": "text"},
    "alpaca": {
        "prompt": "instruction", "query": "input", "response": "output", "history": "history",
        "system": "system",
    },
    "sharegpt": {"messages": "conversations", "system": "system", "tools": "tools"},
    "ranking": {
        "prompt": "prompt", "query": "input", "messages": "messages", "chosen": "chosen",
        "rejected": "rejected", "system": "system", "tools": "tools",
    },
    "kto": {
        "prompt": "prompt", "response": "completion", "messages": "messages", "kto_tag": "label",
        "system": "system", "tools": "tools",
    },
}  # fmt: skip
_USUAL = {"prompt": "instruction", "query": "input", "response": "output"}
# What names a turn's parts and roles; whet reads all of these.
_TAGS = {
    "role_tag": ("from", "role"), "content_tag": ("value", "content"), "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant", "bot", "model"), "system_tag": ("system", "developer"),
    "observation_tag": ("observation", "tool", "function"), "function_tag": ("function_call",),
}  # fmt: skip
_ENTRY = (
    "hf_hub_url", "file_name", "formatting", "ranking", "columns", "tags", "split", "num_samples",
)  # fmt: skip


def _set_data(reading: Reading, key: str, ours: str) -> None:
    """Look the sets up in dataset_info.json, where that file can be found."""
    told, why_not = _dataset_info(reading)
    places, maps = [], []
    for name in names(reading.get(key)):
        entry = told.get(name)
        if not isinstance(entry, dict):
            reading.lose(
                key,
                f"'{name}' is explained by dataset_info.json, {why_not}: set {ours} to a file or Hub id",
            )
            places.append(name)
            continue
        places.append(_place(reading, key, name, entry))
        maps.append(_columns(reading, name, entry))
    reading.set(ours, places[0] if len(places) == 1 else places)
    if ours != "data.train":
        return
    if any(one != maps[0] for one in maps):
        reading.lose(
            key, "the sets name their columns differently, and data.columns is for all of them"
        )
    if len(places) > 1 and reading.get("max_samples"):
        reading.lose(
            "max_samples", "counts the rows of each set there, and data.max_rows those of all"
        )
    reading.set("data.columns", {k: v for one in maps for k, v in one.items()} or None)


def _place(reading: Reading, key: str, name: str, entry: dict[str, Any]) -> str:
    """Return a set's file or Hub id, with its split and number of rows, and tell what else it says."""
    for part in entry:
        if part not in _ENTRY and not (part.endswith("_hub_url") and "hf_hub_url" in entry):
            reading.lose(f"{name}.{part}", "whet takes a Hub id with a split, or files")
    if hub := entry.get("hf_hub_url"):
        place = f"{hub}:{entry['split']}" if entry.get("split") else hub
    else:
        if not entry.get("file_name"):
            reading.lose(
                key, f"'{name}' is made by a script or comes from another hub: set data.train"
            )
        folder = str(reading.get("dataset_dir", "data"))
        place = posixpath.normpath(f"{folder}/{entry.get('file_name', name)}")
    return f"{place}#{entry['num_samples']}" if entry.get("num_samples") else place


def _columns(reading: Reading, name: str, entry: dict[str, Any]) -> dict[str, str]:
    """Return our column map of one set: only what differs from the format's own names."""
    kind = str(entry.get("formatting", "alpaca"))
    given, tags = entry.get("columns", {}), entry.get("tags", {})
    layout = {"pt": "pretrain", "kto": "kto"}.get(str(reading.get("stage")), kind)
    layout = "ranking" if entry.get("ranking") else layout
    table = dict(_COLUMNS.get(layout, {}))
    if layout == "sharegpt" and tags.get("role_tag") == "role":
        table["messages"] = "messages"
    usual = _USUAL if kind == "alpaca" and layout != "alpaca" and not given else {}
    for tag, value in tags.items():
        if value not in _TAGS.get(tag, ()):
            reading.lose(f"{name}.{tag}", f"{value}: whet does not know it (data.formatting)")
    for column in given:
        if column not in table:
            reading.lose(f"{name}.{column}", "rows of this kind have no such column here")
    found = {ours: given.get(theirs) or usual.get(theirs) for theirs, ours in table.items()}
    return {ours: column for ours, column in found.items() if column and column != ours}


def _dataset_info(reading: Reading) -> tuple[dict[str, Any], str]:
    """Return what dataset_info.json holds, and the words for a set that it does not explain."""
    folder = Path(str(reading.get("dataset_dir", "data")))
    for place in (folder, reading.folder / folder, reading.folder):
        file = place / "dataset_info.json"
        if file.is_file():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError):
                return {}, "which is not JSON"
            return (found, "which does not have it") if isinstance(found, dict) else ({}, "a list")
    return {}, "which was not found"


LLAMA_FACTORY = Dialect(
    "LLaMA-Factory",
    _RULES,
    {
        "lora_rank": 8, "learning_rate": 5e-5, "num_train_epochs": 3.0, "lr_scheduler_type": "linear",
        "per_device_train_batch_size": 8, "cutoff_len": 2048, "seed": 42, "save_steps": 500,
    },
    _together,
)  # fmt: skip
