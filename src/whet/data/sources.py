"""Read rows from files and from the Hub, each with the place it came from.

The readers are our own, small and strict, because a fault has to be told with its file, row, line
and column, which the usual loaders do not give; parquet and Hub datasets go through pyarrow and
datasets. Nothing is repaired in silence: bytes that are not UTF-8, doubled keys and short CSV rows
are faults.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.config import DataSection
from whet.errors import InputError, did_you_mean

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read.

    Args:
        values: The columns.
        file: Name of the file or dataset, as the user wrote it.
        number: Row number from 1.
        line: Line number from 1, where the format has lines.
    """

    values: dict[str, Any]
    file: str
    number: int
    line: int | None = None

    @property
    def where(self) -> str:
        """The place to look at, such as `rows.jsonl:3` or `rows.parquet row 3`."""
        return f"{self.file}:{self.line}" if self.line else f"{self.file} row {self.number}"


@dataclass(frozen=True, slots=True)
class Fault:
    """A row that cannot be used, and why.

    Args:
        where: The place, such as `rows.jsonl:7`.
        reason: What is wrong and what to do, as one sentence.
    """

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def read_rows(source: str, text_rows: str = "file") -> Iterator[Row | Fault]:
    """Read one source.

    Args:
        source: Path of a file, or a Hub dataset as `id` or `id:split`.
        text_rows: `file` makes a text file one row, `line` makes each of its lines one.

    Yields:
        Rows in order, and a Fault in the place of each row that cannot be read.

    Raises:
        InputError: The source as a whole cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise InputError(
            f"data file '{source}' is a folder", fix="name the files in it, as a list in data.train"
        )
    if not path.exists():
        if _names_a_file(source):
            raise _missing(path, source)
        yield from _read_hub(source)
        return
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _read_parquet(path)
        return
    if suffix not in SUFFIXES:
        raise InputError(
            f"data file '{source}' has a suffix whet does not read", f"'{suffix}'",
            f"use one of {', '.join(SUFFIXES)}",
        )  # fmt: skip
    text = _read_text(path)
    if suffix == ".jsonl":
        yield from _read_jsonl(path, text)
    elif suffix == ".json":
        yield from _read_json(path, text)
    elif suffix in (".csv", ".tsv"):
        yield from _read_csv(path, text, "," if suffix == ".csv" else "\t")
    elif text_rows == "file":
        yield Row({"text": text}, path.name, 1, 1)
    else:
        lines = (line for line in enumerate(text.split("\n"), 1) if line[1].strip())
        for number, (line, content) in enumerate(lines, 1):
            yield Row({"text": content}, path.name, number, line)


def require_sources(data: DataSection) -> None:
    """Check that the files of a config are there, which takes no time, before anything that does.

    Args:
        data: The config's data section; names that look like Hub ids are left for later.

    Raises:
        InputError: A file is missing, or no training data is named.
    """
    if not data.train:
        raise InputError(
            "data.train is empty", fix="set data.train to a file, or to a list of files"
        )
    for named in (data.train, data.heldout or []):
        for source in [named] if isinstance(named, str) else named:
            path = Path(source).expanduser()
            if not path.exists() and _names_a_file(source):
                raise _missing(path, source)


def _names_a_file(source: str) -> bool:
    known = Path(source).suffix.lower() in (*SUFFIXES, ".gz")
    return known or source.startswith((".", "/", "~"))


def _missing(path: Path, source: str) -> InputError:
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    guess = did_you_mean(path.name, beside)
    return InputError(
        f"data file '{source}' does not exist",
        fix=f"did you mean '{path.with_name(guess)}'?" if guess else "check data.train",
    )


def _read_text(path: Path) -> str:
    """Return a file's text, without byte order mark and carriage returns."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"data file '{path}' cannot be read: {error.strerror}") from error
    if not raw.strip():
        raise InputError(
            f"data file '{path}' is empty ({len(raw)} bytes)",
            fix="check the path, or the step that wrote it",
        )
    if raw[:2] == b"\x1f\x8b":
        raise InputError(
            f"data file '{path}' is gzip, not text", fix="unpack it first (gunzip reads *.gz names)"
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + (3 if raw[:3] == b"\xef\xbb\xbf" else 0)
        line = raw.count(b"\n", 0, offset) + 1
        place = offset - raw.rfind(b"\n", 0, offset)
        raise InputError(
            f"data file '{path}', line {line}, byte {place}: not UTF-8",
            f"0x{raw[offset]:02X}, which looks like Latin-1",
            "convert the file to UTF-8",
        ) from error
    return text.replace("\r\n", "\n")


class _DoubledKey(ValueError):
    """A JSON object that gives one key two different values."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values and values[key] != value:
            raise _DoubledKey(f"key '{key}' occurs twice and the values differ; keep one")
        values[key] = value
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _read_jsonl(path: Path, text: str) -> Iterator[Row | Fault]:
    number = 0
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        number += 1
        where = f"{path.name}:{line}"
        try:
            value = _DECODER.decode(content.strip())
        except json.JSONDecodeError as error:
            yield Fault(where, f"not JSON at column {error.colno}: {_json_reason(error)}")
        except _DoubledKey as error:
            yield Fault(where, str(error))
        else:
            yield _row_or_fault(value, path.name, number, line)


def _read_json(path: Path, text: str) -> Iterator[Row | Fault]:
    """Read an array of objects, element by element, so that a fault knows its row and line."""
    position = _skip(text, 0)
    if text[position] != "[":
        raise InputError(
            f"data file '{path}' must hold a JSON array of rows", f"it starts with {text[:20]!r}",
            "put the rows into [...], or name it .jsonl when each line is a row",
        )  # fmt: skip
    position, number = _skip(text, position + 1), 0
    while position < len(text) and text[position] != "]":
        number += 1
        line = text.count("\n", 0, position) + 1
        try:
            value, position = _DECODER.raw_decode(text, position)
            position = _skip(text, position)
            if text[position : position + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
        except json.JSONDecodeError as error:
            # Past a broken element nothing says where the next one starts: the file is refused.
            raise InputError(
                f"data file '{path}', row {number}, line {error.lineno}, column {error.colno}: "
                f"{_json_reason(error)}",
                fix=f"fetch the file again, or end it with ] after row {number - 1}",
            ) from error
        except _DoubledKey as error:
            raise InputError(f"data file '{path}', row {number}, line {line}: {error}") from error
        yield _row_or_fault(value, path.name, number, line)
        position = _skip(text, position + 1) if text[position] == "," else position
    if number == 0:
        raise InputError(f"data file '{path}' holds no rows", fix="check the step that wrote it")


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\n\r":
        position += 1
    return position


def _json_reason(error: json.JSONDecodeError) -> str:
    if error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string"):
        return "the file or line ends inside a value"
    return error.msg[0].lower() + error.msg[1:]


def _row_or_fault(value: Any, file: str, number: int, line: int) -> Row | Fault:
    if isinstance(value, dict):
        return Row(value, file, number, line)
    return Fault(f"{file}:{line}", f"a row must be an object with columns, not {kind_of(value)}")


def _read_csv(path: Path, text: str, delimiter: str) -> Iterator[Row | Fault]:
    # Without newline handling of its own, StringIO hands quoted line breaks to csv as they are.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = next(reader)
    number, line = 0, reader.line_num + 1
    while True:
        start = line
        try:
            fields = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise InputError(f"data file '{path}', line {reader.line_num}: {error}") from error
        line = reader.line_num + 1
        if not fields:
            continue
        number += 1
        if len(fields) == len(header):
            yield Row(dict(zip(header, fields, strict=True)), path.name, number, start)
            continue
        lost = ", ".join(f"'{name}'" for name in header[len(fields) :])
        what = f"{lost} is missing" if lost else "put text that holds the separator in quotes"
        reason = f"row {number} has {len(fields)} fields, {len(header)} expected; {what}"
        yield Fault(f"{path.name}:{start}", reason)
    if number == 0:
        raise InputError(f"data file '{path}' has a header and no rows")


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        for batch in file.iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield Row(values, path.name, number)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"data file '{path}' is not readable parquet: {error}") from error


def _read_hub(source: str) -> Iterator[Row]:
    import datasets
    from huggingface_hub.errors import HFValidationError

    name, _, split = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, HFValidationError) as error:
        first = str(error).strip().split("\n")[0]
        raise InputError(
            f"'{source}' is neither a file here nor a dataset the Hub gives: {first}",
            fix="check data.train (a path, or a Hub id such as org/name:split) and the network",
        ) from error
    for number, values in enumerate(rows, 1):
        yield Row(dict(values), source, number)


def kind_of(value: Any) -> str:
    """Name a JSON value's type as a person would.

    Args:
        value: Any value read from JSON or parquet.
    """
    for kind, name in (
        (bool, "boolean"), (str, "text"), (int | float, "number"), (list, "list"), (dict, "object"),
    ):  # fmt: skip
        if isinstance(value, kind):
            return name
    return "null" if value is None else type(value).__name__
