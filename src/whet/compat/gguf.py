"""Saving a model of the drop-in API as GGUF files, checked in llama.cpp, and uploading them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from whet.compat.arguments import sort_out
from whet.compat.export import into, merged, sixteen_bit, source_of
from whet.errors import InputError, WhetError
from whet.export.gguf import QUANTISED, parse_types
from whet.export.hub import upload
from whet.model import CausalLM, Tokenizer
from whet.sections import ModelSection

logger = logging.getLogger(__name__)

_IDLE = {
    name: "whet writes the quantised files from one 16-bit file, with nothing to compile"
    for name in ("first_conversion", "maximum_memory_usage", "temporary_location", "max_shard_size")
}
# What scripts call types that GGUF has no such name for; None stands for the model's own 16 bit.
_METHODS = {
    "not_quantized": None,
    "fast_quantized": "q8_0",
    "quantized": "q4_k_m",
    "q4_k": "q4_k_m",
}


def save_pretrained_gguf(
    self: CausalLM,
    save_directory: str | Path,
    tokenizer: Tokenizer = None,
    quantization_method: str | Sequence[str] = "fast_quantized",
    *,
    push_to_hub: bool = False,
    token: str | None = None,
    private: bool | None = None,
    check: bool = True,
    **kwargs: Any,
) -> list[str]:
    """Save the model, with its adapter merged in, as GGUF files, and compare each with it.

    Args:
        self: The model.
        save_directory: Folder; files of other names in it are left alone. A file's name is the
            folder's with the type.
        tokenizer: Written into the files; the one that came with the model when it is not given.
        quantization_method: A type such as `q4_k_m`, `q8_0`, `f16`, or several; `not_quantized`
            (16 bit), `fast_quantized` (q8_0) and `quantized` (q4_k_m) are known too.
        push_to_hub: Also upload the folder, to the repository of its name.
        token: Of the Hub.
        private: Whether a new repository is private.
        check: Load the files in llama.cpp and compare them with the model.
        **kwargs: Arguments that have nothing to do here are named in a warning.

    Returns:
        The files' paths.

    Raises:
        InputError: An argument is wrong, or llama.cpp does not know the family.
        WhetError: The disk is full, or a file is not the model.
    """
    sort_out("save_pretrained_gguf", kwargs, ("quantization_method", "push_to_hub", "check"), _IDLE)
    folder = Path(save_directory)
    files = write_as_gguf(self, folder, tokenizer, quantization_method, check)
    if push_to_hub:
        upload(folder, folder.name, token, private)
    return [str(file) for file in files]


def push_to_hub_gguf(
    self: CausalLM,
    repo_id: str,
    tokenizer: Tokenizer = None,
    quantization_method: str | Sequence[str] = "fast_quantized",
    *,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str = "Upload model trained with whet",
    revision: str | None = None,
    create_pr: bool = False,
    check: bool = True,
    api: Any = None,
    **kwargs: Any,
) -> str:
    """Upload the model, with its adapter merged in, as GGUF files that were compared with it.

    Args:
        self: The model.
        repo_id: The repository, `user/name`; it is made if it is not there.
        tokenizer: As in `save_pretrained_gguf`.
        quantization_method: As in `save_pretrained_gguf`.
        token: Of the Hub; None takes the one of `hf auth login`.
        private: Whether a new repository is private.
        commit_message: Of the upload.
        revision: Branch.
        create_pr: Open a pull request instead.
        check: Load the files in llama.cpp and compare them with the model first.
        api: A huggingface_hub.HfApi to use instead of a new one.
        **kwargs: Arguments that have nothing to do here are named in a warning.

    Returns:
        The address of the commit.

    Raises:
        InputError: An argument is wrong.
        WhetError: A file is not the model, or the Hub refuses it.
    """
    sort_out("push_to_hub_gguf", kwargs, ("quantization_method", "token", "private"), _IDLE)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / repo_id.split("/")[-1]
        write_as_gguf(self, folder, tokenizer, quantization_method, check)
        more = {"commit_message": commit_message, "revision": revision, "create_pr": create_pr}
        return upload(folder, repo_id, token, private, api, **more)


def write_as_gguf(
    model: CausalLM,
    folder: Path,
    tokenizer: Tokenizer,
    methods: str | Sequence[str] | None,
    checked: bool = True,
) -> list[Path]:
    """Write a live model as GGUF files.

    Args:
        model: A model with an adapter or without; it stays as it is.
        folder: Where to.
        tokenizer: Its tokenizer; the one that came with it when None.
        methods: Types, as scripts name them.
        checked: Load the files in llama.cpp and compare them with the model.

    Returns:
        The files.

    Raises:
        InputError: There is no such type or no tokenizer, or cyllama is needed and not there.
        WhetError: A file is not the model; none is left then.
    """
    from whet.export.exports import check_files, write_files
    from whet.export.live import Live
    from whet.export.llama_cpp import is_installed, require
    from whet.export.tensors import open_weights

    kinds = _types(model, methods)
    tokenizer = tokenizer or source_of(model).tokenizer
    if tokenizer is None:
        raise InputError(
            "save_pretrained_gguf needs the tokenizer", fix="give it as second argument"
        )
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
    if any(kind in QUANTISED for kind in kinds):
        require()
    if checked and not is_installed():
        checked = False
        logger.warning("the GGUF files are not checked: pip install 'whet[gguf]' brings llama.cpp")
    twin = merged(model)
    with TemporaryDirectory() as scratch, into(folder) as temporary:
        twin.save_pretrained(scratch)
        weights = open_weights(ModelSection(name=scratch))
        files, reference = write_files(
            weights, tokenizer, temporary, folder.absolute().name, kinds, keep_reference=checked
        )
        if checked:
            live = Live(tokenizer, twin.eval())
            gates = check_files(live, weights, files, kinds, reference)
            if reference is not None:
                reference.unlink()
            if failed := [f"{gate.file}: {cause}" for gate in gates for cause in gate.causes]:
                raise WhetError(f"the GGUF file is not the model; {'; '.join(failed)}")
        return [folder / file.name for file in files]


def _types(model: CausalLM, methods: str | Sequence[str] | None) -> list[str]:
    """Turn the names that scripts give into GGUF types."""
    import torch

    names = [methods] if isinstance(methods, str) or methods is None else list(methods)
    own = "f16" if sixteen_bit(model) is torch.float16 else "bf16"
    given = (str(name or "fast_quantized").lower() for name in names)
    return parse_types([_METHODS.get(name, name) or own for name in given])
