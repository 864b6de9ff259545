"""Make examples with a function of the user's own: the `formatting_prompts_func` of the tutorials.

The function gets a dict of columns and returns text. It may take many rows at once (lists in, as
`datasets.map(batched=True)` calls it) or one; which it is, is tried out with one row.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from whet.data.conversations import Unusable, read_turns, texts
from whet.data.examples import Example, finish
from whet.data.rows import Fault, Row, kind_of
from whet.errors import InputError, did_you_mean

_TRIED_ROWS = 8


def load_formatting(path_and_name: str, key: str = "data.formatting") -> Callable[..., Any]:
    """Load a function from a file or a module.

    Args:
        path_and_name: `file.py:function` or `package.module:function`.
        key: The config's key that names it, for errors.

    Raises:
        InputError: It cannot be loaded; the sentence says what is in the way.
    """
    place, _, name = path_and_name.rpartition(":")
    if not place or not name:
        raise InputError(f"{key} must be file.py:function or module:function", f"'{path_and_name}'")
    module = _load_module(place, key)
    if not hasattr(module, name):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        guess = did_you_mean(name, known)
        raise InputError(
            f"{key}: '{place}' has no function '{name}'",
            fix=f"did you mean '{guess}'?" if guess else "check its name",
        )
    function = getattr(module, name)
    if not callable(function):
        raise InputError(f"{key}: '{name}' in '{place}' must be a function", kind_of(function))
    return function


def apply_formatting(
    function: Callable[..., Any], rows: Sequence[Row]
) -> Iterator[Example | Fault]:
    """Make examples of rows.

    Args:
        function: It takes a dict of columns. It takes lists if, given each column of a row as a list
            of one value, it returns one item: {"text": [...]} or a list of texts (or of lists of
            messages). Otherwise it is called with one row, and returns a text, {"text": ...}, or a
            list of messages. A null value is given as empty text, which is noted: written into a
            text, it would be the word None.
        rows: The rows, all at once.

    Yields:
        An Example or a Fault for each row.
    """
    name = getattr(function, "__name__", type(function).__name__)
    if not rows:
        return
    if not _takes_lists(function, rows):
        for row in rows:
            yield _one(function, name, row, None)
        return
    try:
        found = _items(function(_lists(rows, _columns(rows))))
    except Exception:  # one row's, which is found below
        found = None
    for number, row in enumerate(rows):
        if found is not None and len(found) == len(rows):
            yield _to_example(found[number], name, row)
        else:
            yield _one(function, name, row, _columns(rows))


def _load_module(place: str, key: str) -> ModuleType:
    path = Path(place).expanduser()
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        beside = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        guess = did_you_mean(path.name, beside)
        raise InputError(
            f"{key}: file '{place}' does not exist",
            fix=f"did you mean '{path.with_name(guess)}'?" if guess else "check its path",
        )
    try:
        if not is_file:
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location(f"whet_formatting_{path.stem}", path)
        assert spec is not None and spec.loader is not None  # it ends in .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    # It is the user's code: whatever it raises is the user's to see, in a sentence.
    except (Exception, SystemExit) as error:
        raise InputError(
            f"{key}: '{place}' cannot be imported: {type(error).__name__}: {error}",
            fix="correct it"
            if is_file
            else "install its package, or name its file as file.py:function",
        ) from error
    return module


def _takes_lists(function: Callable[..., Any], rows: Sequence[Row]) -> bool:
    """Try the function with a list of one value for each column, on the first row that lets it."""
    for row in rows[:_TRIED_ROWS]:
        try:
            found = _items(function(_lists([row], _columns(rows))))
        except Exception:  # a function for one row may do anything to lists
            continue
        return found is not None and len(found) == 1
    return False


def _items(result: Any) -> list[Any] | None:
    """Return what a function for many rows made of them; None when it is no such result."""
    if isinstance(result, dict):
        result = next((result[key] for key in ("text", "messages") if key in result), None)
    if not isinstance(result, list | tuple) or any(isinstance(item, dict) for item in result):
        return None
    return list(result)


def _one(
    function: Callable[..., Any], name: str, row: Row, columns: Sequence[str] | None
) -> Example | Fault:
    """Call the function with one row: as lists of the columns, or as it is where they are None."""
    one = {column: _filled(value) for column, value in row.values.items()}
    try:
        result = function(one if columns is None else _lists([row], columns))
    except Exception as error:  # the user's code, told with its row
        said = f"{name}() raised {type(error).__name__}: {error}"
        return Fault(row.where, said, row.excerpt)
    if columns is not None:
        found = _items(result)
        if found is None or len(found) != 1:
            got = kind_of(result) if found is None else f"{len(found)} items"
            said = f"{name}() must return one text for each row, not {got}"
            return Fault(row.where, said, row.excerpt)
        result = found[0]
    elif isinstance(result, dict):
        result = next((result[key] for key in ("text", "messages") if key in result), result)
    return _to_example(result, name, row)


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row.values))


def _lists(rows: Sequence[Row], columns: Sequence[str]) -> dict[str, Any]:
    return {c: [_filled(row.values.get(c)) for row in rows] for c in columns}


def _filled(value: Any) -> Any:
    return "" if value is None else value


def _to_example(result: Any, name: str, row: Row) -> Example | Fault:
    try:
        if isinstance(result, list | tuple):
            example = finish(Example(row.where, tuple(read_turns(list(result), "messages"))), None)
        else:
            example = Example(row.where, text=texts({"text": result}, needed=("text",))["text"])
    except Unusable as error:
        return Fault(row.where, f"what {name}() returned: {error}", row.excerpt)
    nulls = [column for column, value in row.values.items() if value is None]
    if not nulls:
        return example
    note = f"column '{nulls[0]}' is null and was given to {name}() as empty text"
    return replace(example, notes=(*example.notes, note))
