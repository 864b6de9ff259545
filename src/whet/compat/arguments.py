"""Arguments of the drop-in API: which mean something here, which do not, and what old names became.

Scripts in the wild were written for several years of Unsloth, transformers and trl. An argument that
has nothing to do here is accepted and named once in a warning, with the reason; one that nobody knows
is an error. Names that transformers 5 and trl 1 dropped are translated for `TrainingArguments` and
`SFTConfig` as whet offers them; their objects are the libraries' own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from whet.errors import InputError, did_you_mean

if TYPE_CHECKING:
    import transformers

_NO_VLLM = "whet generates with transformers, not with vLLM"
_ONE_NAME = "whet loads the model that is named and no other"

# Arguments of Unsloth's functions that have nothing to do here, and why.
MEANINGLESS: Mapping[str, str] = {
    "fast_inference": _NO_VLLM,
    "gpu_memory_utilization": _NO_VLLM,
    "float8_kv_cache": _NO_VLLM,
    "max_lora_rank": _NO_VLLM,
    "disable_log_stats": _NO_VLLM,
    "unsloth_vllm_standby": _NO_VLLM,
    "use_exact_model_name": _ONE_NAME,
    "fix_tokenizer": "whet loads the tokenizer as it was published",
    "resize_model_vocab": "call model.resize_token_embeddings where the vocabulary grew",
    "fullgraph": "whet's engine is not compiled by torch",
    "unsloth_force_compile": "whet's engine is not compiled by torch",
    "unsloth_tiled_mlp": "the engine works through long passes in blocks as it is",
    "offload_embedding": "`plan.embeddings: cpu` in a config of `whet train` does that",
    "float32_mixed_precision": "dtype says what the weights and products are",
    "return_logits": "the engine's output makes logits when they are looked at",
    "temporary_location": "files are written beside their place and renamed",
    "maximum_memory_usage": "a model is merged in host memory, four bytes a parameter",
    "is_main_process": "whet writes from the process that is asked to",
    "save_function": "weights are written as safetensors",
    "safe_serialization": "weights are always written as safetensors",
    "save_peft_format": "adapters are always written as peft reads them",
    "state_dict": "the model's own weights are written",
    "variant": "files have transformers' own names",
    "datasets": "the model card is yours to write",
    "finetune_vision_layers": "whet trains the language model",
    "finetune_language_layers": "whet trains the language model",
    "finetune_attention_modules": "name the modules in target_modules",
    "finetune_mlp_modules": "name the modules in target_modules",
}
# Of trl's earlier trainers.
OLD_TRL = {
    "num_of_sequences": "trl packs whole datasets now",
    "chars_per_token": "trl packs whole datasets now",
    "infinite": "max_steps says how long a run is",
    "dataset_batch_size": "trl maps datasets row by row now",
}
# Of transformers' earlier TrainingArguments.
_OLD_TRANSFORMERS = {
    "logging_dir": "transformers 5 reads TENSORBOARD_LOGGING_DIR",
    "overwrite_output_dir": "the Trainer writes into output_dir as it is",
    "half_precision_backend": "torch's own is the only one left",
    "fp16_backend": "torch's own is the only one left",
    "fp16_opt_level": "torch's own half precision has no levels",
    "save_safetensors": "transformers 5 always writes safetensors",
    "use_legacy_prediction_loop": "transformers 5 has one loop",
    "use_mps_device": "the device is found",
    "past_index": "transformers 5 dropped it",
    "tpu_num_cores": "transformers 5 dropped it",
    "use_ipex": "transformers 5 dropped it",
    "jit_mode_eval": "transformers 5 dropped it",
    "ray_scope": "transformers 5 dropped it",
    "mp_parameters": "transformers 5 dropped it",
    "sharded_ddp": "transformers 5 dropped it",
    "include_tokens_per_second": "include_num_input_tokens_seen counts tokens",
    "push_to_hub_organization": "write it in front of hub_model_id",
}
_RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
    "use_liger": "use_liger_kernel",
    "max_seq_length": "max_length",
}


def sort_out(
    function: str,
    given: Mapping[str, Any],
    known: Iterable[str],
    idle: Mapping[str, str] | None = None,
) -> None:
    """Warn of arguments that have nothing to do, and refuse those that nobody knows.

    Args:
        function: What was called, for the sentence.
        given: Arguments that no parameter took.
        known: Names that would have been right.
        idle: More names that have nothing to do here, with the reason.

    Raises:
        InputError: An argument is unknown; it is also a TypeError, as Python's own would be.
    """
    reasons = {**MEANINGLESS, **(idle or {})}
    strange = [name for name in given if name not in reasons]
    if strange:
        guesses = {name: did_you_mean(name, [*known, *reasons]) for name in strange}
        raise UnknownArgument(
            f"{function} has no argument {', '.join(map(repr, strange))}",
            fix="; ".join(f"did you mean '{g}'?" for g in guesses.values() if g)
            or "docs/compat.md lists what it takes",
        )
    if given:
        _warn(f"{function}: nothing to do for " + _listed({n: reasons[n] for n in given}))


class UnknownArgument(InputError, TypeError):
    """An argument that nobody knows; scripts that catch TypeError catch it too."""


def TrainingArguments(*args: Any, **kwargs: Any) -> transformers.TrainingArguments:
    """Make transformers' TrainingArguments from names of this and of earlier versions.

    Args:
        *args: As transformers takes them.
        **kwargs: As transformers takes them, or as it did; on a machine without CUDA `fp16` and `bf16`
            are left out, for the weights' own type says there how products are computed.

    Returns:
        An object of transformers' own class.

    Raises:
        InputError: An argument is unknown to every version.
    """
    from transformers import TrainingArguments as Original

    return Original(*args, **translated("TrainingArguments", Original, kwargs))


def translated(name: str, original: type, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Give arguments the names that a class of transformers or trl has for them today.

    Args:
        name: The class's name, for the sentences.
        original: The class, a dataclass.
        kwargs: Arguments under any of their names.

    Raises:
        InputError: An argument is unknown to every version.
    """
    known = {field.name for field in fields(original) if field.init}
    found = {key: value for key, value in kwargs.items() if key in known}
    old = {key: value for key, value in kwargs.items() if key not in known}
    for key in [k for k in old if k in _RENAMED and _RENAMED[k] in known]:
        found.setdefault(_RENAMED[key], old.pop(key))
    _translate_ratio(old, found)
    if "group_by_length" in old and "train_sampling_strategy" in known:
        if old.pop("group_by_length"):
            found["train_sampling_strategy"] = "group_by_length"
    if old.pop("adafactor", False):
        found["optim"] = "adafactor"
    if old.pop("include_inputs_for_metrics", False):
        found["include_for_metrics"] = ["inputs"]
    moved = {k: old.pop(k) for k in ("dispatch_batches", "split_batches") if k in old}
    if any(value is not None for value in moved.values()):
        accelerator = dict(found.get("accelerator_config") or {})
        found["accelerator_config"] = {**accelerator, **moved}
    sort_out(name, old, [*known, *_RENAMED], {**_OLD_TRANSFORMERS, **OLD_TRL})
    return without_mixed_precision(name, found)


