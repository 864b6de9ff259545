"""Prepare the data of a run, and account for every row of it.

`prepare` is the only way from a config to token ids. It raises before any model is loaded when rows
are unusable, and it refuses to start a run that would learn nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from whet.config import DataSection
from whet.data.formats import Example, check_columns, detect_format, to_example
from whet.data.sources import Fault, Row, read_rows, require_sources
from whet.data.tokenize import Tokens, tokenize
from whet.errors import InputError
from whet.model import Tokenizer

_SHOWN = 10  # places named of each kind of trouble


@dataclass
class SplitReport:
    """What became of the rows of one split."""

    files: list[str] = field(default_factory=list)
    formats: list[str] = field(default_factory=list)
    rows_read: int = 0
    rows_refused: int = 0
    rows_without_labels: int = 0
    rows_truncated: int = 0
    rows_without_end: int = 0
    duplicates: int = 0
    examples: int = 0
    tokens: int = 0
    tokens_learned: int = 0
    tokens_lost: int = 0
    longest: int = 0
    lengths: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class DataReport:
    """The supervision report: what will be learned, and what will not."""

    train: SplitReport
    heldout: SplitReport | None
    overlap: int
    chat_template: str
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Return the report for report.json."""
        return {
            "train": vars(self.train),
            "heldout": vars(self.heldout) if self.heldout else None,
            "overlap": self.overlap,
            "chat_template": self.chat_template,
            "sha256": self.sha256,
        }

    def warnings(self) -> list[str]:
        """Return a sentence for each thing a person should know before training."""
        found = []
        for name, split in (("training", self.train), ("held-out", self.heldout)):
            if split is None:
                continue
            for count, words in (
                (split.rows_refused, "rows could not be used and were skipped"),
                (split.rows_without_labels, "rows have nothing to learn and were left out"),
                (split.rows_truncated, "rows are longer than model.max_length and were cut; "
                                       f"{split.tokens_lost} learned tokens were lost"),
                (split.rows_without_end, "rows end without a learned end-of-turn token"),
                (split.duplicates, "rows are copies of an earlier row"),
            ):  # fmt: skip
                if count:
                    found.append(f"{count} of {split.rows_read} {name} {words}")
            found += split.notes
        if self.overlap:
            found.append(f"{self.overlap} held-out rows are also in the training rows")
        return found


@dataclass
class PreparedData:
    """Everything a run needs of its data.

    Args:
        train: Tokenised training examples.
        heldout: Tokenised held-out examples; empty when there are none.
        heldout_examples: The held-out conversations as text, in the order of `heldout`.
        report: What became of the rows.
    """

    train: list[Tokens]
    heldout: list[Tokens]
    heldout_examples: list[Example]
    report: DataReport


def prepare(
    data: DataSection,
    tokenizer: Tokenizer,
    max_length: int,
    chat_template: str = "the tokenizer's own",
) -> PreparedData:
    """Read, check, split and tokenise the data of a config.

    Args:
        data: The config's data section.
        tokenizer: The model's tokenizer, with a chat template.
        max_length: Longest example in tokens.
        chat_template: Where the template came from, for the report.

    Raises:
        InputError: A source cannot be read, rows are faulty (all are told), or nothing is learned.
    """
    require_sources(data)
    train_report = SplitReport()
    train = _read_split(_as_list(data.train), data, train_report, data.max_rows)
    heldout, heldout_report = [], None
    if data.heldout is not None:
        heldout_report = SplitReport()
        heldout = _read_split(_as_list(data.heldout), data, heldout_report, None)
    elif data.heldout_fraction:
        train, heldout = _split(train, data.heldout_fraction)
        heldout_report = SplitReport(train_report.files, train_report.formats, len(heldout))
        train_report.rows_read -= len(heldout)

    train_tokens, _ = _tokenize_split(train, tokenizer, max_length, data.loss_on, train_report)
    heldout_tokens, kept = [], []
    if heldout_report is not None:
        heldout_tokens, kept = _tokenize_split(
            heldout, tokenizer, max_length, data.loss_on, heldout_report
        )
    keys = {example.key for example in train}
    digest = hashlib.sha256(repr([t.input_ids for t in train_tokens + heldout_tokens]).encode())
    report = DataReport(
        train_report,
        heldout_report,
        sum(example.key in keys for example in heldout),
        chat_template,
        digest.hexdigest(),
    )
    _refuse_to_learn_nothing(report, max_length)
    return PreparedData(train_tokens, heldout_tokens, kept, report)


