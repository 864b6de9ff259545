"""Token ids and labels of examples.

A label is the token's own id where the token is learned and -100 where it is not; the shift by one
position happens where the loss is computed, as everywhere in transformers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from whet.data.formats import Example
from whet.data.template import Rendered, render
from whet.errors import InputError
from whet.model import Tokenizer

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

IGNORED = -100

# What is known of a row beside its tokens; the bits of Tokens.flags.
HAS_END = 1  # its last learned token is a control token that ends a turn (or it is plain text)
CONVERSATION = 2
EMPTY_ANSWER = 4
CHOSEN = 8
REJECTED = 16
DESIRABLE = 32
UNDESIRABLE = 64
CONTINUES = 128  # a window that goes on where the one before it ended


@dataclass(frozen=True, slots=True)
class Tokens:
    """One tokenised example (or one window of a long text).

    Args:
        input_ids: Token ids.
        labels: The id where the token is learned, -100 elsewhere; as long as `input_ids`.
        where: The place the example came from.
        num_truncated: Tokens cut off at the end.
        num_lost_labels: Learned tokens among those cut off.
        flags: What else is known of it, bits such as HAS_END.
    """

    input_ids: list[int]
    labels: list[int]
    where: str
    num_truncated: int = 0
    num_lost_labels: int = 0
    flags: int = HAS_END

    @property
    def num_labels(self) -> int:
        """Tokens that enter the loss; the first token has nothing before it to be learned from."""
        return sum(label != IGNORED for label in self.labels[1:])

    @property
    def has_end(self) -> bool:
        """Whether it ends with a learned end-of-turn (true for plain text)."""
        return bool(self.flags & HAS_END)


@dataclass(slots=True)
class Piece:
    """One row of a store before it is written: Tokens as arrays, with the hashes of its example.

    Args:
        ids: Token ids, int32.
        learned: Whether each is learned, bool.
        where: The place the example came from.
        flags: Bits such as HAS_END.
        num_truncated: Tokens cut off at the end.
        num_lost_labels: Learned tokens among those cut off.
        example: Number of its example.
        key: Hash of the example.
        question: Hash of what stands before its last answer.
        answer: Hash of the last answer.
    """

    ids: NDArray[np.int32]
    learned: NDArray[np.bool_]
    where: str
    flags: int = 0
    num_truncated: int = 0
    num_lost_labels: int = 0
    example: int = 0
    key: int = 0
    question: int = 0
    answer: int = 0


def hash64(text: str) -> int:
    """Return the first eight bytes of a text's SHA-256: the same number in every run."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def tokenize(
    example: Example, tokenizer: Tokenizer, max_length: int, loss_on: str = "assistant"
) -> Iterator[Tokens]:
    """Tokenise one example; see `encode`."""
    for piece in encode([example], tokenizer, max_length, loss_on):
        labels = np.where(piece.learned, piece.ids, IGNORED)
        yield Tokens(
            piece.ids.tolist(), labels.tolist(), piece.where, piece.num_truncated,
            piece.num_lost_labels, piece.flags,
        )  # fmt: skip


def encode(
    examples: Sequence[Example], tokenizer: Tokenizer, max_length: int, loss_on: str = "assistant"
) -> list[Piece]:
    """Tokenise examples, all of them in one call of the tokenizer.

    Args:
        examples: Conversations, pairs, texts or token ids.
        tokenizer: Their tokenizer, with a chat template.
        max_length: Longest row in tokens. A conversation is cut at its end; a text is cut into windows,
            so that nothing of it is lost.
        loss_on: `assistant` labels the answers with their end-of-turn, `all` labels everything.

    Returns:
        One piece for a conversation, two for a pair (the chosen one first), one a window for a text.

    Raises:
        InputError: A row that is tokenised already has ids this tokenizer does not have, or the template
            refuses a conversation.
    """
    controls = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    rendered: list[tuple[int, int, Rendered]] = []
    for number, example in enumerate(examples):
        for flags, messages in _sides(example):
            try:
                rendered.append((number, flags, render(tokenizer, messages, example.tools)))
            except InputError as error:
                raise InputError(f"{example.where}: {error.what}", error.got, error.fix) from error
    # The template writes the special tokens itself; the tokenizer must not add its own again.
    encodings = _encodings(tokenizer, [r.text for _, _, r in rendered], add_special_tokens=False)
    found: list[Piece] = []
    for (number, flags, text), encoding in zip(rendered, encodings, strict=True):
        ids = np.array(encoding.ids, np.int32)
        answers = _inside(encoding, text.spans, len(ids))
        learned = np.ones(len(ids), bool) if loss_on == "all" else answers
        piece = _cut(ids, learned, examples[number].where, max_length)
        ends = np.flatnonzero(answers[:max_length])
        piece.flags = flags | CONVERSATION
        if len(ends) and int(ids[ends[-1]]) in controls:
            piece.flags |= HAS_END
        piece.example = number
        found.append(piece)
    found += _from_texts(examples, tokenizer, max_length)
    found += [
        piece
        for number, example in enumerate(examples)
        if example.input_ids
        for piece in [_from_ids(example, number, len(tokenizer), max_length)]
    ]
    found.sort(key=lambda piece: piece.example)  # stable: pairs and windows stay in their order
    _hash(found, examples)
    return found