def _translate_ratio(old: dict[str, Any], found: dict[str, Any]) -> None:
    """A share of all steps is a number of warm-up steps below 1 in transformers 5."""
    ratio = old.pop("warmup_ratio", None)
    if ratio and not found.get("warmup_steps"):
        found["warmup_steps"] = ratio


def without_mixed_precision(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Turn mixed precision off where there is no CUDA device for it, and say so.

    Without CUDA, fp16 ends in an error of accelerate's and bf16 in one of transformers', unless
    `use_cpu` asks for autocast on the CPU.

    Args:
        name: The class's name, for the sentence.
        settings: Arguments of TrainingArguments.
    """
    from whet.model.load import device

    if device().type == "cuda":
        return settings
    asked = [key for key in ("fp16", "bf16") if settings.get(key)]
    if settings.get("use_cpu"):
        asked = [key for key in asked if key == "fp16"]
    if asked:
        _warn(
            f"{name}: {' and '.join(asked)} is off, for there is no CUDA device; the model's dtype "
            "says how products are computed"
        )
    return {**settings, **dict.fromkeys(asked, False)}


def _listed(reasons: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({reason})" for name, reason in reasons.items())


def _warn(text: str) -> None:
    """Warn at the line of the first caller outside of whet."""
    warnings.warn(text, UserWarning, stacklevel=_frames_inside())


def _frames_inside() -> int:
    import inspect

    frame, number = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").startswith("whet."):
        frame, number = frame.f_back, number + 1
    return number  # the caller of this function is level 1
