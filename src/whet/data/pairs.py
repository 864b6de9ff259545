"""Pairs and judged answers: what one loss of a preference method is over.

The store holds the two conversations of a pair as neighbouring rows. Here they become one unit, which is
drawn, packed and counted whole. Labels are kept on the answer alone: earlier turns of the assistant, that
both conversations have, are part of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, overload

import numpy as np

from whet.data.prepare import PreparedData
from whet.data.store import StoredExamples, TokenRows, TokenStore
from whet.data.tokenize import CHOSEN, DESIRABLE, IGNORED, REJECTED, UNDESIRABLE, Tokens
from whet.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Unit(Tokens):
    """A pair, or one judged answer. Its `input_ids` and `labels` are what enters the model for it.

    Args:
        documents: The chosen and the rejected conversation, or the one that was judged.
    """

    documents: tuple[Tokens, ...] = ()

    @property
    def desirable(self) -> bool:
        """Whether the one answer was judged a good one."""
        return bool(self.flags & DESIRABLE)


def make_pair(chosen: Tokens, rejected: Tokens, share: bool = True) -> Unit:
    """Make a pair of its two conversations.

    Args:
        chosen: The prompt and the answer that was chosen.
        rejected: The prompt and the one that was rejected.
        share: Let what both begin with enter the model once.
    """
    common = _num_common(chosen.input_ids, rejected.input_ids)
    start = _answer_start(chosen.labels, common)
    documents = tuple(_only_from(tokens, start) for tokens in (chosen, rejected))
    skip = common if share else 0
    return Unit(
        chosen.input_ids + rejected.input_ids[skip:],
        # The first token of a document has nothing before it to be predicted from.
        [*documents[0].labels, *([] if skip else [IGNORED]), *documents[1].labels[skip or 1 :]],
        chosen.where,
        chosen.num_truncated + rejected.num_truncated,
        chosen.num_lost_labels + rejected.num_lost_labels,
        documents=documents,
    )


def make_judged(tokens: Tokens) -> Unit:
    """Make a unit of one judged answer: the last turn that is labelled."""
    labelled = [place for place, label in enumerate(tokens.labels) if label != IGNORED]
    last = labelled[-1] if labelled else len(tokens.labels) - 1
    document = _only_from(tokens, _answer_start(tokens.labels, last))
    return Unit(
        document.input_ids, document.labels, document.where, document.num_truncated,
        document.num_lost_labels, document.flags, (document,),
    )  # fmt: skip


def mismatched(units: Sequence[Unit], max_length: int) -> list[Unit]:
    """Put each prompt before the answer of the unit before it, the first before the last's.

    KTO estimates from them how far the model is from its reference (arXiv 2402.01306, section 4.1).

    Args:
        units: The judged answers of a step.
        max_length: Longest row in tokens.
    """
    halves = []
    for unit in units:
        start = next(i for i, label in enumerate(unit.labels) if label != IGNORED)
        halves.append((unit.input_ids[:start], unit.input_ids[start:], unit.labels[start:]))
    made = []
    for number, unit in enumerate(units):
        prompt, (_, answer, labels) = halves[number][0], halves[number - 1]
        ids = (prompt + answer)[:max_length]
        tokens = Tokens(ids, ([IGNORED] * len(prompt) + labels)[:max_length], unit.where)
        made.append(Unit(ids, tokens.labels, unit.where, documents=(tokens,)))
    return made


def _num_common(first: Sequence[int], second: Sequence[int]) -> int:
    most = min(len(first), len(second))
    differ = np.flatnonzero(np.array(first[:most]) != np.array(second[:most]))
    return int(differ[0]) if len(differ) else most


def _answer_start(labels: Sequence[int], place: int) -> int:
    """Return where the labelled turn begins that a place is in, or behind."""
    while place > 0 and labels[place - 1] != IGNORED:
        place -= 1
    return place


def _only_from(tokens: Tokens, start: int) -> Tokens:
    return replace(tokens, labels=[IGNORED] * start + tokens.labels[start:])


class UnitRows(TokenRows):
    """Units of a store, in some order, read when asked for.

    Args:
        store: The store.
        numbers: The rows of each unit, int64 (units, 2) for pairs and (units, 1) for judged answers.
        share: Let what both conversations of a pair begin with enter the model once.
    """

    def __init__(self, store: TokenStore, numbers: NDArray[np.int64], share: bool = True) -> None:
        super().__init__(store, numbers)
        self.share = share

    @overload
    def __getitem__(self, key: int) -> Unit: ...
    @overload
    def __getitem__(self, key: slice) -> UnitRows: ...
    def __getitem__(self, key: int | slice) -> Unit | UnitRows:
        if isinstance(key, slice):
            return UnitRows(self.store, self.numbers[key], self.share)
        documents = [self.store.tokens(int(number)) for number in self.numbers[key]]
        if len(documents) == 1:
            return make_judged(documents[0])
        return make_pair(documents[0], documents[1], self.share)

    def __iter__(self) -> Iterator[Unit]:
        return (self[place] for place in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each unit, int32; what a pair shares is counted twice."""
        return self.column("length").sum(1, dtype=np.int32)


def units_of(rows: TokenRows, share: bool = True) -> UnitRows:
    """Return the units among rows: whole pairs, and judged answers where there are any.

    Args:
        rows: Rows of a store; of a pair both, or it is left out.
        share: As in UnitRows.
    """
    flags = rows.column("flags")
    if (flags & (DESIRABLE | UNDESIRABLE)).any():
        judged = (flags & (DESIRABLE | UNDESIRABLE)) != 0
        return UnitRows(rows.store, rows.numbers[judged][:, None], share)
    chosen = rows.numbers[(flags & CHOSEN) != 0]
    rejected = rows.numbers[(flags & REJECTED) != 0]
    chosen = chosen[np.isin(chosen + 1, rejected)]  # a pair's rows are neighbours
    return UnitRows(rows.store, np.stack([chosen, chosen + 1], 1), share)


def with_units(data: PreparedData, share: bool = True) -> tuple[PreparedData, int]:
    """Return the data of a preference method.

    Args:
        data: As `prepare` gives it.
        share: As in UnitRows.

    Returns:
        The data with units to train on, of whose held-out rows the good answers are kept, which
        perplexity is measured on; and how many pairs were left out, because one of their answers has no
        learned token.

    Raises:
        InputError: None is left.
    """
    train = units_of(data.train, share)
    left_out = (len(data.train) - train.numbers.size) if train.numbers.shape[1] == 2 else 0
    if not len(train):
        raise InputError(
            "no pair has a learned token in both of its answers",
            f"{len(data.train)} answers",
            "raise model.max_length, or shorten the prompts",
        )
    judged = units_of(data.heldout, share)
    return replace(with_good_answers(data), train=train, judged=judged), left_out


def with_good_answers(data: PreparedData) -> PreparedData:
    """Leave bad answers out of the held-out rows: perplexity is measured on good ones."""
    good = (data.heldout.column("flags") & (REJECTED | UNDESIRABLE)) == 0
    examples = data.heldout_examples
    if isinstance(examples, StoredExamples):
        examples = StoredExamples(examples.file, examples.offsets[good], examples.keeper)
    heldout = TokenRows(data.heldout.store, data.heldout.numbers[good])
    return replace(data, heldout=heldout, heldout_examples=examples)
