"""The chat template: which one a tokenizer gets, and conversations rendered with it.

The tokenizer's own comes first. For base models there are built-in ones, each in the form its family
documents, and a plain one; they are saved with the run's tokenizer, so that chat, generate and every
export use the very same template. How answers are found in a render stands in spans.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from whet.data.spans import (
    end_of_turn,
    render_text,
    render_with_spans,
    specials_in,
    stop_token_ids,
    unknown_specials,
)
from whet.errors import InputError, did_you_mean
from whet.model import Tokenizer

__all__ = [
    "BUILT_IN", "PLAIN_TEMPLATE", "Rendered", "end_of_turn", "render", "render_prompt",
    "set_chat_template", "specials_in", "stop_token_ids", "unknown_specials",
]  # fmt: skip

# For tokenizers that come without a chat template (base models) and a config that names none.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)

BUILT_IN = ("chatml", "llama-3", "mistral", "gemma", "phi-4", "qwen", "alpaca", "zephyr")
# Other spellings, without case, blanks, dots and dashes. Newer versions only where the turns are the
# same: Gemma 4 and Phi-4-mini write theirs differently.
_SPELLINGS = {
    **{re.sub(r"[^a-z0-9]", "", name): name for name in BUILT_IN},
    **dict.fromkeys(("llama31", "llama32", "llama33"), "llama-3"),
    **dict.fromkeys(("gemma2", "gemma3"), "gemma"),
    **dict.fromkeys(("qwen2", "qwen25", "qwen3"), "qwen"),
    "im": "chatml",
}
# The line that every built-in template begins with.
_END_LINE = re.compile(r"\{%- set end_of_turn = (?:'([^']+)'|eos_token) %\}")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the model reads it.

    Args:
        text: The whole text.
        spans: Start and end, in characters, of each answer with its end-of-turn; in the order of the
            answers, one each (a template with `{% generation %}` marks may have more or fewer).
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def set_chat_template(tokenizer: Tokenizer, wish: str | None) -> str:
    """Give the tokenizer the template the config asks for, in place.

    Args:
        tokenizer: The model's tokenizer.
        wish: A name of BUILT_IN, a file with a Jinja template, or None for the tokenizer's own.

    Returns:
        Where the template came from, in words for the report.

    Raises:
        InputError: There is no such template or file, it is not Jinja, or it needs an end-of-text
            token that the tokenizer does not have.
    """
    if wish is not None:
        name = None if re.search(r"[/\\]|\.jinja2?$", wish) else _built_in_name(wish)
        if name is not None:
            return _set_built_in(tokenizer, name)
        tokenizer.chat_template = _read(wish)
        return f"the file {wish}"
    own = tokenizer.chat_template
    if isinstance(own, dict):
        if "default" not in own:
            raise InputError(
                "the tokenizer has several chat templates and none is called 'default'",
                ", ".join(map(repr, own)),
                "set model.chat_template to a built-in name or a file with a Jinja template",
            )
        tokenizer.chat_template = own["default"]
        return "the tokenizer's own"
    if own is not None:
        return "the tokenizer's own"
    if tokenizer.eos_token is None:
        raise InputError(
            "the tokenizer has neither a chat template nor an end-of-text token",
            fix="set model.chat_template to a file with a Jinja template",
        )
    tokenizer.chat_template = PLAIN_TEMPLATE
    return "whet's plain one (### Instruction / ### Response), because the tokenizer has none"


def _built_in_name(wish: str) -> str | None:
    return _SPELLINGS.get(re.sub(r"[\s._-]", "", wish.lower()))


def _set_built_in(tokenizer: Tokenizer, name: str) -> str:
    """Set a built-in template; its end-of-turn is the tokenizer's own where it lacks the family's."""
    template = (files("whet.data") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    line = _END_LINE.match(template)
    assert line is not None, f"{name}.jinja does not begin with its end-of-turn"
    family, eos = line.group(1), tokenizer.eos_token
    if family is not None and not unknown_specials(tokenizer, family):
        tokenizer.chat_template = template
        return f"whet's {name}"
    if eos is None:
        raise InputError(
            f"the {name} template ends a turn with {family or 'the end-of-text token'}, which the "
            "tokenizer does not have, nor any end-of-text token to write for it",
            fix="set model.chat_template to a file with a template that ends its turns otherwise",
        )
    tokenizer.chat_template = "{%- set end_of_turn = eos_token %}" + template[line.end() :]
    if family is None or family == eos:
        return f"whet's {name}"
    return f"whet's {name}; its {family} is written as {eos}, which this tokenizer has"


def _read(file: str) -> str:
    """Read a Jinja file and check that it parses."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        template = Path(file).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        guess = did_you_mean(file.lower(), BUILT_IN)
        raise InputError(
            f"model.chat_template is neither a built-in template ({', '.join(BUILT_IN)}) nor a file",
            f"'{file}'",
            f"did you mean '{guess}'?" if guess else "give one of these names, or a Jinja file",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"model.chat_template '{file}' cannot be read: {error}") from error
    try:
        render_jinja_template([], chat_template=template)  # compiles it, and renders nothing
    except TemplateSyntaxError as error:
        raise InputError(
            f"model.chat_template '{file}' is not a Jinja template: line {error.lineno}: "
            f"{error.message}",
            fix="correct that line",
        ) from error
    return template


def render_prompt(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()
) -> str:
    """Return a conversation as text that ends where the assistant is to speak.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The turns so far.
        tools: JSON schemas of the functions that the assistant can call.

    Raises:
        InputError: The template refuses these turns.
    """
    return render_text(tokenizer, messages, tools, add_generation_prompt=True)


def render(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()
) -> Rendered:
    """Return a whole conversation as text, with the spans of the assistant's turns.

    One answer takes two renders, each further one two more; an answer that is rendered differently
    once more turns follow takes another.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The turns, as role and content; an answer may have `tool_calls`.
        tools: JSON schemas of the functions that the assistant can call.

    Raises:
        InputError: The template refuses these turns, or renders a turn so differently when more
            follow that its place cannot be told.
    """
    return Rendered(*render_with_spans(tokenizer, messages, tools))
