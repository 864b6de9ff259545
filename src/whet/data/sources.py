"""Which sources a config names: files, folders and globs of them, and datasets of the Hub.

Finding takes no time and no network, so that a misspelt name is told before anything is loaded.
How a file is read is `readers`' matter; Hub datasets go through datasets.
"""

from __future__ import annotations

import glob
import hashlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.data.readers import SUFFIXES, TABLE_SUFFIXES, read_file, suffix_of
from whet.data.rows import Fault, Row, kind_of
from whet.errors import InputError, did_you_mean
from whet.sections import DataSection

__all__ = [
    "SUFFIXES", "Fault", "Row", "Source", "digest", "find_sources", "kind_of", "read_rows",
    "read_source", "require_sources",
]  # fmt: skip

_SAMPLE = re.compile(r"(.+)#(\d+)", re.DOTALL)
_DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", *TABLE_SUFFIXES)
# What datasets' save_to_disk, and the Hub, put beside the data.
_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True, slots=True)
class Source:
    """One source that a config names.

    Args:
        name: The name as it was written.
        root: The folder that the names of its files are told from.
        paths: Its files, in the order they are read; empty for the Hub.
        hub: Dataset id on the Hub; None for files.
        split: Split of the Hub dataset.
        sample: How many rows to draw from all of its rows (`#N`); None takes them all.
        weight: Share of this source in the mix, relative to the others.
    """

    name: str
    root: Path = Path()
    paths: tuple[Path, ...] = ()
    hub: str | None = None
    split: str = "train"
    sample: int | None = None
    weight: float = 1.0

    def file_name(self, path: Path) -> str:
        """Return what rows call one of the files: its path from the folder or glob that was named."""
        return path.relative_to(self.root).as_posix()


def find_sources(
    named: str | Sequence[str], weights: Sequence[float] = (), key: str = "data.train"
) -> list[Source]:
    """Find the files behind the names of a config, without reading any.

    Args:
        named: One name or several: a file, a folder (all data files in and below it), a glob, or a
            Hub id as `id` or `id:split`; each may end in `#N`, unless a file is really called so.
        weights: Weight of each name; empty for equal ones.
        key: The config's key, for errors.

    Raises:
        InputError: A name leads to no data, or the weights do not fit; all mistakes are told.
    """
    names = [named] if isinstance(named, str) else list(named)
    if not names or names == [""]:
        raise InputError(f"{key} is empty", fix=f"set {key} to a file, or to a list of files")
    if weights and len(weights) != len(names):
        raise InputError(
            f"data.weights must have one weight for each source of {key}",
            f"{len(weights)} weights for {len(names)} sources", "give one each, or none",
        )  # fmt: skip
    if wrong := [weight for weight in weights if not (weight > 0 and math.isfinite(weight))]:
        raise InputError(
            "data.weights must be above 0", wrong[0], "remove the source instead of giving it 0"
        )
    found: list[Source] = []
    mistakes: list[InputError] = []
    for name, weight in zip(names, weights or [1.0] * len(names), strict=True):
        try:
            found.append(_find(name, weight, key))
        except InputError as error:
            mistakes.append(error)
    if len(mistakes) == 1:
        raise mistakes[0]
    if mistakes:
        raise InputError.listing(f"{len(mistakes)} sources of {key}:", map(str, mistakes))
    return found


def read_source(
    source: Source, text_rows: str = "file", streaming: bool = False
) -> Iterator[Row | Fault]:
    """Read all rows of a source; `#N` and the weight are left to the caller.

    Args:
        source: The source.
        text_rows: As in `read_file`.
        streaming: Read a Hub dataset row by row instead of downloading it first.

    Yields:
        Rows in order, numbered anew in each file, and a Fault for each row that cannot be read.

    Raises:
        InputError: A file or the dataset cannot be read.
    """
    if source.hub is not None:
        yield from _read_hub(source, streaming)
    for path in source.paths:
        yield from read_file(path, source.file_name(path), text_rows)


def read_rows(source: str, text_rows: str = "file") -> Iterator[Row | Fault]:
    """Read all rows of one name, see `find_sources` and `read_source`."""
    for found in find_sources(source):
        yield from read_source(found, text_rows)


def require_sources(data: DataSection) -> None:
    """Check that the files of a config are there, which takes no time, before anything that does.

    Args:
        data: The config's data section; names that look like Hub ids are left for later.

    Raises:
        InputError: A file is missing, or no training data is named.
    """
    find_sources(data.train, data.weights)
    if data.heldout:
        find_sources(data.heldout, key="data.heldout")


def digest(source: Source, streaming: bool = False) -> str | None:
    """Return the SHA-256 of what a source holds, or None when that cannot be known.

    Args:
        source: The source; a Hub dataset is loaded (once: datasets keeps it), unless it streams.
        streaming: Whether a Hub dataset is read row by row, which leaves nothing to hash.

    Raises:
        InputError: A file cannot be read.
    """
    files = [(source.file_name(path), path) for path in source.paths]
    if source.hub is not None:
        if streaming:
            return None
        cached = [Path(file["filename"]) for file in _load_hub(source, streaming).cache_files]
        files = [(path.name, path) for path in cached]
        if not files:
            return None  # it exists in memory alone
    found = hashlib.sha256()
    for name, path in files:
        try:
            found.update(f"{name}\0{path.stat().st_size}\0".encode("utf-8", "surrogateescape"))
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    found.update(piece)
        except OSError as error:
            raise InputError(f"data file '{path}' cannot be read: {error.strerror}") from error
    return found.hexdigest()


