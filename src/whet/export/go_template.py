"""Go's text templates, as far as whet writes them for Ollama: written from a chat template, and rendered.

`from_chat_template` learns from renders what a chat template puts before, between and after turns, and
writes that down as a Go template. `render` evaluates such a template, so that it can be compared with
the original before anybody runs it. The subset is text, range, if, else, end, eq, and, strings and
fields; Go's own documentation of text/template is the reference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from whet.data.template import render_prompt
from whet.errors import InputError
from whet.model import Tokenizer

_PROBES = {
    "system": "SYSTEMprobe",
    "user": "USERprobe",
    "assistant": "ANSWERprobe",
    "second": "NEXTprobe",
}
_ACTION = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_WORD = re.compile(r'\s*(?:"((?:[^"\\]|\\.)*)"|([()])|([^\s()"]+))')


def from_chat_template(tokenizer: Tokenizer, adds_bos: bool) -> str | None:
    """Write a chat template as a Go template for Ollama's `.Messages`.

    Args:
        tokenizer: With a chat template.
        adds_bos: Whether the program adds the beginning-of-text token itself; it is left out then.

    Returns:
        The Go template; None when turns are not text with fixed words around them.
    """
    user, answer, second = (_PROBES[name] for name in ("user", "assistant", "second"))
    turns = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": second},
    ]
    one = _between(tokenizer, turns[:1], [user])
    three = _between(tokenizer, turns, [user, answer, second])
    if one is None or three is None or one[0] != three[0] or one[1] != three[3]:
        return None
    system = {"role": "system", "content": _PROBES["system"]}
    told = _between(tokenizer, [system, turns[0]], [system["content"], user])
    bos = tokenizer.bos_token if adds_bos else None
    first = _literal(one[0], bos)
    after_system = ""
    head = ""
    if told is not None and told[2] == one[1]:
        head = f'{{{{ if eq .Role "system" }}}}{_literal(told[0], bos)}{{{{ .Content }}}}{{{{ else }}}}'
        after_system = f"{{{{ else if and (eq $i 1) $.System }}}}{_literal(told[1])}"
    return (
        "{{ range $i, $m := .Messages }}" + head
        + '{{ if eq .Role "user" }}'
        + f"{{{{ if eq $i 0 }}}}{first}{after_system}{{{{ else }}}}{_literal(three[2])}{{{{ end }}}}"
        + "{{ .Content }}"
        + f'{{{{ else if eq .Role "assistant" }}}}{_literal(three[1])}{{{{ .Content }}}}{{{{ end }}}}'
        + ("{{ end }}" if head else "")
        + "{{ end }}"
        + _literal(one[1])
    )  # fmt: skip


def _between(tokenizer: Tokenizer, turns: list[Any], probes: list[str]) -> list[str] | None:
    """Render turns for an answer, and return the text around their contents."""
    try:
        rest = render_prompt(tokenizer, turns)
    except InputError:
        return None
    found = []
    for probe in probes:
        before, middle, rest = rest.partition(probe)
        if not middle:
            return None
        found.append(before)
    return [*found, rest]


def _literal(text: str, bos: str | None = None) -> str:
    text = text.removeprefix(bos) if bos else text
    return text.replace("{{", '{{ "{{" }}')


def render(template: str, messages: Sequence[dict[str, Any]]) -> str:
    """Render a Go template of the subset, with what Ollama gives it.

    Args:
        template: The template.
        messages: The turns, as role and content.

    Raises:
        ValueError: It is not of the subset.
    """
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    data = {"Messages": list(messages), "System": system}
    parts = _ACTION.split(template)
    tree, rest, closing = _parse(iter(enumerate(parts)))
    if closing or next(rest, None) is not None:
        raise ValueError(f"a Go template with '{closing}' too many")
    return _run(tree, data, data, {})


def _parse(parts: Iterator[tuple[int, str]]) -> tuple[list[Any], Iterator[tuple[int, str]], str]:
    """Read up to the next `else` or `end`, which is returned too."""
    tree: list[Any] = []
    for number, part in parts:
        action = part.strip()
        word = action.split(" ")[0]
        if number % 2 == 0:
            tree.append(("text", part))
        elif word in ("else", "end"):
            return tree, parts, action
        elif word in ("range", "if"):
            branches = []
            condition = action.removeprefix(word)
            while True:
                body, parts, closing = _parse(parts)
                branches.append((condition, body))
                if closing == "end":
                    break
                if not closing.startswith("else"):
                    raise ValueError(f"a Go template whose '{word}' has no end")
                condition = closing.removeprefix("else").strip().removeprefix("if")
            tree.append((word, branches))
        else:
            tree.append(("value", action))
    return tree, parts, ""


def _run(tree: list[Any], dot: Any, root: Any, names: dict[str, Any]) -> str:
    found = []
    for kind, what in tree:
        if kind == "text":
            found.append(what)
        elif kind == "value":
            found.append(str(_value(what, dot, root, names)))
        elif kind == "if":
            for condition, body in what:
                if not condition.strip() or _value(condition, dot, root, names):
                    found.append(_run(body, dot, root, names))
                    break
        else:
            (condition, body), *_ = what
            match = re.fullmatch(r"\s*\$(\w+), \$(\w+) := (\S+)\s*", condition)
            if match is None:
                raise ValueError(f"a Go template with 'range{condition}'")
            for index, item in enumerate(_value(match[3], dot, root, names)):
                inner = {**names, match[1]: index, match[2]: item}
                found.append(_run(body, item, root, inner))
    return "".join(found)


def _value(expression: str, dot: Any, root: Any, names: dict[str, Any]) -> Any:
    words = [match.groups() for match in _WORD.finditer(expression.strip())]
    value, rest = _call(words, dot, root, names)
    if rest:
        raise ValueError(f"a Go template with '{expression}'")
    return value


def _call(words: list[Any], dot: Any, root: Any, names: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Evaluate a term, or a function with its arguments, in prefix notation."""
    (text, bracket, word), rest = words[0], words[1:]
    if text is not None:
        return text, rest
    if bracket == "(":
        value, rest = _call(rest, dot, root, names)
        if not rest or rest[0][1] != ")":
            raise ValueError("a Go template with an open bracket")
        return value, rest[1:]
    if word in ("eq", "and"):
        left, rest = _call(rest, dot, root, names)
        right, rest = _call(rest, dot, root, names)
        return (left == right if word == "eq" else left and right), rest
    if word is not None and word.isdigit():
        return int(word), rest
    if word is not None and (match := re.fullmatch(r"(\$?)(\w*)(?:\.(\w+))?", word)):
        holder = names[match[2]] if match[2] else (root if match[1] else dot)
        # Go's fields begin with a capital, the messages' keys here do not.
        return (holder if match[3] is None else holder[_key(holder, match[3])]), rest
    raise ValueError(f"a Go template with '{word}'")


def _key(holder: dict[str, Any], name: str) -> str:
    return name if name in holder else name.lower()