def _sides(example: Example) -> Iterator[tuple[int, Any]]:
    """Yield the conversations of an example: one, or the two of a pair."""
    if not example.messages:
        return
    if example.rejected:
        yield CHOSEN, example.messages
        yield REJECTED, example.rejected
        return
    label = {None: 0, True: DESIRABLE, False: UNDESIRABLE}[example.desirable]
    empty = not any(m["content"].strip() or m.get("tool_calls") for m in example.messages[-1:])
    yield label | (EMPTY_ANSWER if empty else 0), example.messages


def _encodings(tokenizer: Tokenizer, texts: list[str], **how: Any) -> list[Any]:
    if not texts:
        return []
    found = tokenizer(texts, verbose=False, **how).encodings
    if found is None:
        raise InputError(
            "the tokenizer does not tell where its tokens stand in the text",
            type(tokenizer).__name__,
            "use the fast tokenizer of this model (a tokenizer.json)",
        )
    return found


def _inside(encoding: Any, spans: Sequence[tuple[int, int]], num: int) -> NDArray[np.bool_]:
    """Tell which tokens start inside one of the spans."""
    found = np.zeros(num, bool)
    for start, stop in spans:
        found[_token_from(encoding, start, num) : _token_from(encoding, stop, num)] = True
    return found


def _token_from(encoding: Any, place: int, num: int) -> int:
    """Return the first token that starts at a character or behind it."""
    token = encoding.char_to_token(place)
    if token is None:  # behind the end, or a character that the tokenizer drops
        if not num or encoding.token_to_chars(num - 1)[1] <= place:
            return num
        return next((i for i, (start, _) in enumerate(encoding.offsets) if start >= place), num)
    while token < num and encoding.token_to_chars(token)[0] < place:
        token += 1
    return token


def _cut(ids: NDArray[np.int32], learned: NDArray[np.bool_], where: str, most: int) -> Piece:
    return Piece(
        ids[:most],
        learned[:most],
        where,
        num_truncated=max(0, len(ids) - most),
        num_lost_labels=int(learned[most:].sum()),
    )


def _from_texts(examples: Sequence[Example], tokenizer: Tokenizer, most: int) -> Iterator[Piece]:
    """Yield the windows of the plain texts, each text with its end-of-text token."""
    numbers = [n for n, e in enumerate(examples) if e.text and not e.messages and not e.input_ids]
    end = tokenizer.eos_token_id
    for number, encoding in zip(
        numbers, _encodings(tokenizer, [examples[n].text for n in numbers]), strict=True
    ):
        ids = np.array(encoding.ids, np.int32)
        if end is not None and ids[-1:].tolist() != [end]:
            ids = np.append(ids, np.int32(end))
        for start in range(0, len(ids), most):
            window = ids[start : start + most]
            if len(window) > 1:  # a window of one token has nothing to predict
                flags = HAS_END | (CONTINUES if start else 0)
                learned = np.ones(len(window), bool)
                yield Piece(window, learned, examples[number].where, flags, example=number)


def _from_ids(example: Example, number: int, vocabulary: int, most: int) -> Piece:
    """Take a row that is tokenised already, with the labels it has."""
    if wrong := [i for i in example.input_ids if not 0 <= i < vocabulary]:
        raise InputError(
            f"{example.where}: token id {wrong[0]} is not one of the tokenizer's {vocabulary}",
            fix="tokenise the rows with this model's tokenizer",
        )
    learned = np.array(example.labels) != IGNORED
    piece = _cut(np.array(example.input_ids, np.int32), learned, example.where, most)
    piece.flags, piece.example = HAS_END, number
    return piece


def _hash(pieces: Sequence[Piece], examples: Sequence[Example]) -> None:
    """Give pieces the hashes of their examples."""
    hashes: dict[int, tuple[int, int, int]] = {}
    for piece in pieces:
        if piece.example not in hashes:
            example = examples[piece.example]
            texts = (example.key, example.prompt_key, example.answer.strip().lower())
            hashes[piece.example] = (hash64(texts[0]), hash64(texts[1]), hash64(texts[2]))
        piece.key, piece.question, piece.answer = hashes[piece.example]


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
