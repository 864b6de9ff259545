"""Export a run as a peft adapter or as a plain Hugging Face model with the adapter merged in.

A merged model is written shard by shard from tensors that are read and merged one at a time; the most
that is in memory is a shard. What cannot be merged so is merged whole, and that is said.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from whet.errors import InputError
from whet.export.card import model_card
from whet.export.tensors import NotStreamable, Weights, checkpoint_folder, open_weights
from whet.generate import end_token_ids
from whet.model import CausalLM, Tokenizer
from whet.model.load import choose_dtype, forget_quantization, load_model, load_tokenizer
from whet.runs import RunFolder, require_free, whole_folder, write_text

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
BASES = ("original", "dequantised")
SHARD_BYTES = 2 * 2**30


def export_adapter(run: RunFolder, folder: Path) -> None:
    """Write the adapter with its tokenizer, as `peft.PeftModel.from_pretrained` reads it.

    Args:
        run: A finished run that trained an adapter.
        folder: Where to; it is replaced whole.

    Raises:
        InputError: The run trained the model itself.
        WhetError: The disk is full.
    """
    if not run.adapter_dir.is_dir():
        raise InputError(
            f"run '{run.path}' trained the model itself: it has no adapter", fix="use --to merged"
        )
    with whole_folder(folder) as temporary:
        shutil.copytree(run.adapter_dir, temporary, dirs_exist_ok=True)
        write_text(temporary / "README.md", model_card(run, "adapter"))


def export_merged(
    run: RunFolder,
    folder: Path,
    dtype_name: str | None = None,
    base: str = "original",
    bits: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> torch.dtype:
    """Write a plain model: W + s B A added in float32, rounded once to the target type.

    Args:
        run: A finished run.
        folder: Where to; it is replaced whole.
        dtype_name: One of DTYPES; None is the type the run computed in.
        base: What a QLoRA run is merged into: one of BASES.
        bits: 4 to quantise the merged model to NF4.
        shard_bytes: Largest file.

    Returns:
        The type that was written.

    Raises:
        InputError: The base is asked for and the run has no such one.
        WhetError: The disk is full.
    """
    dtype = run_dtype(run, dtype_name)
    tokenizer = load_tokenizer(run.config.model, run.weights_dir)
    with tuned_weights(run, base) as weights, whole_folder(folder) as temporary:
        source = source_folder(run)
        if bits is None:
            write_merged(weights, tokenizer, temporary, dtype, source, shard_bytes)
        else:
            with TemporaryDirectory(dir=folder.absolute().parent) as scratch:
                write_merged(weights, tokenizer, Path(scratch), dtype, source, shard_bytes)
                write_in_4bit(Path(scratch), temporary, dtype, tokenizer, shard_bytes)
        write_text(temporary / "README.md", model_card(run, "merged"))
    return dtype


def run_dtype(run: RunFolder, name: str | None = None) -> torch.dtype:
    """Return the type a run's merged weights are written in.

    Args:
        run: The run.
        name: One of DTYPES; None is the type the run computed in.
    """
    config = run.config
    dtype, _ = choose_dtype(name or config.model.dtype, config.train.parameters != "lora")
    return dtype


def source_folder(run: RunFolder) -> Path:
    """Return the folder that a run's base model, or its own, stands in."""
    return (
        run.model_dir if run.weights_dir == run.model_dir else checkpoint_folder(run.config.model)
    )


@contextlib.contextmanager
def tuned_weights(run: RunFolder, base: str = "original") -> Iterator[Weights]:
    """Give the body a run's weights, to be read one by one.

    Args:
        run: A finished run.
        base: What a QLoRA run is merged into: one of BASES.

    Raises:
        InputError: The base is asked for and the run has no such one.
    """
    config = run.config
    plain = config.model.model_copy(update={"load_in_4bit": False})
    dequantised = None
    if base == "dequantised":
        if not (config.model.load_in_4bit and run.adapter_dir.is_dir()):
            raise InputError(
                "--base dequantised is for a run with model.load_in_4bit: this one was trained on the "
                "original weights", fix="leave --base out",
            )  # fmt: skip
        dequantised = run_dtype(run)
    adapter = run.adapter_dir if run.adapter_dir.is_dir() else None
    try:
        weights = open_weights(
            plain, adapter, None if adapter else run.model_dir, dequantised
        )  # fmt: skip
    except NotStreamable as reason:
        logger.warning("%s: the model is merged whole, in float32, in memory", reason)
        with TemporaryDirectory(dir=run.path) as scratch:
            _merge_whole(run, plain, Path(scratch))
            yield open_weights(plain, folder=Path(scratch))
        return
    yield weights


def _merge_whole(run: RunFolder, plain: Any, folder: Path) -> None:
    import torch
    from peft import PeftModel

    model: Any = load_model(plain, torch.float32)
    if getattr(model, "is_quantized", False):
        model = model.dequantize().float()
        forget_quantization(model)
    model = PeftModel.from_pretrained(model, str(run.adapter_dir)).merge_and_unload(safe_merge=True)
    model.save_pretrained(str(folder))


