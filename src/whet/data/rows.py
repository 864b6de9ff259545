"""A row as it was read, and a row that cannot be used: what every reader yields."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

_EXCERPT_CHARACTERS = 120


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read.

    Args:
        values: The columns.
        file: Name of the file or dataset; below a folder, the path from there.
        number: Row number in its file, from 1.
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

    @property
    def excerpt(self) -> str:
        """The beginning of its values as compact JSON on one line, for a fault to show."""
        try:
            text = json.dumps(
                self.values, ensure_ascii=False, separators=(",", ":"), default=lambda v: kind_of(v)
            )
        except (ValueError, TypeError, RecursionError):  # nested beyond what can be written again
            return ""
        return excerpt_of(text)


@dataclass(frozen=True, slots=True)
class Fault:
    """A row that cannot be used, and why.

    Args:
        where: The place, such as `rows.jsonl:7`.
        reason: What is wrong and what to do, as one sentence.
        excerpt: The first 120 characters of the row, on one line.
    """

    where: str
    reason: str
    excerpt: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def excerpt_of(text: str) -> str:
    """Return the beginning of a raw row, on one line and safe to print.

    Args:
        text: The row as it stands in the file.
    """
    begin = text[: 4 * _EXCERPT_CHARACTERS]  # a row may have megabytes
    shown = "".join(c if c.isprintable() else " " for c in begin)
    return " ".join(shown.split())[:_EXCERPT_CHARACTERS]


def kind_of(value: Any) -> str:
    """Name a value's type as a person would.

    Args:
        value: Any value read from JSON or parquet.
    """
    for kind, name in (
        (bool, "boolean"), (str, "text"), (int | float, "number"), (list | tuple, "list"),
        (dict, "object"),
    ):  # fmt: skip
        if isinstance(value, kind):
            return name
    return "null" if value is None else type(value).__name__
