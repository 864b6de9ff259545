"""Read JSON lines and JSON arrays, strictly and without holding the file.

Python's decoder lets pass what must not be trained on: doubled keys, NaN, and halves of surrogate
pairs that no tokenizer can encode. Here they are faults. An array is decoded element by element
from a window that slides over the text, so that a fault knows its row, line and column.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from whet.data.rows import Fault, Row, excerpt_of, kind_of
from whet.errors import InputError

_SPACE = re.compile(r"[ \t\n\r]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_KEY_OF_ROWS = re.compile(r'\{\s*"([^"\\]*)"\s*:\s*\[')
_ARRAY_START = re.compile(r"\[\s*(\{|$)")
# The decoder names a place at most this far before the end of a text that is cut inside a value
# (the longest literal is -Infinity, the longest escape \uXXXX); strings are told by the message.
_CUT_CHARACTERS = 16
_START_CHARACTERS = 200  # of a file that is no array, looked at to say what it is


class _Refused(ValueError):
    """JSON that Python cannot hold: where the value ends is not known."""


class _Decoder:
    """Decode one JSON value and say what is wrong with it though Python would take it."""

    def __init__(self) -> None:
        self._wrong: list[str] = []
        self._json = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)

    def decode(self, text: str, position: int) -> tuple[Any, int, str | None]:
        """Return the value at a position, where it ends, and what is wrong with it.

        Raises:
            json.JSONDecodeError: There is no JSON value.
            _Refused: There is one, and Python cannot hold it.
        """
        self._wrong.clear()
        try:
            value, end = self._json.raw_decode(text, position)
            if not self._wrong and _SURROGATE.search(text, position, end):
                json.dumps(value, ensure_ascii=False).encode()
        except json.JSONDecodeError:
            raise
        except UnicodeEncodeError:
            self._wrong.append(
                "a text holds half of a surrogate pair (\\ud800 to \\udfff), which is no character; "
                "write the whole pair"
            )
        except RecursionError as error:
            raise _Refused("its values are nested too deeply; flatten them") from error
        except ValueError as error:
            raise _Refused("it holds a number with too many digits; put it in quotes") from error
        return value, end, self._wrong[0] if self._wrong else None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values and values[key] != value:
                self._wrong.append(
                    f"key '{excerpt_of(key)}' occurs twice and the values differ; keep one"
                )
            values[key] = value
        return values

    def _constant(self, name: str) -> None:
        self._wrong.append(f"{name} is not JSON; write a number, or remove the row")


def read_json_lines(
    lines: Iterable[tuple[int, str]], path: Path, name: str
) -> Iterator[Row | Fault]:
    """Read one object a line.

    Args:
        lines: Line numbers and lines.
        path: The file, for errors.
        name: What rows call it.

    Yields:
        A Row or a Fault for each line that is not blank.

    Raises:
        InputError: The file holds an array that spans lines.
    """
    decoder, number = _Decoder(), 0
    for line, content in lines:
        if not content.strip():
            continue
        number += 1
        if number == 1 and _ARRAY_START.match(content):
            raise InputError(
                f"data file '{path}' is a JSON array, not one object a line",
                fix=f"rename it to '{path.name.replace('.jsonl', '.json')}'",
            )
        where = f"{name}:{line}"
        start = _space_end(content, 0)
        try:
            value, end, wrong = decoder.decode(content, start)
            if (end := _space_end(content, end)) < len(content):
                raise json.JSONDecodeError("More text after the object", content, end)
        except json.JSONDecodeError as error:
            reason = f"not JSON at column {error.colno}: {_reason(error)}"
            yield Fault(where, reason, excerpt_of(content))
        except _Refused as error:
            yield Fault(where, str(error), excerpt_of(content))
        else:
            yield _row_or_fault(value, wrong, name, number, line, content)


class _Window:
    """The part of a long text that is looked at: it slides on, and grows where it must.

    Args:
        pieces: The text, in pieces.
    """

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces
        self.text = ""
        self.position = 0
        self.line = self.column = 1  # of the position

    def place(self, position: int) -> tuple[int, int]:
        """Return line and column of a position that lies ahead."""
        newlines = self.text.count("\n", self.position, position)
        if newlines:
            return self.line + newlines, position - self.text.rfind("\n", self.position, position)
        return self.line, self.column + position - self.position

    def advance(self, position: int) -> None:
        """Go on to a position."""
        self.line, self.column = self.place(position)
        self.position = position

    def grow(self) -> bool:
        """Drop what lies behind and at least double what lies ahead; False at the end.

        Doubling keeps the work linear for an element that is longer than many pieces.
        """
        parts = [self.text[self.position :]]
        wanted = len(parts[0]) + 1
        while wanted > 0 and (piece := next(self._pieces, None)) is not None:
            parts.append(piece)
            wanted -= len(piece)
        if len(parts) == 1:
            return False  # and every position stays what it was
        self.text, self.position = "".join(parts), 0
        return True

    def skip_space(self) -> str:
        """Go on to the next character that is not white space; return it, or nothing at the end."""
        while True:
            self.advance(_space_end(self.text, self.position))
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.grow():
                return ""

    def value(self, decoder: _Decoder) -> tuple[Any, str | None, str]:
        """Decode the value at the position and go past it.

        Returns:
            The value, what is wrong with it, and the beginning of its text.
        """
        while True:
            try:
                value, end, wrong = decoder.decode(self.text, self.position)
            except json.JSONDecodeError as error:
                near_end = error.pos > len(self.text) - _CUT_CHARACTERS
                if (near_end or error.msg.startswith("Unterminated")) and self.grow():
                    continue
                raise
            if end == len(self.text) and self.grow():
                continue  # a number may go on in the next piece
            begin = self.text[self.position : min(end, self.position + 500)]
            self.advance(end)
            return value, wrong, begin


def read_json_array(pieces: Iterator[str], path: Path, name: str) -> Iterator[Row | Fault]:
    """Read an array of objects, element by element.

    Args:
        pieces: The file's text, in pieces.
        path: The file, for errors.
        name: What rows call it.

    Yields:
        A Row or a Fault for each element.

    Raises:
        InputError: The file is no array, or it breaks inside an element, past which nothing says
            where the next one starts.
    """
    window, decoder, number, after = _Window(pieces), _Decoder(), 0, ","
    if not _enter_array(window, path):
        return
    while after == ",":
        if window.skip_space() == "]" and number == 0:
            raise InputError(
                f"data file '{path}' holds no rows", fix="check the step that wrote it"
            )
        number, whole, line = number + 1, number, window.line
        try:
            value, wrong, begin = window.value(decoder)
            whole, after = number, window.skip_space()
            if after not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", window.text, window.position)
        except json.JSONDecodeError as error:
            at_line, column = window.place(error.pos)
            raise InputError(
                f"data file '{path}', row {number}, line {at_line}, column {column}: "
                f"{_reason(error)}",
                fix=f"fetch the file again, or end it with ] after row {whole}",
            ) from error
        except _Refused as error:
            raise InputError(f"data file '{path}', row {number}, line {line}: {error}") from error
        yield _row_or_fault(value, wrong, name, number, line, begin)
        window.advance(window.position + 1)
    if window.skip_space():
        raise InputError(
            f"data file '{path}', line {window.line}, column {window.column}: text after the "
            "closing ]",
            fix="remove it, or join the arrays into one",
        )


def _enter_array(window: _Window, path: Path) -> bool:
    """Go past the opening bracket, or say what the file is instead; False when it is blank."""
    first = window.skip_space()
    if first == "[":
        window.advance(window.position + 1)
    if first in ("[", ""):
        return bool(first)
    while len(window.text) - window.position < _START_CHARACTERS and window.grow():
        pass
    key = _KEY_OF_ROWS.match(window.text, window.position)
    raise InputError(
        f"data file '{path}' must hold a JSON array of rows",
        f"an object whose key '{key[1]}' holds a list" if key
        else f"text that starts with {window.text[window.position:][:20]!r}",
        f"save the list under '{key[1]}' as a file of its own" if key
        else "put the rows into [...], or name it .jsonl when each line is a row",
    )  # fmt: skip


def _space_end(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    assert found is not None  # it matches nothing at all, too
    return found.end()


def _reason(error: json.JSONDecodeError) -> str:
    if error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string"):
        return "the file or line ends inside a value"
    return error.msg[0].lower() + error.msg[1:]


def _row_or_fault(
    value: Any, wrong: str | None, file: str, number: int, line: int, raw: str
) -> Row | Fault:
    if wrong is not None:
        return Fault(f"{file}:{line}", wrong, excerpt_of(raw))
    if isinstance(value, dict):
        return Row(value, file, number, line)
    reason = f"a row must be an object with columns, not {kind_of(value)}"
    return Fault(f"{file}:{line}", reason, excerpt_of(raw))
