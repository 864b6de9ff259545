"""Turn a row of any common layout into a conversation, a pair of them, a text or token ids.

The layout is detected from the first row's columns and said, or stated in the config. Values are
checked for what they are: a number or a null where text belongs is a fault with its row, and the
word `None` is never trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from whet.data import conversations as conv
from whet.data.conversations import TURN_COLUMNS, Message, Unusable
from whet.data.examples import Example, finish, merge_turns
from whet.data.formatting import apply_formatting, load_formatting
from whet.data.rows import Fault, Row
from whet.errors import InputError, did_you_mean

__all__ = [
    "FORMATS", "Example", "Message", "apply_formatting", "check_columns", "columns_read",
    "detect_format", "load_formatting", "merge_turns", "to_example",
]  # fmt: skip

_CHOICES = tuple("ABCDEFGH")
# Columns that each format needs, and those it can do without; detected in this order.
FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "preference": (("chosen", "rejected"), ("prompt", "input", "messages", "system", "tools")),
    "kto": (("label",), ("messages", "prompt", "completion", "system", "tools")),
    "messages": (("messages",), ("system", "tools")),
    "sharegpt": (("conversations",), ("system", "tools")),
    "alpaca": (("instruction", "output"), ("input", "system", "history")),
    "qa": (("question", "answer"), ("context", "system", *_CHOICES)),
    "prompt": (("prompt", "completion"), ("system", "tools")),
    "text": (("text",), ()),
    "tokens": (("input_ids",), ("labels",)),
}
# Other names that a column goes by; a column of the format's own name wins.
_ALSO: dict[str, tuple[str, ...]] = {
    "instruction": ("query",),
    "output": ("response", "answer"),
    "input": ("context",),
    "question": ("query",),
    "answer": ("response",),
    "prompt": ("question", "instruction", "query"),
    "completion": ("response", "answer"),
    **{c: tuple(also for also in TURN_COLUMNS if also != c) for c in TURN_COLUMNS[:2]},
}
_LABELS = {"true": True, "false": False, "1": True, "0": False}


def columns_read(have: Iterable[str], name: str, columns: dict[str, str]) -> dict[str, str]:
    """Tell which column of the file is read as which of a format's.

    Args:
        have: The row's columns.
        name: A key of FORMATS.
        columns: The config's column map, from a format's column to the file's.

    Returns:
        From each of the format's columns that is there to the file's, the same name in most cases.
    """
    have = set(have)
    needed, optional = FORMATS[name]
    found = {column: _find(column, have, columns) for column in (*needed, *optional)}
    return {column: source for column, source in found.items() if source in have}


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
    have = {*row.values, *columns}
    for also in (False, True):  # a format's own names before other names for them
        for name, (needed, _) in FORMATS.items():
            names = [_find(c, have, columns) if also else c for c in needed]
            if not have.issuperset(names) or (name == "kto" and not _is_kto(row, columns)):
                continue
            if name not in ("messages", "sharegpt"):
                return name
            turns = row.values.get(_find(needed[0], set(row.values), columns))
            if not isinstance(turns, list):
                return name
            return "sharegpt" if conv.names_sharegpt(turns) else "messages"
    raise _no_format(row, have)


def check_columns(row: Row, name: str, columns: dict[str, str]) -> None:
    """Check that the columns a format needs, or the config names, are in the first row.

    Raises:
        InputError: One is not there.
    """
    needed, optional = FORMATS[name]
    turns = TURN_COLUMNS if {*needed, *optional} & set(TURN_COLUMNS) else ()
    for column in (*needed, *(c for c in columns if c in (*optional, *turns) and c not in needed)):
        source = columns.get(column) or _find(column, set(row.values), columns)
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
    if unknown := [c for c in columns if c not in (*needed, *optional, *turns)]:
        raise InputError(
            f"data.columns names '{unknown[0]}', which format '{name}' does not have",
            fix=f"use {', '.join((*needed, *optional))}",
        )
    read = columns_read(row.values, name, columns)
    if name == "kto" and "messages" not in read and not {"prompt", "completion"} <= set(read):
        raise InputError(
            f"{row.where}: format 'kto' needs column 'messages', or 'prompt' and 'completion'",
            ", ".join(f"'{c}'" for c in row.values), "set data.columns: {prompt: NAME, completion: NAME}",
        )  # fmt: skip


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
    read = columns_read(row.values, name, columns)
    values = {
        column: row.values[read[column]] if column in read else None
        for column in (*FORMATS[name][0], *FORMATS[name][1])
    }
    try:
        example = _READERS[name](row.where, values)
        if not example.messages:
            return example
        prompt = conv.texts(values, optional=("system",))["system"] or system
        tools = conv.read_tools(values.get("tools"))
    except Unusable as error:
        return Fault(row.where, str(error), row.excerpt)
    notes = example.notes
    if row.number == 1:  # told once for a file, not in every row
        notes += tuple(
            f"column '{source}' is read as '{column}'"
            for column, source in read.items()
            if source != column and column not in columns and column not in TURN_COLUMNS
        )
    return finish(replace(example, tools=tools, notes=notes), prompt)


def _find(column: str, have: set[str], columns: dict[str, str]) -> str:
    """Return the file's name for a format's column: mapped, its own, or another it goes by."""
    names = (column, *_ALSO.get(column, ()))
    if column in columns:
        return columns[column]
    if column in TURN_COLUMNS:
        for name in names:
            if name in columns:
                return columns[name]
    taken = set(columns.values())
    return next((name for name in names if name in have and name not in taken), column)


def _no_format(row: Row, have: set[str]) -> InputError:
    file = f"{row.file}, line 1" if row.file.endswith((".csv", ".tsv")) else row.where
    found = ", ".join(f"'{column}'" for column in row.values)
    near: list[tuple[bool, str, str, str | None]] = []
    for name, (needed, _) in FORMATS.items():
        missing = [column for column in needed if column not in have]
        others = [column for column in row.values if column not in needed]
        guess = did_you_mean(missing[0], others) if missing else None
        if missing and (guess or len(missing) < len(needed)):
            near.append((len(missing) == len(needed), name, missing[0], guess))
    if near:
        _, name, missed, guess = min(near, key=lambda found: found[0])  # one that has a column
        return InputError(
            f"{file}: format '{name}' needs column '{missed}'",
            found,
            f"did you mean '{guess}'? rename it, or set data.columns: {{{missed}: {guess}}}"
            if guess
            else f"add it, or say which column it is in data.columns: {{{missed}: NAME}}",
        )
    return InputError(
        f"{file}: no column to learn from", found,
        "set data.columns, such as {instruction: question, output: answer} or {text: body}",
    )  # fmt: skip


def _is_kto(row: Row, columns: dict[str, str]) -> bool:
    """Say whether a label judges an answer; classes of plain texts are called label, too."""
    read = columns_read(row.values, "kto", columns)
    answered = "messages" in read or {"prompt", "completion"} <= set(read)
    return answered and _label(row.values.get(read.get("label", ""))) is not None


def _label(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    return _LABELS.get(str(value).lower()) if isinstance(value, int | str) else None


def _from_text(where: str, values: dict[str, Any]) -> Example:
    return Example(where, text=conv.texts(values, needed=("text",))["text"])


def _from_tokens(where: str, values: dict[str, Any]) -> Example:
    ids = values["input_ids"]
    labels = ids if values["labels"] is None else values["labels"]
    for column, found in (("input_ids", ids), ("labels", labels)):
        if not isinstance(found, list) or any(type(i) is not int for i in found):
            raise Unusable(f"'{column}' must be a list of integers")
    if len(ids) != len(labels):
        raise Unusable(f"has {len(ids)} input_ids and {len(labels)} labels")
    if len(ids) < 2:
        raise Unusable("'input_ids' needs two tokens, one to predict from and one to predict")
    for place, (id_, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (id_, -100):
            raise Unusable(
                f"label {label} at place {place} is neither -100 nor the token's own id {id_}; "
                "labels are not shifted"
            )
    return Example(where, input_ids=tuple(ids), labels=tuple(labels))


def _from_messages(where: str, values: dict[str, Any]) -> Example:
    return Example(where, tuple(conv.read_turns(values["messages"], "messages")))


def _from_sharegpt(where: str, values: dict[str, Any]) -> Example:
    return Example(where, tuple(conv.read_turns(values["conversations"], "conversations")))


def _from_alpaca(where: str, values: dict[str, Any]) -> Example:
    text = conv.texts(values, needed=("instruction", "output"), optional=("input",))
    earlier: list[Message] = []
    for number, pair in enumerate(conv.read_list(values["history"], "history"), 1):
        if not isinstance(pair, list | tuple) or [type(said) for said in pair] != [str, str]:
            raise Unusable(f"pair {number} of 'history' must be [question, answer], both text")
        earlier += conv.turns(*pair)
    question = text["instruction"] + (f"\n\n{text['input']}" if text["input"] else "")
    asked, answered = conv.turns(question, text["output"])
    # The classic Alpaca template puts the two parts in places of their own.
    asked = {**asked, "instruction": text["instruction"], "input": text["input"]}
    return Example(where, (*earlier, asked, answered))


def _from_qa(where: str, values: dict[str, Any]) -> Example:
    text = conv.texts(values, needed=("question", "answer"), optional=("context", *_CHOICES))
    parts = [f"{text['context']}\n\n{text['question']}" if text["context"] else text["question"]]
    parts += [f"{letter}. {text[letter]}" for letter in _CHOICES if text[letter]]
    return Example(where, tuple(conv.turns("\n".join(parts), text["answer"])))


def _from_prompt(where: str, values: dict[str, Any]) -> Example:
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, list | dict) or isinstance(completion, list | dict):
        asked = conv.read_side(prompt, "prompt", "user")
        return Example(where, (*asked, *conv.read_side(completion, "completion", "assistant")))
    text = conv.texts(values, needed=("prompt", "completion"))
    return Example(where, tuple(conv.turns(text["prompt"], text["completion"])))


def _from_kto(where: str, values: dict[str, Any]) -> Example:
    desirable = _label(values["label"])
    if desirable is None:
        raise Unusable("'label' must be true or false (or 1 or 0)")
    read = _from_prompt if values["messages"] is None else _from_messages
    return replace(read(where, values), desirable=desirable)


def _from_preference(where: str, values: dict[str, Any]) -> Example:
    chosen = conv.read_side(values["chosen"], "chosen", "assistant")
    rejected = conv.read_side(values["rejected"], "rejected", "assistant")
    for column, side in (("chosen", chosen), ("rejected", rejected)):
        if side[-1]["role"] != "assistant":
            raise Unusable(f"'{column}' must end with an assistant's turn; add the answer")
    prompt = _prompt_of(values)
    system = [message for message in prompt[:1] if message["role"] == "system"]
    if prompt and all(_begins(side, prompt[len(system) :]) for side in (chosen, rejected)):
        prompt = [] if chosen[0]["role"] == "system" else system
    elif (
        prompt
        and prompt[-1]["role"] == "user"
        and "user" in (chosen[0]["role"], rejected[0]["role"])
    ):
        raise Unusable(
            "'chosen' or 'rejected' begins with another question than the prompt; make them the same"
        )
    elif not prompt and "assistant" in (chosen[0]["role"], rejected[0]["role"]):
        raise Unusable("'chosen' and 'rejected' are answers to nothing: add a column 'prompt'")
    elif not prompt and chosen[0] != rejected[0]:
        raise Unusable("'chosen' and 'rejected' must begin with the same turn: they answer it")
    return Example(where, (*prompt, *chosen), rejected=(*prompt, *rejected))


def _begins(side: list[Message], prompt: list[Message]) -> bool:
    """Say whether an answer's list holds its prompt, behind a system prompt or not."""
    start = 1 if side[0]["role"] == "system" else 0
    return side[start : start + len(prompt)] == prompt


def _prompt_of(values: dict[str, Any]) -> list[Message]:
    """Return the turns before the two answers; none where the answers' lists hold them."""
    if values["prompt"] is not None:
        prompt = conv.read_side(values["prompt"], "prompt", "user")
        added = conv.texts(values, optional=("input",))["input"]
        if added:
            prompt[-1] = {**prompt[-1], "content": f"{prompt[-1]['content']}\n\n{added}"}
        return prompt
    return [] if values["messages"] is None else conv.read_turns(values["messages"], "messages")


_READERS: dict[str, Callable[[str, dict[str, Any]], Example]] = {
    "preference": _from_preference,
    "kto": _from_kto,
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "qa": _from_qa,
    "prompt": _from_prompt,
    "text": _from_text,
    "tokens": _from_tokens,
}
