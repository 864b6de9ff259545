"""Saving a model of the drop-in API: merged, in 4 bit, as an adapter, to the Hub.

`bind` gives one model instance the methods that scripts call on it (`save_pretrained_merged`, ...);
`save_pretrained` and `push_to_hub` stay transformers' and peft's own. A merged model is W + s B A
in float32, rounded once; 4-bit weights are not merged into, their originals are read again.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import shutil
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from whet.compat.arguments import sort_out
from whet.engine.swap import base_of, detach
from whet.errors import InputError
from whet.export.hub import upload
from whet.export.weights import write_model
from whet.model import CausalLM, Tokenizer
from whet.model.load import forget_quantization, load_model
from whet.runs import whole_folder
from whet.sections import ModelSection

logger = logging.getLogger(__name__)

SAVE_METHODS = ("merged_16bit", "merged_4bit", "lora")
_ADAPTER = "adapter_config.json"


@dataclass
class Source:
    """Where a model came from, and how it is used; kept on the instance, as `_whet_source`.

    Args:
        section: Name and kind of the base model.
        options: What transformers was given besides: a token, a config with scaled rope.
        tokenizer: The tokenizer that came with it.
        checkpointing: What `use_gradient_checkpointing` was; None where nobody said.
        was_checkpointing: Whether transformers' checkpointing was on before `for_inference`.
    """

    section: ModelSection
    options: dict[str, Any] = field(default_factory=dict)
    tokenizer: Tokenizer = None
    checkpointing: bool | str | None = None
    was_checkpointing: bool = False


def source_of(model: CausalLM) -> Source:
    """Return where a model came from; one that whet did not load is known by its name alone."""
    own = vars(base_of(model))
    if "_whet_source" not in own:
        own["_whet_source"] = Source(ModelSection(name=str(base_of(model).name_or_path)))
    return own["_whet_source"]


def bind(model: CausalLM) -> None:
    """Give one model instance the drop-in API's methods; its class is left alone.

    Args:
        model: A transformers model, or a peft model around one.
    """
    from whet.compat.gguf import push_to_hub_gguf, save_pretrained_gguf

    for method in (
        save_pretrained_merged, push_to_hub_merged, save_pretrained_gguf, push_to_hub_gguf,
    ):  # fmt: skip
        vars(model)[method.__name__] = types.MethodType(method, model)


def save_pretrained_merged(
    self: CausalLM,
    save_directory: str | Path,
    tokenizer: Tokenizer = None,
    save_method: str = "merged_16bit",
    *,
    max_shard_size: str | int = "5GB",
    push_to_hub: bool = False,
    token: str | None = None,
    private: bool | None = None,
    **kwargs: Any,
) -> None:
    """Save the model with its adapter merged in, or the adapter.

    Args:
        self: The model.
        save_directory: Folder; files of other names in it are left alone.
        tokenizer: Saved beside the weights.
        save_method: `merged_16bit`, `merged_4bit` (merged in 16 bit, then NF4) or `lora`.
        max_shard_size: Largest file.
        push_to_hub: Also upload the folder, to the repository of its name.
        token: Of the Hub.
        private: Whether a new repository is private.
        **kwargs: Arguments that have nothing to do here are named in a warning.

    Raises:
        InputError: An argument is wrong, or there is no adapter to save.
        WhetError: The disk is full.
    """
    sort_out("save_pretrained_merged", kwargs, ("max_shard_size", "push_to_hub", "save_method"))
    folder = Path(save_directory)
    write_as(self, folder, tokenizer, save_method, max_shard_size)
    if push_to_hub:
        upload(folder, folder.name, token, private)


def push_to_hub_merged(
    self: CausalLM,
    repo_id: str,
    tokenizer: Tokenizer = None,
    save_method: str = "merged_16bit",
    *,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str = "Upload model trained with whet",
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: str | int = "5GB",
    api: Any = None,
    **kwargs: Any,
) -> str:
    """Upload the model with its adapter merged in, or the adapter.

    Args:
        self: The model.
        repo_id: The repository, `user/name`; it is made if it is not there.
        tokenizer: Uploaded beside the weights.
        save_method: As in `save_pretrained_merged`.
        token: Of the Hub; None takes the one of `hf auth login`.
        private: Whether a new repository is private.
        commit_message: Of the upload.
        revision: Branch.
        create_pr: Open a pull request instead.
        max_shard_size: Largest file.
        api: A huggingface_hub.HfApi to use instead of a new one.
        **kwargs: Arguments that have nothing to do here are named in a warning.

    Returns:
        The address of the commit.

    Raises:
        InputError: An argument is wrong.
    """
    sort_out("push_to_hub_merged", kwargs, ("token", "private", "commit_message", "revision"))
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_as(self, folder, tokenizer, save_method, max_shard_size)
        more = {"commit_message": commit_message, "revision": revision, "create_pr": create_pr}
        return upload(folder, repo_id, token, private, api, **more)


def write_as(
    model: CausalLM,
    folder: Path,
    tokenizer: Tokenizer,
    save_method: str,
    max_shard_size: str | int = "5GB",
) -> None:
    """Write a model into a folder, by one of SAVE_METHODS.

    Raises:
        InputError: There is no such method, or it does not fit this model or folder.
        WhetError: The disk is full.
    """
    method = str(save_method).removesuffix("_forced")
    if method not in SAVE_METHODS:
        raise InputError(
            "save_method is none that whet knows", repr(save_method),
            f"use {', '.join(SAVE_METHODS)}",
        )  # fmt: skip
    adapted = hasattr(model, "peft_config")
    if method == "lora" and not adapted:
        raise InputError("save_method 'lora' needs a model with an adapter", fix="use merged_16bit")
    if method != "lora" and (folder / _ADAPTER).exists():
        raise InputError(
            f"folder '{folder}' holds an adapter, which transformers would put on the merged model "
            "once more", fix="merge into another folder",
        )  # fmt: skip
    if method == "lora":
        with into(folder) as temporary:
            model.save_pretrained(str(temporary))
            if tokenizer is not None:
                tokenizer.save_pretrained(str(temporary))
        return
    dtype = sixteen_bit(model)
    if method == "merged_16bit":
        with into(folder) as temporary:
            write_model(merged(model), tokenizer, temporary, dtype, max_shard_size)
        return
    with TemporaryDirectory(dir=folder.absolute().parent) as scratch:
        write_model(merged(model), tokenizer, Path(scratch), dtype, max_shard_size)
        section = ModelSection(name=scratch, load_in_4bit=True)
        quantised = load_model(section, dtype)
        with into(folder) as temporary:
            quantised.save_pretrained(str(temporary), max_shard_size=max_shard_size)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(temporary))


@contextlib.contextmanager
def into(folder: Path) -> Iterator[Path]:
    """Give the body a temporary folder, whose files go into `folder` when it ends well.

    Args:
        folder: Where to; files of other names in it stay.
    """
    folder = folder.absolute()
    aside = folder.with_name(f".{folder.name}.new")
    with whole_folder(aside) as temporary:
        yield temporary
    shutil.copytree(aside, folder, copy_function=os.replace, dirs_exist_ok=True)
    shutil.rmtree(aside)


def sixteen_bit(model: CausalLM) -> Any:
    """Return the 16-bit type that a merged model is written in: the one it computed in, or bfloat16."""
    import torch

    base = base_of(model)
    quantised = getattr(base.config, "quantization_config", None)
    kinds = [getattr(quantised, "bnb_4bit_compute_dtype", None), base.dtype]
    return torch.float16 if torch.float16 in kinds else torch.bfloat16


def is_quantised(model: CausalLM) -> bool:
    """Tell whether a model's frozen weights are in 4 or 8 bit."""
    base = base_of(model)
    return any(getattr(base, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))


