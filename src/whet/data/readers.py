"""How each kind of file is read, row by row, each with the place it came from.

The readers are our own, small and strict, because a fault has to be told with its file, row, line
and column, which the usual loaders do not give; parquet and arrow go through pyarrow. None of them
holds more of a file than a piece (of a parquet or arrow file, a batch), except that a text file
read as one document is one row. Nothing is repaired in silence: bytes that are not UTF-8, doubled
keys and short CSV rows are faults.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import itertools
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from whet.data.json_rows import read_json_array, read_json_lines
from whet.data.rows import Fault, Row, excerpt_of
from whet.errors import InputError

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".md", ".markdown")
TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")
SUFFIXES = (*TEXT_SUFFIXES, *TABLE_SUFFIXES)

_PIECE_BYTES = 1 << 20
_BATCH_ROWS = 1024
# csv refuses fields of more than 128 Ki characters, which documents have. A limit stays: a quote
# that never closes would read the rest of the file into one field.
_FIELD_CHARACTERS = 1 << 26
_GZIP_MAGIC = b"\x1f\x8b"


def suffix_of(path: Path) -> str | None:
    """Return the suffix that says how a file is read, or None when whet does not read it.

    Args:
        path: The file; `rows.jsonl.gz` is read as `.jsonl`.
    """
    suffix = path.suffix.lower()
    if suffix == ".gz":
        inner = Path(path.stem).suffix.lower()
        return inner if inner in TEXT_SUFFIXES else None
    return suffix if suffix in SUFFIXES else None


def read_file(
    path: Path, name: str | None = None, text_rows: str = "file"
) -> Iterator[Row | Fault]:
    """Read one file.

    Args:
        path: The file.
        name: What its rows call it; its name when None.
        text_rows: `file` makes a text file one row, `line` makes each of its lines one,
            `paragraph` each piece between blank lines.

    Yields:
        Rows in order, and a Fault in the place of each row that cannot be read.

    Raises:
        InputError: The file as a whole cannot be read, or not beyond some place.
    """
    name, number = path.name if name is None else name, 0
    suffix = suffix_of(path)
    if suffix is None:
        raise InputError(
            f"data file '{path}' has a suffix whet does not read",
            f"'{''.join(path.suffixes[-2:]) if path.suffix == '.gz' else path.suffix}'",
            f"use one of {', '.join(SUFFIXES)}, or .gz after one that is text",
        )
    try:
        if suffix in TABLE_SUFFIXES:
            rows = _read_table(path, name, suffix)
        else:
            rows = _read_text(path, name, suffix, text_rows)
        for row in rows:
            number += 1
            yield row
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        packed = path.suffix.lower() == ".gz" and not getattr(error, "errno", None)
        raise InputError(
            f"data file '{path}' cannot be read{f' beyond row {number}' if number else ''}: {reason}",
            fix="it is damaged or an unfinished copy: fetch it again" if packed else None,
        ) from error
    if number == 0:
        raise InputError(
            f"data file '{path}' is empty ({path.stat().st_size} bytes)",
            fix="check the path, or the step that wrote it",
        )


def _read_text(path: Path, name: str, suffix: str, text_rows: str) -> Iterator[Row | Fault]:
    with _open(path) as file:
        pieces = _pieces(file, path)
        if suffix == ".jsonl":
            yield from read_json_lines(_lines(pieces), path, name)
        elif suffix == ".json":
            yield from read_json_array(pieces, path, name)
        elif suffix in (".csv", ".tsv"):
            yield from _read_csv(_lines(pieces), path, name, "," if suffix == ".csv" else "\t")
        elif text_rows == "file":
            text = "".join(pieces).replace("\r\n", "\n")
            if text.strip():
                yield Row({"text": text}, name, 1, 1)
        elif text_rows == "paragraph":
            for number, (line, content) in enumerate(_paragraphs(_lines(pieces)), 1):
                yield Row({"text": content}, name, number, line)
        else:
            filled = (line for line in _lines(pieces) if line[1].strip())
            for number, (line, content) in enumerate(filled, 1):
                yield Row({"text": content}, name, number, line)


def _open(path: Path) -> BinaryIO:
    """Open a text file, packed or not, whichever its name says and its first bytes confirm."""
    with path.open("rb") as file:
        start = file.read(2)
    if path.suffix.lower() != ".gz":
        if start == _GZIP_MAGIC:
            raise InputError(
                f"data file '{path}' is gzip, not text",
                fix=f"rename it to {path.name}.gz or unpack it",
            )
        return path.open("rb")
    if start and start != _GZIP_MAGIC:
        raise InputError(
            f"data file '{path}' is not gzip, though its name says so",
            fix=f"rename it to {path.stem}, or fetch it again",
        )
    return gzip.open(path, "rb")  # type: ignore[return-value]


def _pieces(file: BinaryIO, path: Path) -> Iterator[str]:
    """Yield a file's text in pieces, without byte order mark.

    Raises:
        InputError: A byte is not UTF-8; the sentence has its line and its place in the line.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, seen, first = 1, 0, True  # seen: bytes of the current line in earlier pieces
    while True:
        raw = file.read(_PIECE_BYTES)
        try:
            text = decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            # The decoder may have kept the first bytes of a character; a line does not end in them.
            offset = error.start - (len(error.object) - len(raw))
            line += raw.count(b"\n", 0, max(0, offset))
            newline = raw.rfind(b"\n", 0, max(0, offset))
            place = offset - newline if newline >= 0 else seen + offset + 1
            byte = error.object[error.start]
            wide = line == 1 and byte in (0xFE, 0xFF) and place == 1
            raise InputError(
                f"data file '{path}', line {line}, byte {place}: not UTF-8",
                f"0x{byte:02X}, which looks like {'UTF-16' if wide else 'Latin-1'}",
                "convert the file to UTF-8",
            ) from error
        if not raw:
            return
        newline = raw.rfind(b"\n")
        line, seen = line + raw.count(b"\n"), len(raw) - 1 - newline + (seen if newline < 0 else 0)
        if first and text:
            text, first = text.removeprefix("\ufeff"), False
        yield text


