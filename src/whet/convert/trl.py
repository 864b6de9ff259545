"""The YAML of trl's command line (`trl sft --config`), after its documentation.

Which trainer is meant stands in the command and not in the file: it is read off the keys.
"""

from __future__ import annotations

from whet.convert.rules import (
    Dialect,
    Reading,
    Rule,
    fatal,
    lost,
    moot,
    names,
    set_batch,
    set_evaluation,
    set_noise,
    set_place,
    set_schedule,
    set_warmup,
    targets,
    to,
    whole,
    with_others,
)
from whet.convert.training import TRAINING

_RULES: dict[str, Rule] = TRAINING | {
    "model_name_or_path": to("model.name"),
    "model_revision": to("model.revision"),
    "trust_remote_code": to("model.trust_remote_code"),
    "dtype": to("model.dtype", lambda value: None if value == "auto" else value),
    "torch_dtype": to("model.dtype", lambda value: None if value == "auto" else value),
    "load_in_4bit": to("model.load_in_4bit"),
    "load_in_8bit": lost("whet keeps frozen weights in 16 or 4 bits: model.load_in_4bit"),
    "attn_implementation": moot("the engine chooses the attention"),
    "use_peft": with_others("train.parameters", "without it every weight is trained"),
    "lora_r": to("lora.rank", whole),
    "lora_alpha": to("lora.alpha", float),
    "lora_dropout": to("lora.dropout", float),
    "lora_target_modules": to("lora.targets", targets),
    "lora_modules_to_save": to("lora.modules_to_save", names),
    "use_rslora": to("lora.rslora"),
    "use_dora": to("lora.dora"),
    "dataset_name": with_others("data.train"),
    "dataset_config": lost("whet takes a Hub id with a split, or files"),
    "dataset_train_split": with_others("data.train"),
    "dataset_test_split": with_others("data.heldout", "where eval_strategy is on"),
    "dataset_streaming": to("data.streaming"),
    "dataset_num_proc": to("data.workers", whole),
    "dataset_text_field": to(
        "data.columns", lambda value: None if value == "text" else {"text": value}
    ),
    "chat_template_path": to("model.chat_template"),
    "max_length": to("model.max_length", whole),
    "packing": with_others(
        "train.batch_tokens", "whet always packs; see per_device_train_batch_size"
    ),
    "packing_strategy": moot("the planner packs"),
    "padding_free": moot("nothing is padded"),
    "pad_to_multiple_of": moot("nothing is padded"),
    "eval_packing": moot("examples are always packed, and see only themselves"),
    "assistant_only_loss": with_others("data.loss_on", "false: every token of conversations"),
    "completion_only_loss": moot("the answer is learned (data.loss_on)"),
    "beta": with_others("method, preference.beta, grpo.beta"),
    "loss_type": with_others("method, preference.loss_type"),
    "label_smoothing": to("preference.label_smoothing", float),
    "precompute_ref_log_probs": moot("the reference is the same model on the same pass"),
    "desirable_weight": to("preference.desirable_weight", float),
    "undesirable_weight": to("preference.undesirable_weight", float),
    "num_generations": to("grpo.num_generations", whole),
    "max_completion_length": to("grpo.max_new_tokens", whole),
    "temperature": to("grpo.temperature", float),
    "reward_funcs": to(
        "grpo.reward", lambda value: [":".join(str(n).rsplit(".", 1)) for n in names(value)]
    ),
    "use_vllm": lost("answers are sampled by transformers"),
    "vllm_*": lost("answers are sampled by transformers"),
    "run_name": to("run.name"),
}


def _together(reading: Reading) -> None:
    reading.set("train.parameters", "lora" if reading.get("use_peft") else "full")
    grpo = any(
        reading.get(key) for key in ("num_generations", "reward_funcs", "max_completion_length")
    )
    kind = str(reading.get("loss_type") or "")
    if grpo:
        reading.set("method", "grpo")
        reading.set("grpo.beta", reading.get("beta"))
    elif any(reading.get(key) is not None for key in ("desirable_weight", "undesirable_weight")):
        reading.set("method", "kto")
        reading.set("preference.beta", reading.get("beta"))
    elif reading.get("beta") is not None or kind in ("sigmoid", "ipo", "hinge"):
        reading.set("method", "dpo")
        reading.set("preference.beta", reading.get("beta"))
        if kind not in ("", "sigmoid", "ipo", "hinge"):
            raise fatal("loss_type", kind, "whet has sigmoid, ipo and hinge")
        reading.set("preference.loss_type", kind or None)
    elif kind not in ("", "nll", "chunked_nll"):
        reading.lose("loss_type", f"{kind}: the loss is the plain one")
    if "method" not in reading.ours:
        _set_loss(reading)
    name, split = reading.get("dataset_name"), reading.get("dataset_train_split")
    reading.set("data.train", f"{name}:{split}" if name and split else name)
    if name and str(reading.get("eval_strategy", "no")) != "no":
        reading.set("data.heldout", f"{name}:{reading.get('dataset_test_split', 'test')}")
    set_batch(reading, "per_device_train_batch_size", "max_length", bool(reading.get("packing")))
    set_warmup(reading)
    set_schedule(reading)
    run_name = reading.ours.get("run.name")
    set_place(reading)
    reading.set("run.name", run_name)
    set_evaluation(reading)
    set_noise(reading, "neftune_noise_alpha")


def _set_loss(reading: Reading) -> None:
    """Say what is learned of a conversation: all of it in trl, unless the key says otherwise."""
    only = reading.get("assistant_only_loss")
    if only is False:
        reading.set("data.loss_on", "all")
    elif only is None:
        reading.lose(
            "assistant_only_loss",
            "left out, trl learns every token of a conversation, and whet the assistant's turns: "
            "data.loss_on: all for the former",
        )


TRL = Dialect(
    "trl",
    _RULES,
    {
        "learning_rate": 2e-5, "num_train_epochs": 3.0, "lr_scheduler_type": "linear", "seed": 42,
        "per_device_train_batch_size": 8, "max_length": 1024, "save_steps": 500,
    },
    _together,
)  # fmt: skip
