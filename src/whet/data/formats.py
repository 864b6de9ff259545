"""Turn a row of any common layout into a conversation or a text.

The layout is detected from the first row's columns and said, or stated in the config. Values are
checked for what they are: a number or a null where text belongs is a fault with its row, and the
word `None` is never trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from whet.data.sources import Fault, Row, kind_of
from whet.errors import InputError, did_you_mean

Message = dict[str, str]

# Columns that each format needs, and those it can do without.
FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ()),
    "sharegpt": (("conversations",), ("system",)),
    "alpaca": (("instruction", "output"), ("input", "system")),
    "prompt": (("prompt", "completion"), ("system",)),
    "text": (("text",), ()),
    "tokens": (("input_ids",), ("labels",)),
}
_ROLES = {
    "system": "system", "user": "user", "assistant": "assistant",
    "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Example:
    """One example, before any template or tokenizer has touched it.

    Args:
        where: The place it came from, such as `rows.jsonl:3`.
        messages: The conversation, as role and content; empty for plain text.
        text: The plain text; empty for a conversation.
        input_ids: The token ids of a row that is tokenised already; empty for the others.
        labels: Their labels.
        notes: What is odd about it and was let pass, one sentence each.
    """

    where: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    input_ids: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What makes two examples the same."""
        if self.input_ids:
            return repr((self.input_ids, self.labels))
        return self.text or repr([(m["role"], m["content"]) for m in self.messages])


def detect_format(row: Row, columns: dict[str, str]) -> str:
    """Tell a file's format from its first row.

    Args:
        row: The first row.
        columns: The config's column map, from a format's column to the file's.

    Returns:
        A key of FORMATS.

    Raises:
        InputError: No format fits; the sentence names the nearest column.
    """
    have = [*row.values, *columns]
    for name, (needed, _) in FORMATS.items():
        if all(column in have for column in needed):
            return name
    file = f"{row.file}, line 1" if row.file.endswith((".csv", ".tsv")) else row.where
    found = ", ".join(f"'{column}'" for column in row.values)
    for name, (needed, optional) in FORMATS.items():
        missing = [column for column in needed if column not in have]
        if len(missing) < len(needed) or any(column in have for column in optional):
            guess = did_you_mean(
                missing[0], [column for column in row.values if column not in needed]
            )
            raise InputError(
                f"{file}: format '{name}' needs column '{missing[0]}'",
                found,
                f"did you mean '{guess}'? rename it, or set data.columns: {{{missing[0]}: {guess}}}"
                if guess
                else f"add it, or name the answer's column in data.columns: {{{missing[0]}: NAME}}",
            )
    raise InputError(
        f"{file}: no column to learn from", found,
        "set data.columns, such as {instruction: question, output: answer} or {text: body}",
    )  # fmt: skip


def check_columns(row: Row, name: str, columns: dict[str, str]) -> None:
    """Check that the columns a format needs, or the config names, are in the first row.

    Raises:
        InputError: One is not there.
    """
    needed, optional = FORMATS[name]
    for column in (*needed, *(c for c in columns if c in optional)):
        source = columns.get(column, column)
        if source in row.values:
            continue
        guess = did_you_mean(source, row.values)
        raise InputError(
            f"{row.where}: format '{name}' needs column '{source}'",
            ", ".join(f"'{c}'" for c in row.values),
            f"did you mean '{guess}'? set data.columns: {{{column}: {guess}}}"
            if guess
            else f"set data.columns: {{{column}: NAME}}",
        )
    if unknown := [c for c in columns if c not in (*needed, *optional)]:
        raise InputError(
            f"data.columns names '{unknown[0]}', which format '{name}' does not have",
            fix=f"use {', '.join((*needed, *optional))}",
        )


def to_example(row: Row, name: str, columns: dict[str, str], system: str | None) -> Example | Fault:
    """Read one row in a known format.

    Args:
        row: The row.
        name: A key of FORMATS.
        columns: The config's column map.
        system: System prompt for conversations that have none.

    Returns:
        The example, or the Fault that keeps the row from being used.
    """
    values = {c: row.values.get(columns.get(c, c)) for c in (*FORMATS[name][0], *FORMATS[name][1])}
    try:
        if name == "text":
            return Example(row.where, text=_texts(values, needed=("text",))["text"])
        if name == "tokens":
            return _from_tokens(row.where, values)
        messages = _CONVERSATIONS[name](values)
        prompt = _texts(values, optional=("system",))["system"] or system
    except _Unusable as error:
        return Fault(row.where, str(error))
    if prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": prompt}, *messages]
    return _trimmed(row, messages)


