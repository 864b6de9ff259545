"""What `from_pretrained` has to settle before and after the weights are read."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.errors import InputError
from whet.model import CausalLM, Tokenizer
from whet.model.load import (
    DEFAULT_MAX_LENGTH,
    SHORT_NAMES,
    choose_dtype,
    load_model,
    load_model_config,
    load_tokenizer,
)
from whet.runs import RunFolder
from whet.sections import ModelSection

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_DTYPES = ("float32", "bfloat16", "float16")
# Tokens that families keep for padding, or that nothing else uses; the first that is there is taken.
_PAD_TOKENS = (
    "<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|vision_pad|>", "<|endoftext|>",
    "<|reserved_special_token_0|>", "<unk>", "<|unk|>",
)  # fmt: skip


@dataclass(frozen=True)
class Wish:
    """What `FastLanguageModel.from_pretrained` was asked for, under its names; `hub` holds the rest."""

    model_name: str
    max_seq_length: int | None
    dtype: Any
    load_in_4bit: bool
    load_in_8bit: bool
    load_in_16bit: bool
    full_finetuning: bool
    device_map: Any
    rope_scaling: dict[str, Any] | None
    trust_remote_code: bool
    revision: str | None
    tokenizer_name: str | None
    attn_implementation: str | None
    hub: dict[str, Any]


def load_both(wish: Wish) -> tuple[CausalLM, Tokenizer, ModelSection, dict[str, Any]]:
    """Load a model, with its adapter if the name is an adapter's, and its tokenizer.

    Returns:
        The model, the tokenizer, the base model's name and kind, and what transformers was given.

    Raises:
        InputError: There is no such model, or it cannot be what is wished.
    """
    if wish.load_in_8bit and wish.load_in_16bit:
        raise InputError("load_in_8bit and load_in_16bit exclude each other", fix="set one")
    name, full = wish.model_name, wish.full_finetuning
    if RunFolder.is_run(name):
        name = str(RunFolder.open(name).weights_dir)
    adapter = _adapter_config(name, wish.revision, wish.hub)
    section = ModelSection(
        name=name if adapter is None else str(adapter.base_model_name_or_path),
        revision=wish.revision if adapter is None else adapter.revision,
        load_in_4bit=wish.load_in_4bit and not (wish.load_in_8bit or wish.load_in_16bit or full),
        trust_remote_code=wish.trust_remote_code,
    )
    config = load_model_config(section, wish.hub)
    length = settle_length(config, section.name, wish.max_seq_length, wish.rope_scaling)
    options = {**wish.hub, "config": config}
    if wish.attn_implementation is not None:
        options["attn_implementation"] = wish.attn_implementation
    if wish.device_map not in ("sequential", "auto", "balanced", None):
        options["device_map"] = wish.device_map
    if wish.load_in_8bit and not full:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    model = load_model(section, _dtype(wish.dtype, full, wish.load_in_16bit), options=options)
    folder = _tokenizer_folder(name, wish.tokenizer_name, adapter is not None)
    tokenizer = load_tokenizer(section, folder, wish.hub)
    _settle_tokenizer(tokenizer, model, length)
    model.max_seq_length = length
    if adapter is not None:
        from peft import PeftModel

        more = {"is_trainable": True, "revision": wish.revision, **wish.hub}
        model = PeftModel.from_pretrained(model, name, **more)
    return model, tokenizer, section, options


def settle_length(
    config: Any, name: str, wanted: int | None, rope_scaling: dict[str, Any] | None
) -> int:
    """Set a config's longest text, scaling its rotary embedding where that is needed.

    Args:
        config: The model's config; it is changed in place.
        name: The model's name, for the sentences.
        wanted: Longest text in tokens, or None.
        rope_scaling: What the user wants the rotary embedding to be, or None.

    Returns:
        The longest text in tokens.

    Raises:
        InputError: The model cannot be stretched.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None)
    if rope_scaling is not None:
        if not isinstance(rope, dict):
            raise InputError(f"rope_scaling is given, and '{name}' has no rotary embedding")
        given = {"rope_type" if k == "type" else k: v for k, v in rope_scaling.items()}
        kept = {k: v for k, v in rope.items() if k in ("rope_theta", "partial_rotary_factor")}
        text.rope_parameters = {**kept, **given}
        stretched = int(limit * float(given.get("factor", 1))) if limit else None
        if given.get("rope_type") in ("yarn", "llama3", "longrope"):
            text.rope_parameters.setdefault("original_max_position_embeddings", limit)
        if given.get("rope_type") != "dynamic":  # it reads the original length there
            longest = max(filter(None, (limit, stretched, wanted)), default=None)
            text.max_position_embeddings = longest
        return wanted or min(stretched or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    if wanted is None:
        return min(limit or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    if limit is None or wanted <= limit:
        return wanted
    simple = isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values())
    if not (isinstance(rope, dict) and simple and rope.get("rope_type", "default") == "default"):
        raise InputError(
            f"max_seq_length is more than '{name}' can take ({limit} tokens), and its positions "
            "cannot be stretched by a factor", wanted,
            f"set max_seq_length={limit} or less, or give rope_scaling",
        )  # fmt: skip
    factor = wanted / limit
    text.rope_parameters = {**rope, "rope_type": "linear", "factor": factor}
    text.max_position_embeddings = wanted
    logger.warning(
        "max_seq_length %d is more than the %d tokens '%s' was made for: its rotary embedding is "
        "scaled linearly by %.3g, which training has to make up for",
        wanted, limit, name, factor,
    )  # fmt: skip
    return wanted


def _dtype(wanted: Any, full: bool, sixteen: bool) -> torch.dtype:
    import torch

    name = None if wanted in (None, "auto") else str(wanted).removeprefix("torch.")
    if name is not None and name not in _DTYPES:
        raise InputError(
            "dtype is none that models are trained in", wanted, f"use None, {', '.join(_DTYPES)}"
        )
    chosen, reason = choose_dtype(name, full)
    if sixteen and not full and chosen is torch.float32 and name is None:
        chosen, reason = torch.bfloat16, "because load_in_16bit is set"
    logger.info("%s %s", chosen, reason if name is None else "as dtype says")
    return chosen


def _adapter_config(name: str, revision: str | None, hub: dict[str, Any]) -> Any:
    """Return the adapter's config if a name is an adapter's, else None."""
    if name in SHORT_NAMES or name.lower().endswith(".gguf"):
        return None
    from transformers.utils.peft_utils import find_adapter_config_file

    if find_adapter_config_file(name, revision=revision, **hub) is None:
        return None
    from peft import PeftConfig

    return PeftConfig.from_pretrained(name, revision=revision, **hub)


def _tokenizer_folder(name: str, wanted: str | None, is_adapter: bool) -> str | None:
    """Return where the tokenizer is when it is not the base model's."""
    if wanted is not None:
        return wanted
    return name if is_adapter and (Path(name) / "tokenizer_config.json").is_file() else None


def _settle_tokenizer(tokenizer: Tokenizer, model: CausalLM, length: int) -> None:
    """Give a tokenizer a padding token of its own where there is one, and the longest text."""
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = length
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        vocabulary = tokenizer.get_vocab()
        taken = {tokenizer.eos_token, tokenizer.bos_token}
        free = [token for token in _PAD_TOKENS if token in vocabulary and token not in taken]
        if free:
            tokenizer.pad_token = free[0]
            logger.warning("the tokenizer pads with %s, for it had no token of its own", free[0])
        else:
            logger.warning(
                "the tokenizer pads with its end of text, %s: a collator that hides padding by its "
                "id hides that token too", tokenizer.eos_token,
            )  # fmt: skip
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
