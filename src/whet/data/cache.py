"""Prepared data kept between runs, found again by what it was made of.

An entry is a folder named by a hash of everything its content depends on. It is written under another
name and renamed when it is whole, and its manifest has the size and the hash of each file: what is half
written, edited or damaged is made anew, never used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from whet.data.sources import Source, digest
from whet.errors import WhetError
from whet.model import Tokenizer
from whet.model.load import cache_dir
from whet.sections import DataSection

FORMAT = 1  # raised when the same settings give other files
MANIFEST = "manifest.json"
UNUSED_SECONDS = 30 * 24 * 3600
# Settings that change what is reported or how fast it is made, not what is made.
_ASIDE = {"allow", "cache", "workers", "train", "heldout"}

log = logging.getLogger(__name__)


def key_of(
    data: DataSection,
    sources: dict[str, list[Source]],
    tokenizer: Tokenizer,
    max_length: int,
) -> str | None:
    """Return the name of the entry for some data, or None where its content cannot be known.

    Args:
        data: The config's data section.
        sources: The sources of each split.
        tokenizer: The model's tokenizer, with its chat template.
        max_length: Longest row in tokens.
    """
    contents = {
        split: [digest(source, data.streaming) for source in found]
        for split, found in sources.items()
    }
    if any(content is None for found in contents.values() for content in found):
        return None
    if data.formatting is not None:
        file = Path(data.formatting.rpartition(":")[0])
        if not file.is_file():  # a module, which may import anything
            return None
        contents["formatting"] = [hashlib.sha256(file.read_bytes()).hexdigest()]
    parts: dict[str, Any] = {
        "format": FORMAT,
        "versions": [version("tokenizers"), version("transformers")],
        "contents": contents,
        "samples": {s: [source.sample for source in found] for s, found in sources.items()},
        "settings": data.model_dump(exclude=_ASIDE),
        "tokenizer": _fingerprint(tokenizer),
        "chat_template": tokenizer.chat_template,
        "max_length": max_length,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _fingerprint(tokenizer: Tokenizer) -> str:
    """Return a hash of what a tokenizer does to a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        core = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    else:
        # Truncation and padding are switched on and off by each call, and are not part of it.
        state = json.loads(backend.to_str())
        core = json.dumps({**state, "truncation": None, "padding": None}, sort_keys=True)
    specials = json.dumps([sorted(tokenizer.all_special_ids), tokenizer.eos_token_id])
    return hashlib.sha256(f"{type(tokenizer).__name__}{core}{specials}".encode()).hexdigest()


def find(key: str) -> Path | None:
    """Return an entry's folder when it is there and whole."""
    folder = cache_dir() / "data" / key
    if not folder.is_dir():
        return None
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        whole = all(hash_file(folder / name) == known for name, known in files.items())
    except (OSError, ValueError, AttributeError):
        whole = False
    if not whole:
        log.warning("the tokenised rows in %s are damaged, and are made anew", folder)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    os.utime(folder)
    return folder


def keep(key: str | None, write: Callable[[Path], None]) -> tuple[Path, object]:
    """Make prepared data, and keep it when it has a key.

    Args:
        key: Name of the entry, or None for data that lasts as long as the second value returned.
        write: Writes the files into the folder it is given.

    Raises:
        WhetError: The folder cannot be written.
    """
    try:
        above = cache_dir() / "data" if key else None
        if above:
            above.mkdir(parents=True, exist_ok=True)
            _forget_unused(above)
        scratch = tempfile.TemporaryDirectory(prefix="whet-data-", dir=above)
    except OSError as error:
        raise WhetError(
            f"the tokenised rows cannot be kept: {error}",
            fix="set XDG_CACHE_HOME to a folder that can be written, or data.cache: false",
        ) from error
    folder = Path(scratch.name) / "rows"
    folder.mkdir()
    try:
        write(folder)
    except BaseException:
        scratch.cleanup()
        raise
    if above is None or key is None:
        return folder, scratch
    files = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
    manifest = json.dumps({name: hash_file(folder / name) for name in files})
    (folder / MANIFEST).write_text(manifest, encoding="utf-8")
    try:
        folder.rename(above / key)
    except OSError:  # another process was first, with the same content
        return folder, scratch
    scratch.cleanup()
    return above / key, None


def hash_file(file: Path) -> str:
    """Return the SHA-256 of a file's content."""
    found = hashlib.sha256()
    with file.open("rb") as content:
        while piece := content.read(2**20):
            found.update(piece)
    return found.hexdigest()


def _forget_unused(above: Path) -> None:
    """Remove the entries that no run has used for a month, and what a killed run left."""
    for folder in above.iterdir():
        age = time.time() - folder.stat().st_mtime
        if age > (UNUSED_SECONDS if len(folder.name) == 32 else 24 * 3600):
            shutil.rmtree(folder, ignore_errors=True)