class _Unusable(ValueError):
    """Why a row cannot be used, as a sentence."""


def _texts(
    values: dict[str, Any], needed: Sequence[str] = (), optional: Sequence[str] = ()
) -> dict[str, str]:
    """Return columns that must hold text; a null is empty where the column is optional."""
    wrong = []
    for column in (*needed, *optional):
        value = values.get(column)
        if value is None and column in needed:
            wrong.append(f"has no '{column}'")
        elif value is not None and not isinstance(value, str):
            wrong.append(f"'{column}' must be text, not {kind_of(value)}")
        elif column in needed and not (value or "").strip():
            wrong.append(f"'{column}' is empty")
    if wrong:
        raise _Unusable(f"{', '.join(wrong)}; fill it in, put quotes round it, or remove the row")
    return {column: values.get(column) or "" for column in (*needed, *optional)}


def _from_alpaca(values: dict[str, Any]) -> list[Message]:
    text = _texts(values, needed=("instruction", "output"), optional=("input",))
    question = text["instruction"] + (f"\n\n{text['input']}" if text["input"] else "")
    return _turns(question, text["output"])


def _from_prompt(values: dict[str, Any]) -> list[Message]:
    text = _texts(values, needed=("prompt", "completion"))
    return _turns(text["prompt"], text["completion"])


def _from_tokens(where: str, values: dict[str, Any]) -> Example:
    ids = values["input_ids"]
    labels = ids if values["labels"] is None else values["labels"]
    for column, found in (("input_ids", ids), ("labels", labels)):
        if not isinstance(found, list) or any(type(i) is not int for i in found):
            raise _Unusable(f"'{column}' must be a list of integers")
    if len(ids) != len(labels):
        raise _Unusable(f"has {len(ids)} input_ids and {len(labels)} labels")
    if len(ids) < 2:
        raise _Unusable("'input_ids' needs two tokens, one to predict from and one to predict")
    for place, (id_, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (id_, -100):
            raise _Unusable(
                f"label {label} at place {place} is neither -100 nor the token's own id {id_}; "
                "labels are not shifted"
            )
    return Example(where, input_ids=tuple(ids), labels=tuple(labels))


def _turns(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _from_list(
    column: str, role_key: str, content_key: str
) -> Callable[[dict[str, Any]], list[Message]]:
    """Return the reader of a column that holds a list of turns."""

    def read(values: dict[str, Any]) -> list[Message]:
        turns = values[column]
        if not isinstance(turns, list) or not turns:
            raise _Unusable(f"'{column}' must be a list of turns, not {kind_of(turns)}")
        messages = []
        for number, turn in enumerate(turns, 1):
            if not isinstance(turn, dict) or role_key not in turn or content_key not in turn:
                raise _Unusable(
                    f"turn {number} of '{column}' needs '{role_key}' and '{content_key}'"
                )
            role = _ROLES.get(str(turn[role_key]).lower())
            if role is None:
                raise _Unusable(
                    f"turn {number} has role '{turn[role_key]}'; known are {', '.join(_ROLES)}"
                )
            content = turn[content_key]
            if not isinstance(content, str):
                raise _Unusable(f"turn {number}: content must be text, not {kind_of(content)}")
            messages.append({"role": role, "content": content})
        return messages

    return read


_CONVERSATIONS: dict[str, Callable[[dict[str, Any]], list[Message]]] = {
    "alpaca": _from_alpaca,
    "prompt": _from_prompt,
    "messages": _from_list("messages", "role", "content"),
    "sharegpt": _from_list("conversations", "from", "value"),
}


def _trimmed(row: Row, messages: list[Message]) -> Example:
    """Drop turns after the last answer, and note what is odd."""
    notes = []
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        return Example(row.where, notes=("has no assistant turn: nothing to learn, left out",))
    last = len(roles) - 1 - roles[::-1].index("assistant")
    if last < len(roles) - 1:
        notes.append("ends with a turn that has no reply: that turn is not learned")
    doubled = [i for i in range(1, last + 1) if roles[i] == roles[i - 1]]
    if doubled:
        notes.append(
            f"turns {doubled[0]} and {doubled[0] + 1} are both '{roles[doubled[0]]}': join them, or "
            "add the missing turn"
        )
    if any(m["role"] == "assistant" and not m["content"].strip() for m in messages[: last + 1]):
        notes.append("has an empty answer: the model learns to say nothing")
    return Example(row.where, tuple(messages[: last + 1]), notes=tuple(notes))
