"""Where the assistant speaks in a rendered conversation, for any chat template.

A template is a program, so the spans are found by running it: with its own `{% generation %}` marks
where it has them, otherwise by comparing renders. Nothing is searched for by a magic string. What
text a control token makes of a turn's end is learned from a render with a sentinel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from whet.errors import InputError
from whet.model import Tokenizer

# The forms control tokens take in the templates people use. `<think>` and `<tool_call>` are words that
# models write, not control tokens.
_LOOKS_LIKE_CONTROL = re.compile(
    r"<\|[^\s<>|]{1,60}\|>|<｜[^\s<>｜]{1,60}｜>|</?s>|<(?:bos|eos|pad|unk)>"
    r"|<(?:start|end)_of_(?:turn|utterance|image|text)>"
    r"|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_RESULTS|SYSTEM_PROMPT|TOOL_CONTENT)\]|\[TOOL_CALLS\]"
)
_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# What an assistant's message says; other keys (a name, a weight) stay where a sentinel takes its place.
_SAID = ("content", "tool_calls", "reasoning_content", "reasoning", "thinking", "function_call")

_Turns = Sequence[Mapping[str, Any]]


@dataclass(slots=True)
class _Known:
    """What was found out about a tokenizer, until its special tokens change."""

    state: tuple[Any, ...]
    added: frozenset[str]
    specials: re.Pattern[str]
    heads: tuple[str, ...]
    around: dict[str, tuple[str, str]] = field(default_factory=dict)
    single: dict[str, bool] = field(default_factory=dict)


_KNOWN: WeakKeyDictionary[Tokenizer, _Known] = WeakKeyDictionary()


def _known(tokenizer: Tokenizer) -> _Known:
    state = (len(tokenizer), tokenizer.special_tokens_map)
    known = _KNOWN.get(tokenizer)
    if known is None or known.state != state:
        added = {t.content: t.special for t in tokenizer.added_tokens_decoder.values()}
        special = {*tokenizer.all_special_tokens, *(text for text in added if added[text])}
        longest_first = sorted(filter(None, special), key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        heads = tuple({text[:3] for text in longest_first})
        known = _KNOWN[tokenizer] = _Known(state, frozenset(added) | special, pattern, heads)
    return known


def render_text(
    tokenizer: Tokenizer,
    messages: _Turns,
    tools: Sequence[Any] = (),
    add_generation_prompt: bool = False,
) -> str:
    """Run the tokenizer's chat template.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The turns.
        tools: JSON schemas of the functions that the assistant can call.
        add_generation_prompt: Whether the text ends where the assistant is to speak.

    Raises:
        InputError: The template refuses these turns.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise _refusal(messages, error) from error


def _refusal(messages: _Turns, error: Exception) -> InputError:
    roles = ", ".join(str(message.get("role")) for message in messages)
    return InputError(f"the chat template refuses the turns ({roles}): {error}")


