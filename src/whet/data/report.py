"""The supervision report: what of the data will be learned, what will not, and what looks wrong.

Everything is counted from the records of the tokenised rows, so it is what the trainer will see and not
what the files say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from whet.data.pipeline import Reading
from whet.data.store import TokenRows
from whet.data.tokenize import CONTINUES, CONVERSATION, EMPTY_ANSWER, HAS_END, REJECTED

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SHOWN = 10  # places named of each kind of trouble
NEAR_CONSTANT = 0.5  # share of the rows with one and the same answer from which it is told
FEW_ROWS = 20  # below, the same answer twice says nothing


@dataclass
class SplitReport:
    """What became of the rows of one split. Counts are of rows of the files, but where a name says else.

    Args:
        files: Sources, as they were named.
        formats: Their formats.
        rows_read: Rows of the files.
        rows_refused: Those that cannot be used.
        rows_without_labels: Those with nothing to learn, which are left out.
        rows_masked: Those among them that have an answer, but no learned token of it is left.
        rows_truncated: Examples cut at `model.max_length`.
        rows_without_end: Examples that do not end with a learned end-of-turn.
        rows_conversation: Examples that are conversations.
        duplicates: Examples equal to an earlier one.
        empty_answers: Examples whose last answer is empty.
        distinct_answers: Different answers.
        examples: Examples kept (a long text makes several, a pair makes two).
        tokens: Their tokens.
        tokens_learned: Those that are learned.
        tokens_lost: Learned tokens that were cut off.
        longest: Tokens of the longest example.
        lengths: Examples by their length, in bins that double.
        truncated: The first examples that were cut, with what they lost.
        masked: Places of the first rows that have no learned token left.
        common_answer: The most frequent answer with its rows, where it is near-constant.
        texts: What was met in the texts: placeholders, control tokens, unknown special tokens; by kind.
        refused: The first rows that cannot be used, with the reason.
        notes: What else is odd, one sentence each.
    """

    files: list[str] = field(default_factory=list)
    formats: list[str] = field(default_factory=list)
    rows_read: int = 0
    rows_refused: int = 0
    rows_without_labels: int = 0
    rows_masked: int = 0
    rows_truncated: int = 0
    rows_without_end: int = 0
    rows_conversation: int = 0
    duplicates: int = 0
    empty_answers: int = 0
    distinct_answers: int = 0
    examples: int = 0
    tokens: int = 0
    tokens_learned: int = 0
    tokens_lost: int = 0
    longest: int = 0
    lengths: dict[str, int] = field(default_factory=dict)
    truncated: list[str] = field(default_factory=list)
    masked: list[str] = field(default_factory=list)
    common_answer: dict[str, Any] | None = None
    texts: dict[str, dict[str, int]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def sentences(self, name: str) -> list[str]:
        """Return a sentence for each thing a person should know before training.

        Args:
            name: Which rows they are: `training` or `held-out`.
        """
        found = []
        for count, words in (
            (self.rows_refused, "rows could not be used and were skipped"),
            (self.rows_without_labels, "rows have nothing to learn and were left out"),
            (self.rows_truncated, "rows are longer than model.max_length and were cut; "
                                  f"{self.tokens_lost} learned tokens were lost"),
            (self.rows_without_end, "rows end without a learned end-of-turn token"),
            (self.duplicates, "rows are copies of an earlier row"),
            (self.empty_answers, "rows have an empty answer: the model learns to say nothing"),
        ):  # fmt: skip
            if count:
                found.append(f"{count} of {self.rows_read} {name} {words}")
        if self.common_answer:
            found.append(
                f"{self.common_answer['rows']} of {self.examples} {name} rows have the answer "
                f"{self.common_answer['text']!r}: a model that always says it would be right as often"
            )
        found += self._about_texts()
        found += [f"skipped {line}" for line in self.refused]
        found += self.truncated
        found += [f"{place} has no learned token left" for place in self.masked]
        return found + self.notes

    def _about_texts(self) -> list[str]:
        words = {
            "placeholder": "is a place left to fill in, and would be learned as it stands",
            "control": "is a control token of the tokenizer and stands in a row's own text, where it "
                       "would end or open a turn",
            "template": "is written by the chat template, but is no token of this tokenizer",
            "unknown": "looks like a control token in a row's text, but is none of this tokenizer's",
        }  # fmt: skip
        return [
            f"{text!r} {words[kind]}" + (f" ({count} rows)" if kind != "template" else "")
            for kind in words
            for text, count in sorted(self.texts.get(kind, {}).items(), key=lambda x: -x[1])[:5]
        ]


@dataclass
class DataReport:
    """The supervision report of both splits.

    Args:
        train: The training rows.
        heldout: The held-out rows, if any.
        overlap: Held-out examples that are training examples too.
        overlap_questions: Held-out examples whose question is in the training rows with another answer.
        chat_template: Where the template came from.
        sha256: Of the tokenised rows: equal data gives equal values.
        max_length: Longest row in tokens.
        cached: Whether it was read from the cache.
    """

    train: SplitReport
    heldout: SplitReport | None
    overlap: int
    chat_template: str
    sha256: str
    overlap_questions: int = 0
    max_length: int = 0
    cached: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the report for report.json."""
        found = dict(vars(self))
        found["train"] = vars(self.train)
        found["heldout"] = vars(self.heldout) if self.heldout else None
        return found

    def warnings(self) -> list[str]:
        """Return a sentence for each thing a person should know before training."""
        found = self.train.sentences("training")
        if self.heldout is not None:
            found += self.heldout.sentences("held-out")
        if self.overlap:
            found.append(f"{self.overlap} held-out rows are also in the training rows")
        if self.overlap_questions:
            found.append(
                f"{self.overlap_questions} held-out rows ask what a training row asks, with another "
                "answer"
            )
        return found