def _lines(pieces: Iterator[str]) -> Iterator[tuple[int, str]]:
    """Yield line numbers and lines, without their ends."""
    number, begun = 0, []
    for piece in pieces:
        *ended, rest = piece.split("\n")
        for line in ended:
            number += 1
            if begun:
                line, begun = "".join([*begun, line]), []
            yield number, line.removesuffix("\r")
        if rest:
            begun.append(rest)
    if begun:
        yield number + 1, "".join(begun).removesuffix("\r")


def _paragraphs(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Yield the pieces between blank lines, each with the number of its first line."""
    for blank, group in itertools.groupby(lines, key=lambda line: not line[1].strip()):
        if not blank:
            found = list(group)
            yield found[0][0], "\n".join(content for _, content in found)


def _read_csv(
    lines: Iterator[tuple[int, str]], path: Path, name: str, delimiter: str
) -> Iterator[Row | Fault]:
    records = _records(lines, path, delimiter)
    _, header = next(records, (0, []))
    if not header:
        return
    if doubled := sorted({column for column in header if header.count(column) > 1}):
        raise InputError(
            f"data file '{path}': the header has column '{doubled[0]}' twice", fix="rename one"
        )
    number = 0
    for number, (line, fields) in enumerate(records, 1):
        if len(fields) == len(header):
            yield Row(dict(zip(header, fields, strict=True)), name, number, line)
            continue
        lost = ", ".join(f"'{column}'" for column in header[len(fields) :])
        what = f"{lost} is missing" if lost else "put text that holds the separator in quotes"
        reason = f"row {number} has {len(fields)} fields, {len(header)} expected; {what}"
        yield Fault(f"{name}:{line}", reason, excerpt_of(delimiter.join(fields)))
    if number == 0:
        raise InputError(f"data file '{path}' has a header and no rows")


def _records(
    lines: Iterator[tuple[int, str]], path: Path, delimiter: str
) -> Iterator[tuple[int, list[str]]]:
    """Yield the line on which each record starts, and its fields; blank lines are no records."""

    def checked() -> Iterator[str]:
        for line, content in lines:
            if "\0" in content:
                raise InputError(
                    f"data file '{path}', line {line}: holds a NUL byte, so it is no text",
                    fix="save it as UTF-8 text",
                )
            yield content + "\n"

    # The limit is the csv module's own, for the process; it is never lowered.
    csv.field_size_limit(max(csv.field_size_limit(), _FIELD_CHARACTERS))
    reader = csv.reader(checked(), delimiter=delimiter, strict=True)
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason, fix = str(error), None
            if "unexpected end" in reason or "field limit" in reason:
                reason, fix = "a quote opens and does not close", 'close it, or write it as ""'
            elif "new-line" in reason:
                reason, fix = "a carriage return stands alone", "save it with LF or CRLF line ends"
            raise InputError(f"data file '{path}', line {start}: {reason}", fix=fix) from error
        if fields:
            yield start, fields


def _read_table(path: Path, name: str, suffix: str) -> Iterator[Row]:
    """Read parquet, and arrow in both of its layouts (files, and the streams datasets writes)."""
    import pyarrow

    path.open("rb").close()  # an error of the system's is told as one
    if path.stat().st_size == 0:
        return
    number = 0
    try:
        for batch in _parquet_batches(path) if suffix == ".parquet" else _arrow_batches(path):
            names = batch.schema.names
            if doubled := sorted({column for column in names if names.count(column) > 1}):
                raise InputError(
                    f"data file '{path}' has column '{doubled[0]}' twice", fix="rename one"
                )
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                piece = batch.slice(start, _BATCH_ROWS)
                piece.validate(full=True)  # offsets out of bounds would end the process
                for values in piece.to_pylist():
                    number += 1
                    yield Row(values, name, number)
    # pyarrow raises Python's own errors beside its own: ValueError for years beyond 9999, and so on
    except (
        pyarrow.ArrowException,
        OSError,
        ValueError,
        OverflowError,
        KeyError,
        TypeError,
    ) as error:
        kind = "parquet" if suffix == ".parquet" else "arrow"
        first = str(error).strip().split("\n")[0]
        raise InputError(
            f"data file '{path}' is not readable {kind}"
            f"{f' beyond row {number}' if number else ''}: {first}",
            fix="fetch it again, or check the step that wrote it",
        ) from error
    if number == 0:
        raise InputError(f"data file '{path}' holds no rows", fix="check the step that wrote it")


def _parquet_batches(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=_BATCH_ROWS)


def _arrow_batches(path: Path) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        magic = source.read(6)
        source.seek(0)
        if magic == b"ARROW1":
            with pyarrow.ipc.open_file(source) as file:
                for index in range(file.num_record_batches):
                    yield file.get_batch(index)
        else:
            with pyarrow.ipc.open_stream(source) as stream:
                yield from stream
