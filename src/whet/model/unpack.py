"""Models that are one file, unpacked once into a Hugging Face folder in the user's cache.

Exactly: a GGUF file's blocks become float32, a llama2.c checkpoint is float32 already. So every later
step is the same for all sources, and a later start does not parse the file again (SmolLM2-135M: 0.4 s
instead of 20 s on two cores).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
from pathlib import Path
from typing import Any

from whet.errors import InputError, first_line
from whet.model import CausalLM
from whet.model.llama2c import read_checkpoint, read_tokenizer, to_hugging_face
from whet.runs import require_free, whole_folder, write_text

logger = logging.getLogger(__name__)


def unpack_gguf(path: Path) -> Path:
    """Unpack a GGUF file into a Hugging Face folder in the cache, once.

    Args:
        path: The `.gguf` file.

    Returns:
        A folder with config, float32 weights (exactly the file's values), tokenizer and template.

    Raises:
        InputError: The file is not a model that transformers reads.
        WhetError: The disk has no room.
    """
    folder = cache_dir() / "gguf" / f"{path.stem}-{_fingerprint(path)}"
    if folder.is_dir():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Four bytes a weight against half a byte or more in the file.
    require_free(folder, 9 * path.stat().st_size, f"unpacking {path.name}")
    logger.info("unpacking %s once into %s", path.name, folder)
    source: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
            model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **source)
    except (ValueError, KeyError, OSError, NotImplementedError, RuntimeError) as error:
        raise InputError(
            f"'{path}' is not a GGUF model that transformers reads: {first_line(error)}"
        ) from error
    forget_quantization(model)
    model.config._name_or_path = path.stem
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if licence := _licence_of(path):
            write_text(temporary / "README.md", f"---\nlicense: {licence}\n---\n")
    return folder


def unpack_llama2c(path: Path) -> Path:
    """Unpack a llama2.c checkpoint with its tokenizer into a Hugging Face folder in the cache, once.

    Args:
        path: The `.bin` file; its tokenizer lies beside it as `tok<vocabulary>.bin` or `tokenizer.bin`.

    Returns:
        A folder with config, weights (the file's values, bit for bit) and tokenizer.

    Raises:
        InputError: It is no such checkpoint, or no tokenizer of its size lies beside it.
        WhetError: The disk has no room.
    """
    config, weights = read_checkpoint(path)
    size = config["vocab_size"]
    beside = [path.parent / name for name in (f"tok{size}.bin", "tokenizer.bin")]
    file = next((file for file in beside if file.is_file()), None)
    if file is None:
        raise InputError(
            f"there is no tokenizer beside '{path}'",
            fix=f"put its tokenizer there as {beside[0].name} or {beside[1].name}",
        )
    folder = cache_dir() / "llama2c" / f"{path.stem}-{_fingerprint(path)}-{_fingerprint(file)}"
    if folder.is_dir():
        return folder
    require_free(folder, path.stat().st_size, f"unpacking {path.name}")
    logger.info("unpacking %s once into %s", path.name, folder)
    model, tokenizer = to_hugging_face(config, weights, read_tokenizer(file, size))
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def _licence_of(path: Path) -> str | None:
    """Return the licence that a GGUF file states."""
    from gguf import GGUFReader

    field = GGUFReader(str(path)).get_field("general.license")
    return None if field is None else str(field.contents())


def forget_quantization(model: CausalLM) -> None:
    """Let a model whose weights were all unpacked be saved; transformers refuses it otherwise.

    Args:
        model: A model in 16 or 32 bit that was loaded from GGUF blocks or from NF4.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "_weight_conversions"):
        if name in vars(model):
            delattr(model, name)


def cache_dir() -> Path:
    """Return whet's folder in the user's cache: the XDG base directory, as desktop programs use it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "whet"


def _fingerprint(path: Path) -> str:
    size = path.stat().st_size
    with open(path, "rb") as file:
        digest = hashlib.sha256(str(size).encode() + file.read(2**20))
        file.seek(max(0, size - 2**20))
        digest.update(file.read())
    return digest.hexdigest()[:16]


# What unpacks a file, by its suffix.
UNPACKED = {".gguf": unpack_gguf, ".bin": unpack_llama2c}