def read_examples(data: DataSection, sources: Sequence[str]) -> list[Example]:
    """Read the usable examples of some files, without a tokenizer.

    Args:
        data: The config's data section; its format, columns and system prompt are used.
        sources: Files or Hub ids.

    Raises:
        InputError: A source cannot be read, or a row is faulty.
    """
    return _read_split(sources, data, SplitReport(), None)


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _read_split(
    sources: Sequence[str], data: DataSection, report: SplitReport, most: int | None
) -> list[Example]:
    examples: list[Example] = []
    faults: list[Fault] = []
    for source in sources:
        report.files.append(source)
        name = None if data.format == "auto" else data.format
        rows: Iterable[Row | Fault] = read_rows(source, data.text_rows)
        if most is not None:
            rows = islice(rows, max(0, most - report.rows_read))
        checked = False
        for row in rows:
            report.rows_read += 1
            if isinstance(row, Row) and not checked:
                name = name or detect_format(row, data.columns)
                check_columns(row, name, data.columns)
                report.formats.append(name)
                checked = True
            item = row
            if isinstance(row, Row):
                assert name is not None
                item = to_example(row, name, data.columns, data.system)
            if isinstance(item, Fault):
                faults.append(item)
            elif isinstance(item, Example):
                report.notes += _note(report, item)
                if item.messages or item.text or item.input_ids:
                    examples.append(item)
                else:
                    report.rows_without_labels += 1
    report.rows_refused = len(faults)
    if faults and data.on_bad_row == "stop":
        raise InputError.listing(
            f"{len(faults)} of {report.rows_read} rows cannot be used; correct them, or set "
            "data.on_bad_row: skip",
            map(str, faults),
        )
    report.notes += [f"skipped {fault}" for fault in faults[:_SHOWN]]
    return examples


def _note(report: SplitReport, example: Example) -> list[str]:
    if len(report.notes) >= _SHOWN:
        return []
    return [f"{example.where} {note}" for note in example.notes]


def _split(examples: list[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """Set rows aside by the hash of what they say: the same rows whatever their order in the file."""
    ranked = sorted(
        {example.key for example in examples}, key=lambda k: hashlib.sha256(k.encode()).digest()
    )
    chosen = set(ranked[: max(1, round(len(ranked) * fraction))])
    return (
        [example for example in examples if example.key not in chosen],
        [example for example in examples if example.key in chosen],
    )


def _tokenize_split(
    examples: list[Example],
    tokenizer: Tokenizer,
    max_length: int,
    loss_on: str,
    report: SplitReport,
) -> tuple[list[Tokens], list[Example]]:
    found: list[Tokens] = []
    kept: list[Example] = []
    seen: set[str] = set()
    long: list[str] = []
    for example in examples:
        report.duplicates += example.key in seen
        seen.add(example.key)
        for tokens in tokenize(example, tokenizer, max_length, loss_on):
            report.tokens_lost += tokens.num_lost_labels
            if tokens.num_truncated:
                report.rows_truncated += 1
                total = len(tokens.input_ids) + tokens.num_truncated
                long.append(f"{tokens.where} has {total} tokens, over the limit of {max_length}")
            if not tokens.num_labels:
                report.rows_without_labels += 1
                continue
            report.rows_without_end += not tokens.has_end
            found.append(tokens)
            kept.append(example)
    report.notes += long[:_SHOWN]
    report.examples = len(found)
    report.tokens = sum(len(tokens.input_ids) for tokens in found)
    report.tokens_learned = sum(tokens.num_labels for tokens in found)
    report.longest = max((len(tokens.input_ids) for tokens in found), default=0)
    report.lengths = _histogram([len(tokens.input_ids) for tokens in found])
    return found, kept


def _histogram(lengths: list[int]) -> dict[str, int]:
    """Count lengths in bins that double, as {'33-64': 12, ...}."""
    counts: dict[int, int] = {}
    for length in lengths:
        top = 16
        while top < length:
            top *= 2
        counts[top] = counts.get(top, 0) + 1
    return {f"{top // 2 + 1 if top > 16 else 1}-{top}": counts[top] for top in sorted(counts)}


def _refuse_to_learn_nothing(report: DataReport, max_length: int) -> None:
    train = report.train
    if train.tokens_learned:
        return
    if train.rows_truncated:
        raise InputError(
            f"no token would be learned: {train.rows_truncated} of {train.rows_read} rows are longer "
            f"than model.max_length {max_length}, and all their answers lie beyond it",
            fix="raise model.max_length, or shorten the prompts",
        )
    raise InputError(
        f"no token would be learned from {train.rows_read} rows",
        "; ".join(train.notes[:3]) or None,
        "give rows with answers",
    )
