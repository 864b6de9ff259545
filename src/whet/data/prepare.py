"""Prepare the data of a run, with every row accounted for.

`prepare` is the only way from a config to token ids. It raises before any model is loaded when rows are
unusable; what else may be wrong with them is in its report, and `whet.data.gates` stops what should not
start.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from whet.data import cache
from whet.data.formats import Example
from whet.data.pipeline import SAMPLE_SEED, Reading, read_examples, write_store
from whet.data.report import DataReport, report_split
from whet.data.sources import Source, find_sources, require_sources
from whet.data.store import FILES, StoredExamples, TokenRows, TokenStore
from whet.data.tokenize import hash64
from whet.errors import InputError
from whet.model import Tokenizer
from whet.sections import DataSection

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NO_QUESTION = hash64("")


@dataclass
class PreparedData:
    """Everything a run needs of its data.

    Args:
        train: Tokenised training rows.
        heldout: Tokenised held-out rows; empty when there are none.
        heldout_examples: The held-out examples as text, in the order of `heldout`.
        report: What became of the rows.
        refused: File with a line of JSON for each row that could not be used, if there are any.
        judged: Held-out pairs or judged answers, of methods that learn from them.
    """

    train: TokenRows
    heldout: TokenRows
    heldout_examples: Sequence[Example]
    report: DataReport
    refused: Path | None = None
    judged: TokenRows | None = None


def prepare(
    data: DataSection,
    tokenizer: Tokenizer,
    max_length: int,
    chat_template: str = "the tokenizer's own",
    tell: Callable[[int], None] = lambda examples: None,
) -> PreparedData:
    """Read, check, split and tokenise the data of a config, or take what was kept of an earlier time.

    Args:
        data: The config's data section.
        tokenizer: The model's tokenizer, with a chat template.
        max_length: Longest row in tokens.
        chat_template: Where the template came from, for the report.
        tell: Hears how many examples are done.

    Raises:
        InputError: A source cannot be read, or rows are faulty (all are told).
        WhetError: The tokenised rows cannot be written.
    """
    require_sources(data)
    sources = {"train": find_sources(data.train, data.weights, "data.train")}
    if data.heldout is not None:
        sources["heldout"] = find_sources(data.heldout, (), "data.heldout")
    key = cache.key_of(data, sources, tokenizer, max_length) if data.cache else None
    folder, keeper = (cache.find(key) if key else None), None
    cached = folder is not None
    if folder is None:
        work = partial(_write, data, sources, tokenizer, max_length, tell)
        folder, keeper = cache.keep(key, work)
    found = _open(data, folder, keeper, tokenizer, max_length)
    found.report.chat_template, found.report.cached = chat_template, cached
    return found


def examples_of(data: DataSection, named: str | list[str]) -> Iterator[Example]:
    """Read the usable examples of some files, one by one, without a tokenizer.

    Args:
        data: The config's data section; its format, columns and system prompt are used.
        named: Files or Hub ids.

    Raises:
        InputError: A source cannot be read, or, once all were read, rows are faulty.
    """
    reading = Reading()
    yield from read_examples(find_sources(named), data, reading)
    _require_usable(data, reading)


def _require_usable(data: DataSection, reading: Reading) -> None:
    if reading.rows_refused and data.on_bad_row == "stop":
        more = reading.rows_refused - len(reading.faults)
        raise InputError.listing(
            f"{reading.rows_refused} of {reading.rows_read} rows cannot be used; correct them, or set "
            "data.on_bad_row: skip",
            [*reading.faults, *([f"and {more} more"] if more else [])],
            most=len(reading.faults) + 1,
        )


def _write(
    data: DataSection,
    sources: dict[str, list[Source]],
    tokenizer: Tokenizer,
    max_length: int,
    tell: Callable[[int], None],
    folder: Path,
) -> None:
    """Write everything that is kept of a data section into a folder."""
    found: dict[str, Any] = {}
    for split, named in sources.items():
        reading = Reading()
        most = data.max_rows if split == "train" else None
        examples = read_examples(named, data, reading, most, folder / "refused.jsonl")
        if split == "heldout":
            examples = _written(examples, folder)
        counts = write_store(examples, folder / split, tokenizer, max_length, data, tell)
        _require_usable(data, reading)
        texts: dict[str, dict[str, int]] = {}
        for (kind, text), count in counts.items():
            texts.setdefault(kind, {})[text] = count
        found[split] = {"reading": asdict(reading), "texts": texts}
    if data.heldout is None and data.heldout_fraction:
        again = read_examples(sources["train"], data, Reading(), data.max_rows)
        store = TokenStore(folder / "train")
        chosen = _chosen_for_heldout(store, data.heldout_fraction)
        if len(chosen) and len(chosen) == len(np.unique(store.records["example"])):
            raise InputError(
                "data.heldout_fraction sets whole examples aside, and all of the data is one",
                fix="for a text file set data.text_rows: paragraph (or line), or name data.heldout",
            )
        chosen.tofile(folder / "heldout.ordinals")
        wanted = set(chosen.tolist())
        kept = (example for number, example in enumerate(again) if number in wanted)
        deque(_written(kept, folder), maxlen=0)
    contents = [cache.hash_file(folder / split / name) for split in sources for name in FILES[:2]]
    drawn = [data.weights, data.heldout_fraction]
    found["sha256"] = hashlib.sha256(json.dumps([contents, drawn]).encode()).hexdigest()
    (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


def _written(examples: Iterable[Example], folder: Path) -> Iterator[Example]:
    """Pass examples on, and write them down on the way."""
    offsets = []
    with (folder / "heldout.jsonl").open("wb") as out:
        for example in examples:
            offsets.append(out.tell())
            out.write(json.dumps(asdict(example)).encode() + b"\n")
            yield example
    np.array(offsets, np.int64).tofile(folder / "heldout.offsets")


def _chosen_for_heldout(store: TokenStore, fraction: float) -> NDArray[np.int64]:
    """Choose examples by the hash of what they say: the same ones whatever their order in the files."""
    keys = np.unique(store.records["key"])
    if not len(keys):
        return np.zeros(0, np.int64)
    last = keys[max(1, round(len(keys) * fraction)) - 1]
    return np.unique(store.records["example"][store.records["key"] <= last])


def _open(
    data: DataSection, folder: Path, keeper: object, tokenizer: Tokenizer, max_length: int
) -> PreparedData:
    """Make the data of a run from what `_write` wrote."""
    found = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    store = TokenStore(folder / "train", keeper)
    reading = Reading(**found["train"]["reading"])
    everything = np.arange(len(store.records))
    train = TokenRows(store, everything)
    heldout = TokenRows(store, everything[:0])
    examples: Sequence[Example] = ()
    heldout_reading = None
    if data.heldout is not None:
        store = TokenStore(folder / "heldout", keeper)
        heldout = TokenRows(store, np.arange(len(store.records)))
        heldout_reading = Reading(**found["heldout"]["reading"])
    elif data.heldout_fraction:
        chosen = np.fromfile(folder / "heldout.ordinals", np.int64)
        held = np.isin(store.records["example"], chosen)
        train, heldout = TokenRows(store, everything[~held]), TokenRows(store, everything[held])
        heldout_reading = Reading(formats=reading.formats, rows_read=len(chosen))
        reading.rows_read -= len(chosen)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    files = [data.train] if isinstance(data.train, str) else data.train
    texts = found["train"]["texts"]
    report = DataReport(
        report_split(files, reading, train, texts, max_length, decode), None, 0, "", found["sha256"],
        max_length=max_length,
    )  # fmt: skip
    if heldout_reading is not None:
        named = data.heldout or data.train
        files = [named] if isinstance(named, str) else named
        texts = found.get("heldout", {}).get("texts", {})
        report.heldout = report_split(files, heldout_reading, heldout, texts, max_length, decode)
        report.overlap, report.overlap_questions = _overlap(train, heldout)
        heldout = _learnable(heldout)
        examples = _examples_of(heldout, folder, keeper)
    train = _weighted(_learnable(train), reading.ends, data.weights)
    refused = folder / "refused.jsonl"
    return PreparedData(train, heldout, examples, report, refused if refused.exists() else None)


def _learnable(rows: TokenRows) -> TokenRows:
    return TokenRows(rows.store, rows.numbers[rows.column("num_labels") > 0])


def _examples_of(heldout: TokenRows, folder: Path, keeper: object) -> StoredExamples:
    offsets = np.fromfile(folder / "heldout.offsets", np.int64)
    places = heldout.column("example")
    if (folder / "heldout.ordinals").exists():  # of all rows, some were chosen
        places = np.searchsorted(np.fromfile(folder / "heldout.ordinals", np.int64), places)
    return StoredExamples(folder / "heldout.jsonl", offsets[places], keeper)


def _overlap(train: TokenRows, heldout: TokenRows) -> tuple[int, int]:
    """Count held-out examples that are training examples, and those that only share the question."""
    _, first = np.unique(heldout.column("example"), return_index=True)
    same = np.isin(heldout.column("key")[first], train.column("key"))
    questions = heldout.column("question")[first]
    asked = np.isin(questions, train.column("question"))
    talks = questions != _NO_QUESTION
    return int(same.sum()), int((asked & talks & ~same).sum())


def _weighted(rows: TokenRows, ends: Sequence[int], weights: Sequence[float]) -> TokenRows:
    """Repeat and draw examples by the weights of their sources."""
    if all(weight == 1 for weight in weights):
        return rows
    times = np.zeros(ends[-1] if ends else 0, np.int64)
    dice = np.random.default_rng(SAMPLE_SEED)
    for start, end, weight in zip([0, *ends], ends, weights, strict=False):
        times[start:end] = int(weight)
        extra = dice.permutation(end - start)[: round((weight - int(weight)) * (end - start))]
        times[start + extra] += 1
    return TokenRows(rows.store, np.repeat(rows.numbers, times[rows.column("example")]))
