"""Look at what an example says, for the report: control tokens in its text, places left to fill in."""

from __future__ import annotations

import re
from collections import Counter

from whet.data.formats import Example
from whet.data.spans import specials_in, unknown_specials
from whet.data.template import render
from whet.errors import InputError
from whet.model import Tokenizer

PLACEHOLDER = re.compile(r"\{\{\s*[A-Za-z_][\w.]{0,40}\s*\}\}")
RENDERED = (
    4  # conversations of a chunk whose rendered text is searched: the template is the same for all
)


def inspect_example(
    example: Example, tokenizer: Tokenizer, counts: Counter[tuple[str, str]]
) -> None:
    """Count what an example's text holds that it should not.

    Args:
        example: The example.
        tokenizer: The model's tokenizer, with a chat template.
        counts: Counted in place, once an example and text: `placeholder` ({{name}}, to be filled in),
            `control` (a control token of the tokenizer, written in a row's text) and `unknown` (what
            looks like a control token and is none of this tokenizer's).
    """
    texts = [m["content"] for m in (*example.messages, *example.rejected)] + [example.text]
    whole = "\n".join(text for text in texts if text)
    for text in set(PLACEHOLDER.findall(whole)):
        counts["placeholder", text] += 1
    for text in set(specials_in(tokenizer, whole)):
        counts["control", text] += 1
    for text in set(unknown_specials(tokenizer, whole)):
        counts["unknown", text] += 1
    if example.messages and counts["rendered", ""] < RENDERED:
        counts["rendered", ""] += 1
        try:
            rendered = render(tokenizer, example.messages, example.tools).text
        except InputError:
            return  # told by the tokeniser, with the place
        for text in set(unknown_specials(tokenizer, rendered)) - set(
            unknown_specials(tokenizer, whole)
        ):
            counts["template", text] += 1
