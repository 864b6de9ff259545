"""One example, as every format is turned into: a conversation, a pair of them, a text or token ids."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from whet.data.conversations import Message, notes_on

_PLACE = re.compile(r"(.*[: ])(\d+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Example:
    """One example, before any template or tokenizer has touched it.

    Args:
        where: The place it came from, such as `rows.jsonl:3`.
        messages: The conversation; empty for plain text. Of a preference: the prompt and what was
            chosen.
        text: The plain text; empty for a conversation.
        input_ids: The token ids of a row that is tokenised already; empty for the others.
        labels: Their labels.
        notes: What is odd about it and was let pass, one sentence each.
        rejected: Of a preference: the prompt and what was rejected.
        desirable: Of a KTO row: whether the answer is a good one.
        tools: Schemas of the tools that the conversation may call.
    """

    where: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    input_ids: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    rejected: tuple[Message, ...] = ()
    desirable: bool | None = None
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def key(self) -> str:
        """What makes two examples the same; held-out rows are drawn by its hash."""
        if self.input_ids:
            return repr((self.input_ids, self.labels))
        if self.text:
            return self.text
        beside = [
            {k: m[k] for k in ("tool_calls", "reasoning_content", "thinking") if k in m}
            for m in (*self.messages, *self.rejected)
        ]
        plain = _said(self.messages)
        if not (any(beside) or self.rejected or self.tools or self.desirable is not None):
            return plain
        return repr((plain, _said(self.rejected), self.desirable, self.tools, beside))

    @property
    def prompt_key(self) -> str:
        """What stands before the last answer; empty where nothing is asked."""
        last = _last_answer(self.messages)
        return _said(self.messages[:last]) if last else ""

    @property
    def answer(self) -> str:
        """The last answer of a conversation, or the text."""
        last = _last_answer(self.messages)
        return self.text if last is None else self.messages[last]["content"]


def finish(example: Example, system: str | None) -> Example:
    """Add a system prompt, drop turns after the last answer, and note what is odd.

    Args:
        example: A conversation as it was read.
        system: System prompt, if it has none.
    """
    messages, rejected = (
        ({"role": "system", "content": system}, *side)
        if system and side and side[0]["role"] != "system"
        else side
        for side in (example.messages, example.rejected)
    )
    last = _last_answer(messages)
    if last is None:
        return Example(example.where, notes=("has no assistant turn: nothing to learn, left out",))
    notes = list(example.notes)
    if last < len(messages) - 1:
        notes.append("ends with a turn that has no reply: that turn is not learned")
    notes += notes_on(messages[: last + 1])
    notes += [note for note in notes_on(rejected) if note not in notes]
    if rejected and [*map(_bare, rejected)] == [*map(_bare, messages)]:
        notes.append(
            "chosen and rejected are the same: the pair teaches nothing; change one or remove the row"
        )
    return replace(example, messages=messages[: last + 1], rejected=rejected, notes=tuple(notes))


def merge_turns(examples: Iterable[Example], num: int) -> Iterator[Example]:
    """Join neighbouring one-turn conversations to longer ones.

    Args:
        examples: Examples in order. What is not one question and one answer without tools passes
            through, and ends what was begun, as does another system prompt.
        num: How many make one; 1 leaves all as they are. The last of a run may have fewer.

    Yields:
        Examples whose place is such as `rows.jsonl:1 to 3`.
    """
    begun: list[Example] = []
    for example in examples:
        single = num > 1 and _is_single_turn(example)
        if begun and not (single and _system(begun[0]) == _system(example)):
            yield _joined(begun)
            begun = []
        if not single:
            yield example
            continue
        begun.append(example)
        if len(begun) == num:
            yield _joined(begun)
            begun = []
    if begun:
        yield _joined(begun)


def _is_single_turn(example: Example) -> bool:
    roles = [m["role"] for m in example.messages if m["role"] != "system"]
    calls = any("tool_calls" in m for m in example.messages)
    beside = calls or example.tools or example.rejected or example.desirable is not None
    return roles == ["user", "assistant"] and not beside


def _system(example: Example) -> list[str]:
    return [m["content"] for m in example.messages if m["role"] == "system"]


def _joined(examples: list[Example]) -> Example:
    first, last = examples[0], examples[-1]
    if len(examples) == 1:
        return first
    start, end = _PLACE.fullmatch(first.where), _PLACE.fullmatch(last.where)
    same_file = start and end and start[1] == end[1]
    later = [m for e in examples[1:] for m in e.messages if m["role"] != "system"]
    return Example(
        f"{first.where} to {end[2] if same_file and end else last.where}",
        (*first.messages, *later),
        notes=tuple(note for e in examples for note in e.notes),
    )


def _said(messages: Iterable[Message]) -> str:
    return repr([(m["role"], m["content"]) for m in messages])


def _bare(message: Message) -> Message:
    return {k: v for k, v in message.items() if k not in ("instruction", "input")}


def _last_answer(messages: tuple[Message, ...]) -> int | None:
    places = range(len(messages) - 1, -1, -1)
    return next((i for i in places if messages[i]["role"] == "assistant"), None)
