"""Export a run as a peft adapter or as a plain Hugging Face model with the adapter merged in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.config_file import to_yaml
from whet.errors import InputError
from whet.generate import end_token_ids
from whet.model import CausalLM
from whet.model.load import choose_dtype, load_model, load_tokenizer
from whet.runs import RunFolder, require_free, whole_folder, write_text
from whet.trained import load_adapted

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


def export_adapter(run: RunFolder, folder: Path) -> None:
    """Write the adapter with its tokenizer, as `peft.PeftModel.from_pretrained` reads it.

    Args:
        run: A finished run that trained an adapter.
        folder: Where to; it is replaced whole.

    Raises:
        InputError: The run trained the model itself.
        WhetError: The disk is full.
    """
    import shutil

    if not run.adapter_dir.is_dir():
        raise InputError(
            f"run '{run.path}' trained the model itself: it has no adapter", fix="use --to merged"
        )
    with whole_folder(folder) as temporary:
        shutil.copytree(run.adapter_dir, temporary, dirs_exist_ok=True)
        write_text(temporary / "README.md", model_card(run, "adapter"))


def export_merged(run: RunFolder, folder: Path, dtype_name: str | None = None) -> torch.dtype:
    """Write a plain model: W + s B A added in float32, rounded once to the target type.

    A QLoRA run is merged into the original weights, not into their 4-bit copies.

    Args:
        run: A finished run.
        folder: Where to; it is replaced whole.
        dtype_name: One of DTYPES; None is the type the run computed in.

    Returns:
        The type that was written.

    Raises:
        WhetError: The disk is full.
    """
    import torch

    config = run.config
    dtype, _ = choose_dtype(dtype_name or config.model.dtype, config.train.parameters != "lora")
    plain = config.model.model_copy(update={"load_in_4bit": False})
    if run.adapter_dir.is_dir():
        model: Any = load_adapted(plain, torch.float32, run).merge_and_unload(safe_merge=True)
    else:
        model = load_model(plain, torch.float32, run.model_dir)
    tokenizer = load_tokenizer(config.model, run.weights_dir)
    with whole_folder(folder) as temporary:
        write_model(model, tokenizer, temporary, dtype)
        write_text(temporary / "README.md", model_card(run, "merged"))
    return dtype


def write_model(
    model: CausalLM,
    tokenizer: Any,
    folder: Path,
    dtype: torch.dtype,
    max_shard_size: str | int = "5GB",
) -> None:
    """Write a plain model with its tokenizer.

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
        _set_turn_end(model, tokenizer)
        tokenizer.save_pretrained(str(folder))
    model.save_pretrained(str(folder), max_shard_size=max_shard_size)


def _set_turn_end(model: CausalLM, tokenizer: Any) -> None:
    """Have the exported model stop where training taught it to stop."""
    settings = model.generation_config
    assert settings is not None
    found = end_token_ids(model, tokenizer)
    settings.eos_token_id = found[0] if len(found) == 1 else found
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id


def model_card(run: RunFolder, kind: str) -> str:
    """Return a README.md with the run's data, settings and scores.

    Args:
        run: A finished run.
        kind: `adapter` or `merged`.
    """
    config, report = run.config, run.report
    data, scores = report.get("data", {}).get("train", {}), report.get("evaluation", {})
    lines = [
        "---", f"base_model: {config.model.name}", "pipeline_tag: text-generation",
        f"library_name: {'peft' if kind == 'adapter' else 'transformers'}", "tags: [whet]", "---", "",
        f"# {run.path.name}", "",
        f"{config.model.name}, fine-tuned with whet {report.get('versions', {}).get('whet', '')} "
        f"on {data.get('examples', '?')} examples ({data.get('tokens_learned', '?')} learned tokens).",
        "",
    ]  # fmt: skip
    if "base" in scores and "tuned" in scores:
        lines += ["| held out | base | tuned |", "|---|---:|---:|"]
        for key in ("perplexity", "exact_match"):
            if scores["base"].get(key) is not None:
                lines.append(f"| {key} | {scores['base'][key]:.4g} | {scores['tuned'][key]:.4g} |")
        lines.append("")
    lines += ["## Settings", "", "```yaml", to_yaml(config).rstrip(), "```", ""]
    lines += [
        "## Versions",
        "",
        "```json",
        json.dumps(report.get("versions", {}), indent=2),
        "```",
        "",
    ]
    return "\n".join(lines)
