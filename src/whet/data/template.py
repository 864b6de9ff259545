"""Render a conversation with the tokenizer's chat template, and find what the assistant said.

The assistant's spans come from the template itself: the render of the turns before an answer, with
the generation prompt, ends where the answer starts, and the render that includes the answer ends
where its end-of-turn ends. Nothing is searched for by a magic string.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from whet.data.formats import Message
from whet.errors import InputError
from whet.model import Tokenizer

# For tokenizers that come without a chat template (base models). It is saved with the run's
# tokenizer, so that chat, generate and every export use the very same one.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the model reads it.

    Args:
        text: The whole text.
        spans: Start and end, in characters, of each answer with its end-of-turn.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def set_chat_template(tokenizer: Tokenizer, template_file: str | None) -> str:
    """Give the tokenizer the template the config asks for, in place.

    Args:
        tokenizer: The model's tokenizer.
        template_file: A file with a Jinja template, or None for the tokenizer's own.

    Returns:
        Where the template came from, in words for the report.

    Raises:
        InputError: The file cannot be read, or whet's plain template needs an end-of-text token
            that the tokenizer does not have.
    """
    if template_file is not None:
        try:
            tokenizer.chat_template = Path(template_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"model.chat_template '{template_file}' cannot be read: {error}"
            ) from error
        return f"the file {template_file}"
    if tokenizer.chat_template is not None:
        return "the tokenizer's own"
    if tokenizer.eos_token is None:
        raise InputError(
            "the tokenizer has neither a chat template nor an end-of-text token",
            fix="set model.chat_template to a file with a Jinja template",
        )
    tokenizer.chat_template = PLAIN_TEMPLATE
    return "whet's plain one (### Instruction / ### Response), because the tokenizer has none"


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """Return a conversation as text that ends where the assistant is to speak.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The turns so far.
    """
    return _render(tokenizer, messages, add_generation_prompt=True)


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> Rendered:
    """Return a whole conversation as text, with the spans of the assistant's turns.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The turns, as role and content.

    Raises:
        InputError: The template refuses these turns, or renders a turn differently when more follow,
            so that its place cannot be told.
    """
    text = _render(tokenizer, messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:index], add_generation_prompt=True) if index else ""
        upto = _render(tokenizer, messages[: index + 1])
        if not text.startswith(upto):
            raise InputError(
                "the chat template renders an answer differently when more turns follow it",
                fix="keep the last answer of each conversation only, or set model.chat_template",
            )
        start = len(before) if upto.startswith(before) else _content_start(upto, message["content"])
        spans.append((start, len(upto.rstrip())))
    return Rendered(text, tuple(spans))


def _content_start(upto: str, content: str) -> int:
    """Find the answer at the end of a render whose generation prompt differs from its turn header."""
    start = upto.rfind(content.strip())
    if start < 0:
        raise InputError(
            "the chat template changes the answer's text, so its place cannot be told",
            f"{content[:40]!r}",
            "set model.chat_template to one that keeps it",
        )
    return start


def _render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
) -> str:
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(f"the chat template refuses the turns ({roles}): {error}") from error