def report_split(
    files: Sequence[str],
    reading: Reading,
    rows: TokenRows,
    counts: dict[str, dict[str, int]],
    max_length: int,
    decode: Any,
) -> SplitReport:
    """Count what became of the rows of a split.

    Args:
        files: Sources, as they were named.
        reading: What was found while they were read.
        rows: All rows of the split, those with nothing to learn among them.
        counts: What was met in the texts.
        max_length: Longest row in tokens.
        decode: Turns a row's learned tokens into text.
    """
    column, flags = rows.column, rows.column("flags")
    found = SplitReport(
        files=list(files), formats=reading.formats, rows_read=reading.rows_read,
        rows_refused=reading.rows_refused, refused=reading.faults[:_SHOWN], notes=reading.notes,
        texts=counts,
    )  # fmt: skip
    kept = column("num_labels") > 0
    cut = np.flatnonzero(column("num_truncated"))
    whole = (flags & (CONTINUES | REJECTED)) == 0  # one of each example
    masked = np.flatnonzero(~kept)
    example = column("example")

    def num_of(which: NDArray[np.bool_]) -> int:
        return len(np.unique(example[which]))  # a pair is one row of the file

    found.rows_masked = num_of(~kept)
    found.rows_without_labels = reading.rows_empty + found.rows_masked
    found.rows_truncated = num_of(column("num_truncated") > 0)
    talks = (flags & CONVERSATION) != 0
    found.rows_conversation = num_of(talks & kept)
    found.rows_without_end = num_of(kept & ((flags & HAS_END) == 0))
    found.empty_answers = int(((flags & EMPTY_ANSWER) != 0).sum())
    keys = column("key")[whole]
    found.duplicates = len(keys) - len(np.unique(keys))
    lengths = column("length")[kept]
    found.examples = len(lengths)
    found.tokens = int(lengths.sum(dtype=np.int64))
    found.tokens_learned = int(column("num_labels").sum(dtype=np.int64))
    found.tokens_lost = int(column("num_lost_labels").sum(dtype=np.int64))
    found.longest = int(lengths.max(initial=0))
    found.lengths = _histogram(lengths)
    for number in cut[:_SHOWN]:
        tokens = rows[int(number)]
        found.truncated.append(
            f"{tokens.where} has {len(tokens.input_ids) + tokens.num_truncated} tokens, over the limit "
            f"of {max_length}: {tokens.num_lost_labels} learned ones are lost"
        )
    found.masked = [rows[int(number)].where for number in masked[:_SHOWN]]
    _find_common_answer(found, rows, np.flatnonzero(kept & whole & talks), decode)
    return found


def _find_common_answer(found: SplitReport, rows: TokenRows, numbers: Any, decode: Any) -> None:
    """Note the most frequent answer when so many rows have it that the rest hardly matters."""
    answers = rows.column("answer")[numbers]
    values, first, counts = np.unique(answers, return_index=True, return_counts=True)
    found.distinct_answers = len(values)
    if len(answers) < FEW_ROWS:
        return
    top = int(counts.argmax())
    if counts[top] < NEAR_CONSTANT * len(answers):
        return
    tokens = rows[int(numbers[first[top]])]
    learned = [i for i, label in zip(tokens.input_ids, tokens.labels, strict=True) if label == i]
    found.common_answer = {"text": decode(learned)[:60], "rows": int(counts[top])}


def _histogram(lengths: Any) -> dict[str, int]:
    """Count lengths in bins that double, as {'33-64': 12, ...}."""
    top, found, below = 16, {}, 0
    longest = int(lengths.max(initial=0))
    while below < longest:
        count = int(((lengths > below) & (lengths <= top)).sum())
        if count:
            found[f"{below + 1}-{top}"] = count
        below, top = top, 2 * top
    return found
