"""Token ids and labels of an example.

A label is the token's own id where the token is learned and -100 where it is not; the shift by one
position happens where the loss is computed, as everywhere in transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from whet.data.formats import Example
from whet.data.template import render
from whet.errors import InputError
from whet.model import Tokenizer

if TYPE_CHECKING:
    import torch

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Tokens:
    """One tokenised example (or one window of a long text).

    Args:
        input_ids: Token ids.
        labels: The id where the token is learned, -100 elsewhere; as long as `input_ids`.
        where: The place the example came from.
        num_truncated: Tokens cut off at the end.
        num_lost_labels: Learned tokens among those cut off.
        has_end: Whether every answer ends with a learned end-of-turn (true for plain text).
    """

    input_ids: list[int]
    labels: list[int]
    where: str
    num_truncated: int = 0
    num_lost_labels: int = 0
    has_end: bool = True

    @property
    def num_labels(self) -> int:
        """Tokens that enter the loss; the first token has nothing before it to be learned from."""
        return sum(label != IGNORED for label in self.labels[1:])


def tokenize(
    example: Example,
    tokenizer: Tokenizer,
    max_length: int,
    loss_on: str = "assistant",
) -> Iterator[Tokens]:
    """Tokenise one example.

    Args:
        example: A conversation or a text.
        tokenizer: Its tokenizer, with a chat template.
        max_length: Longest example in tokens. A conversation is cut at its end; a text is cut into
            windows, so that nothing of it is lost.
        loss_on: `assistant` labels the answers with their end-of-turn, `all` labels everything.

    Yields:
        One Tokens for a conversation, one a window for a text.

    Raises:
        InputError: A row that is tokenised already has ids this tokenizer does not have.
    """
    if example.messages:
        yield _tokenize_conversation(example, tokenizer, max_length, loss_on)
        return
    if example.input_ids:
        yield _cut(example, tokenizer, max_length)
        return
    ids = list(tokenizer(example.text, verbose=False)["input_ids"])
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    for start in range(0, len(ids), max_length):
        window = ids[start : start + max_length]
        if len(window) > 1:  # a window of one token has nothing to predict
            yield Tokens(window, list(window), example.where)


def _tokenize_conversation(
    example: Example, tokenizer: Tokenizer, max_length: int, loss_on: str
) -> Tokens:
    rendered = render(tokenizer, example.messages)
    # The template writes the special tokens itself; the tokenizer must not add its own again.
    encoded = tokenizer(
        rendered.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    ids = list(encoded["input_ids"])
    starts = [start for start, _ in encoded["offset_mapping"]]
    if loss_on == "all":
        labels = list(ids)
    else:
        learned = [any(a <= start < b for a, b in rendered.spans) for start in starts]
        labels = [i if on else IGNORED for i, on in zip(ids, learned, strict=True)]
    special = set(tokenizer.all_special_ids) | {tokenizer.eos_token_id}
    kept, lost = labels[:max_length], labels[max_length:]
    return Tokens(
        ids[:max_length],
        kept,
        example.where,
        num_truncated=max(0, len(ids) - max_length),
        num_lost_labels=sum(label != IGNORED for label in lost),
        has_end=_last_label(kept) in special,
    )


def _cut(example: Example, tokenizer: Tokenizer, max_length: int) -> Tokens:
    """Take a row that is tokenised already, with the labels it has."""
    ids, labels = list(example.input_ids), list(example.labels)
    num = len(tokenizer)
    if wrong := [i for i in ids if not 0 <= i < num]:
        raise InputError(
            f"{example.where}: token id {wrong[0]} is not one of the tokenizer's {num}",
            fix="tokenise the rows with this model's tokenizer",
        )
    return Tokens(
        ids[:max_length],
        labels[:max_length],
        example.where,
        num_truncated=max(0, len(ids) - max_length),
        num_lost_labels=sum(label != IGNORED for label in labels[max_length:]),
    )


def _last_label(labels: list[int]) -> int | None:
    return next((label for label in reversed(labels) if label != IGNORED), None)


def collate(rows: Sequence[Tokens], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad rows on the right to one batch.

    Args:
        rows: Tokenised rows.
        pad_token_id: Fills `input_ids`; the mask and the labels keep it out of everything.

    Returns:
        `input_ids`, `attention_mask` and `labels`, int64, (B, longest row).
    """
    import torch

    longest = max(len(tokens.input_ids) for tokens in rows)

    def padded(ids: list[int], value: int) -> list[int]:
        return ids + [value] * (longest - len(ids))

    return {
        "input_ids": torch.tensor([padded(t.input_ids, pad_token_id) for t in rows]),
        "attention_mask": torch.tensor([padded([1] * len(t.input_ids), 0) for t in rows]),
        # Nothing stands before the first token to predict it from; with its label gone, counting the
        # labels gives the same number before and after the shift.
        "labels": torch.tensor([padded([IGNORED, *t.labels[1:]], IGNORED) for t in rows]),
    }