def render_with_spans(
    tokenizer: Tokenizer, messages: _Turns, tools: Sequence[Any] = ()
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Return a whole conversation as text, and the characters the assistant speaks.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The turns.
        tools: JSON schemas of the functions that the assistant can call.

    Returns:
        The text, and start and end of each answer with its end-of-turn. One span a turn, unless the
        template has `{% generation %}` marks: then they decide.

    Raises:
        InputError: The template refuses the turns, or the place of one cannot be told.
    """
    template = tokenizer.get_chat_template(tools=list(tools) or None)
    if _MARKS.search(template):
        return _marked(tokenizer, template, messages, tools)
    text = render_text(tokenizer, messages, tools)
    diff = _Diff(tokenizer, text, messages, tools)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return text, tuple(diff.span(index) for index in answers)


def _marked(
    tokenizer: Tokenizer, template: str, messages: _Turns, tools: Sequence[Any]
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Take the spans from the template's own marks, each with the end of its turn."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    # A null is a missing key, as in apply_chat_template.
    turns = [{k: v for k, v in m.items() if v is not None} for m in messages]
    try:
        made: Any = render_jinja_template(
            [turns],
            tools=list(tools) or None,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise _refusal(messages, error) from error
    text, marks = made[0][0], made[1][0]
    whole: list[tuple[int, int]] = []
    # More marks than answers: an answer is marked in pieces (thoughts, calls, words), which are joined.
    pieces = len(marks) > sum(message["role"] == "assistant" for message in messages)
    for start, end in marks:
        joins = pieces and bool(whole) and whole[-1][1] == start
        first = whole.pop()[0] if joins else start
        whole.append((first, end))
    spans = []
    for start, end in whole:
        trimmed = max(start, len(text[:end].rstrip()))  # a line break after the end is no answer
        tail = _around(tokenizer)[1]
        left_out = bool(tail) and text.startswith(tail, end)
        closed = not left_out and _ends_with_control(tokenizer, text[start:trimmed])
        spans.append((start, trimmed if closed else _after_end_of_turn(tokenizer, text, end)))
    return text, tuple((start, end) for start, end in spans if start < end)


@dataclass(frozen=True, slots=True)
class _Diff:
    """Finds answers in `text` by comparing it with other renders."""

    tokenizer: Tokenizer
    text: str
    messages: _Turns
    tools: Sequence[Any]

    def span(self, index: int) -> tuple[int, int]:
        """Return the characters of the answer at `index`, its end-of-turn included."""
        start = self._start(index)
        end = self._end(index)
        if start is None or end is None:
            region = self._said(index)
            start = region[0] if start is None else start
            end = region[1] if end is None else end
        if start > end:
            raise _untold()
        return start, end

    def _start(self, index: int) -> int | None:
        """Where the prompt for this answer ends, if the whole text begins with that prompt."""
        before = self._try(self.messages[:index], True) if index else None
        return len(before) if before is not None and self.text.startswith(before) else None

    def _end(self, index: int) -> int | None:
        """Where the conversation up to this answer ends, if the whole text begins with it."""
        upto: str | None = self.text
        if index + 1 < len(self.messages):
            upto = self._try(self.messages[: index + 1])
        if upto is None or not self.text.startswith(upto):
            return None
        return len(upto.rstrip())

    def _said(self, index: int) -> tuple[int, int]:
        """Find an answer that is rendered differently when more turns follow (Qwen 3's thoughts).

        A sentinel that occurs nowhere takes the answer's place; what differs is the answer. An
        answer that calls tools may not be without them where their results follow: then its start is
        found without the turns up to the user's next, and its end with a sentinel for an argument.
        """
        message = self.messages[index]
        after = index + 1
        if (region := self._swapped(index, after)) is not None:
            end = _after_end_of_turn(self.tokenizer, self.text, region[1])
            return self._with_lead(region[0]), end
        if not message.get("tool_calls"):
            raise _untold()
        while after < len(self.messages) and self.messages[after]["role"] != "user":
            after += 1
        start, call = self._swapped(index, after), self._swapped(index, index + 1, True)
        end_of_turn = _around(self.tokenizer)[1].strip()
        if start is None or call is None or not end_of_turn:
            raise _untold()
        end = self.text.find(end_of_turn, call[1])
        if end < 0:
            raise _untold()
        return self._with_lead(start[0]), end + len(end_of_turn)

    def _with_lead(self, start: int) -> int:
        """Take in what the prompt leaves to the model: Mistral's blank is part of the first token."""
        lead = _around(self.tokenizer)[0]
        return start - len(lead) if lead and self.text.endswith(lead, 0, start) else start

    def _swapped(self, index: int, after: int, arguments: bool = False) -> tuple[int, int] | None:
        """Return what changes when a sentinel stands for the messages from `index` to `after`."""
        sentinel = _absent_from(self.text)
        message = dict(self.messages[index])
        if arguments:
            message["tool_calls"] = _with_arguments(message["tool_calls"], sentinel)
        else:
            message = {k: v for k, v in message.items() if k not in _SAID} | {"content": sentinel}
        other = self._try([*self.messages[:index], message, *self.messages[after:]])
        if other is None or other.count(sentinel) != 1:
            return None
        start = _num_shared(self.text, other)
        return start, len(self.text) - _num_shared(self.text[start:][::-1], other[start:][::-1])

    def _try(self, messages: _Turns, add_generation_prompt: bool = False) -> str | None:
        try:
            return render_text(self.tokenizer, messages, self.tools, add_generation_prompt)
        except InputError:  # half a conversation that the template does not take
            return None


def _untold() -> InputError:
    return InputError(
        "the chat template renders an answer differently when more turns follow it, so that its "
        "place cannot be told",
        fix="keep the last answer of each conversation only, or set model.chat_template",
    )


def _num_shared(one: str, other: str) -> int:
    """Count the characters two texts begin with alike, by halving: 3 us for 2600, a loop takes 105."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _absent_from(text: str) -> str:
    """Return a character that a text does not have: one of Unicode's private ones, which trim keeps."""
    return next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)


def _with_arguments(calls: Sequence[Mapping[str, Any]], sentinel: str) -> list[dict[str, Any]]:
    """Return tool calls whose last has a sentinel for its arguments, of the type they had."""
    made = [dict(call) for call in calls]
    holder = made[-1]
    if isinstance(holder.get("function"), Mapping):
        holder["function"] = holder = dict(holder["function"])
    holder["arguments"] = (
        sentinel if isinstance(holder.get("arguments"), str) else {"argument": sentinel}
    )
    return made


def _around(tokenizer: Tokenizer) -> tuple[str, str]:
    """Return what a template writes between a prompt's end and the answer, and after the answer.

    Returns:
        What comes before: mostly nothing, a blank for Mistral, empty thoughts for Qwen 3. What comes
        after: the control tokens with the blanks before them, or all there is where that is words.
    """
    template = tokenizer.get_chat_template()
    around = _known(tokenizer).around
    if template not in around:
        answer = _absent_from(template)
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        try:
            prompt = render_text(tokenizer, turns[:1], add_generation_prompt=True)
            before, _, rest = render_text(tokenizer, turns).partition(answer)
        except InputError:
            prompt = before = rest = ""
        end = blanks = len(rest) - len(rest.lstrip())
        while token := _control_at(tokenizer, rest, end):
            end += len(token)
        lead = before[len(prompt) :] if before.startswith(prompt) else ""
        around[template] = lead, rest[:end] if end > blanks else rest.rstrip()
    return around[template]


def _after_end_of_turn(tokenizer: Tokenizer, text: str, end: int) -> int:
    """Return the end of the end-of-turn that stands right behind an answer, if one does."""
    tail = _around(tokenizer)[1]
    if not tail or text.startswith(tail, end):
        return end + len(tail)
    # Some templates end all answers but the last with another token: gpt-oss <|end|> and <|return|>.
    return end + len(_control_at(tokenizer, text, end))


def _control_at(tokenizer: Tokenizer, text: str, at: int) -> str:
    """Return the control token that starts at a place in a text, or nothing."""
    found = _known(tokenizer).specials.match(text, at) or _LOOKS_LIKE_CONTROL.match(text, at)
    return found.group() if found else ""


def _ends_with_control(tokenizer: Tokenizer, text: str) -> bool:
    tail = _around(tokenizer)[1]
    return bool(tail and text.endswith(tail)) or any(
        match.end() == len(text)
        for pattern in (_known(tokenizer).specials, _LOOKS_LIKE_CONTROL)
        for match in pattern.finditer(text)
    )


def end_of_turn(tokenizer: Tokenizer) -> str | None:
    """Return the text that ends an assistant's turn in this template, or None if nothing does.

    Args:
        tokenizer: A tokenizer with a chat template.
    """
    return _around(tokenizer)[1].strip() or None


def stop_token_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids at which an answer is at its end: the template's end-of-turn, the tokenizer's own.

    Args:
        tokenizer: A tokenizer, with or without a chat template.

    Returns:
        The ids, mostly one or two. An end-of-turn in plain words has no id to stop at.
    """
    found: list[int] = []
    if tokenizer.chat_template is not None and (end := end_of_turn(tokenizer)):
        ids = tokenizer.encode(end, add_special_tokens=False)
        written = len(ids) == 1 and _LOOKS_LIKE_CONTROL.fullmatch(end)  # not marked as special
        added = tokenizer.added_tokens_decoder
        found = ids if written else [i for i in ids if i in added and added[i].special]
    own = tokenizer.eos_token_id
    return found if own is None or own in found else [*found, own]


def unknown_specials(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return what looks like a control token in a text and is no single token of this tokenizer.

    Args:
        tokenizer: The tokenizer.
        text: A rendered conversation.

    Returns:
        Each such string once, in the order of the text.
    """
    known = _known(tokenizer)
    found = dict.fromkeys(_LOOKS_LIKE_CONTROL.findall(text))
    for token in found:
        if token not in known.single:
            known.single[token] = token in known.added or (
                len(tokenizer.encode(token, add_special_tokens=False)) == 1
            )
    return [token for token in found if not known.single[token]]


def specials_in(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return the tokenizer's control tokens that stand literally in a text.

    Args:
        tokenizer: The tokenizer.
        text: What somebody wrote: in a conversation it would be read as control, not as words.

    Returns:
        Each such token once, in the order of the text.
    """
    known = _known(tokenizer)
    # A pattern of a thousand reserved tokens takes 100 ns a character; nearly no text has their heads.
    if not any(head in text for head in known.heads):
        return []
    return list(dict.fromkeys(known.specials.findall(text)))