def write_merged(
    weights: Weights,
    tokenizer: Tokenizer,
    folder: Path,
    dtype: torch.dtype,
    source: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write weights as a plain Hugging Face model, a shard at a time.

    Args:
        weights: The model.
        tokenizer: Its tokenizer.
        folder: Where to; it exists.
        dtype: The type that is written.
        source: The base model's folder, for its generation config and code.
        shard_bytes: Largest file.

    Raises:
        WhetError: The disk is full.
    """
    from safetensors.torch import save_file

    plan = _plan_shards(weights, dtype, shard_bytes)
    total = sum(size for shard in plan for size in shard.values())
    require_free(folder, total, "the merged model")
    where: dict[str, str] = {}
    for number, names in enumerate(plan, 1):
        file = "model.safetensors"
        if len(plan) > 1:
            file = f"model-{number:05}-of-{len(plan):05}.safetensors"
        shard = {
            name: weights.read(name).to(_type_of(weights, name, dtype)).contiguous()
            for name in names
        }
        save_file(shard, folder / file, metadata={"format": "pt"})
        del shard
        where.update(dict.fromkeys(names, file))
    if len(plan) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    weights.config.dtype = dtype
    if not weights.config.architectures:  # what vLLM finds the model's class by
        weights.config.architectures = [architecture_of(weights.config)]
    weights.config.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    _write_generation_config(weights.config, tokenizer, folder, source)
    for code in source.glob("*.py") if source else ():
        shutil.copy(code, folder)


def architecture_of(config: Any) -> str:
    """Return the name of the class that a model of this config is.

    Args:
        config: A transformers config of a causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return type(AutoModelForCausalLM.from_config(config)).__name__


def _type_of(weights: Weights, name: str, dtype: torch.dtype) -> torch.dtype:
    own = weights.infos[name].dtype
    # A count or a mask stays one, and so does what picks DeepSeek's experts, by small differences.
    return dtype if own.is_floating_point and not name.endswith("e_score_correction_bias") else own


def _plan_shards(weights: Weights, dtype: torch.dtype, limit: int) -> list[dict[str, int]]:
    """Share the tensors out to files, in their order; a tensor larger than the limit has its own."""
    plan: list[dict[str, int]] = [{}]
    for name, info in weights.infos.items():
        size = _type_of(weights, name, dtype).itemsize
        for length in info.shape:
            size *= length
        if plan[-1] and sum(plan[-1].values()) + size > limit:
            plan.append({})
        plan[-1][name] = size
    return plan


def _write_generation_config(
    config: Any, tokenizer: Tokenizer, folder: Path, source: Path | None
) -> None:
    """Have the exported model stop where training taught it to stop."""
    from transformers import GenerationConfig

    if source is not None and (source / "generation_config.json").is_file():
        settings = GenerationConfig.from_pretrained(str(source))
    else:
        settings = GenerationConfig.from_model_config(config)
    _set_turn_end(settings, tokenizer)
    settings.save_pretrained(str(folder))


def _set_turn_end(settings: Any, tokenizer: Tokenizer) -> None:
    found = end_token_ids(SimpleNamespace(generation_config=settings), tokenizer)
    settings.eos_token_id = found[0] if len(found) == 1 else found
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id


def write_in_4bit(
    merged: Path,
    folder: Path,
    dtype: torch.dtype,
    tokenizer: Tokenizer,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Quantise a merged model to NF4 with bitsandbytes, as transformers loads it again.

    Args:
        merged: The folder of the model in 16 or 32 bit.
        folder: Where to; it exists.
        dtype: Type of the products.
        tokenizer: Its tokenizer.
        shard_bytes: Largest file.
    """
    from whet.sections import ModelSection

    quantised = load_model(ModelSection(name=str(merged), load_in_4bit=True), dtype)
    quantised.save_pretrained(str(folder), max_shard_size=shard_bytes)
    tokenizer.save_pretrained(str(folder))


def write_model(
    model: CausalLM,
    tokenizer: Any,
    folder: Path,
    dtype: torch.dtype,
    max_shard_size: str | int = "5GB",
) -> None:
    """Write a plain model that is in memory, with its tokenizer.

    Args:
        model: The model, without an adapter; it is cast in place.
        tokenizer: Its tokenizer, or None to write the weights alone.
        folder: Where to; it exists.
        dtype: The type that is written.
        max_shard_size: Largest file.

    Raises:
        WhetError: The disk is full.
    """
    model = model.to(dtype)
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    require_free(folder, num_bytes, "the merged model")
    if tokenizer is not None:
        assert model.generation_config is not None
        _set_turn_end(model.generation_config, tokenizer)
        tokenizer.save_pretrained(str(folder))
    model.save_pretrained(str(folder), max_shard_size=max_shard_size)