def merged(model: CausalLM) -> CausalLM:
    """Return a copy of a model in float32 on the CPU, with the active adapter merged in.

    Args:
        model: A model with an adapter or without; it stays as it is.
    """
    found = _reloaded(model) if is_quantised(model) else _copied(model)
    if hasattr(found, "merge_and_unload"):
        found = found.merge_and_unload(safe_merge=True)
    return found


def _copied(model: CausalLM) -> CausalLM:
    """Copy a model to host memory in float32; tied weights stay tied, gradients stay behind."""
    import torch
    from torch import nn

    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        values = parameter.detach().to("cpu", torch.float32, copy=True)
        memo[id(parameter)] = nn.Parameter(values, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().cpu().clone()
    source = source_of(model)
    memo[id(source)] = source
    twin = copy.deepcopy(model, memo)
    detach(twin)
    return twin


def _reloaded(model: CausalLM) -> CausalLM:
    """Load a quantised model's original weights, and put its adapter on them."""
    import torch
    from peft import PeftModel

    source = source_of(model)
    section = source.section.model_copy(update={"load_in_4bit": False})
    options = {k: v for k, v in source.options.items() if k != "quantization_config"}
    base = load_model(section, torch.float32, options={**options, "device_map": {"": "cpu"}})
    if is_quantised(base):
        logger.warning(
            "'%s' was published in 4 bit: the adapter is merged into its dequantised weights",
            section.name,
        )
        base = base.dequantize().float()
        forget_quantization(base)
    if not hasattr(model, "peft_config"):
        return base
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return PeftModel.from_pretrained(base, folder)