def _find(name: str, weight: float, key: str) -> Source:
    if not name.strip():
        raise InputError(f"{key} has an empty name in its list", fix="remove it")
    written, sample = name, None
    if not Path(name).expanduser().exists():
        if sampled := _SAMPLE.fullmatch(name):
            written, sample = sampled[1], int(sampled[2])
            if sample == 0:
                raise InputError(f"'{name}' draws no rows", fix="draw 1 or more, or remove it")
        elif "#" in name and Path(name.rpartition("#")[0]).expanduser().exists():
            raise InputError(
                f"'{name}': what follows # must be a number of rows", fix="such as #500"
            )
    path = Path(written).expanduser()
    if path.is_dir():
        return Source(name, path, _files_below(path, written), sample=sample, weight=weight)
    if path.exists():
        if suffix_of(path) is None:
            raise InputError(
                f"data file '{written}' has a suffix whet does not read",
                f"'{path.suffix}'", f"use one of {', '.join(SUFFIXES)}, or .gz after one that is text",
            )  # fmt: skip
        return Source(name, path.parent, (path,), sample=sample, weight=weight)
    if glob.has_magic(written):
        root = Path(*_before_magic(path))
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        files = _data_files([match for match in matches if match.is_file()])
        if not files:
            raise InputError(
                f"'{written}' matches no file that whet reads",
                f"{len(matches)} matches", f"check {key}; known are {', '.join(SUFFIXES)}",
            )  # fmt: skip
        return Source(name, root, files, sample=sample, weight=weight)
    if _names_a_file(written):
        raise _missing(path, written, key)
    hub, _, split = written.partition(":")
    return Source(name, hub=hub, split=split or "train", sample=sample, weight=weight)


def _before_magic(path: Path) -> list[str]:
    parts = []
    for part in path.parts:
        if glob.has_magic(part):
            break
        parts.append(part)
    return parts


def _files_below(folder: Path, written: str) -> tuple[Path, ...]:
    """Return the data files in and below a folder, in the order of their names."""

    def refuse(error: OSError) -> None:
        raise InputError(f"folder '{error.filename}' cannot be read: {error.strerror}") from error

    found = []
    for base, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(base, name) for name in files if not name.startswith(".")]
    kept = _data_files(sorted(found))
    if not kept:
        raise InputError(
            f"folder '{written}' holds no file that whet reads", f"{len(found)} files",
            f"known are {', '.join(SUFFIXES)}",
        )  # fmt: skip
    return kept


def _data_files(files: Sequence[Path]) -> tuple[Path, ...]:
    """Leave out what is no data: unknown suffixes, and texts beside data, which describe it."""
    known = [path for path in files if suffix_of(path) and path.name not in _NOT_DATA]
    data = [path for path in known if suffix_of(path) in _DATA_SUFFIXES]
    return tuple(data or known)


def _names_a_file(source: str) -> bool:
    known = Path(source).suffix.lower() in (*SUFFIXES, ".gz")
    like_a_path = source.startswith((".", "/", "~")) or source.endswith("/")
    return known or like_a_path or source.count("/") > 1


def _missing(path: Path, source: str, key: str) -> InputError:
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    guess = did_you_mean(path.name, beside)
    return InputError(
        f"data file '{source}' does not exist",
        fix=f"did you mean '{path.with_name(guess)}'?" if guess else f"check {key}",
    )


def _load_hub(source: Source, streaming: bool) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HFValidationError

    assert source.hub is not None
    try:
        # Named only where it is wanted: the rest is a plain download.
        wanted: dict[str, Any] = {"streaming": True} if streaming else {}
        return datasets.load_dataset(source.hub, split=source.split, **wanted)
    except (OSError, ValueError, HFValidationError, DatasetsError) as error:
        first = str(error).strip().split("\n")[0]
        raise InputError(
            f"'{source.name}' is neither a file here nor a dataset the Hub gives: {first}",
            fix="check data.train (a path, or a Hub id such as org/name:split) and the network",
        ) from error


def _read_hub(source: Source, streaming: bool) -> Iterator[Row]:
    from datasets.exceptions import DatasetsError

    number, name = 0, source.name.partition("#")[0]
    rows = iter(_load_hub(source, streaming))
    while True:
        try:
            values = next(rows)
        except StopIteration:
            break
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            first = str(error).strip().split("\n")[0]
            raise InputError(
                f"dataset '{name}' cannot be read beyond row {number}: {first}",
                fix="check the network, and try again",
            ) from error
        number += 1
        yield Row(dict(values), name, number)
    if number == 0:
        raise InputError(f"dataset '{name}' holds no rows", fix="check the split")
