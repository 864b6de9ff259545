"""From sources to a store: read rows, make examples of them, tokenise them, write them down.

Rows flow through in chunks. The first chunks are tokenised here; when there are more, other processes
take them, and the results are written in the order of the rows.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from whet.data.content import inspect_example
from whet.data.formats import (
    Example,
    apply_formatting,
    check_columns,
    detect_format,
    load_formatting,
    merge_turns,
    to_example,
)
from whet.data.sources import Fault, Row, Source, read_source
from whet.data.store import Batch, StoreWriter, to_batch
from whet.data.tokenize import encode
from whet.errors import WhetError
from whet.model import Tokenizer
from whet.sections import DataSection

CHUNK = 256  # examples that are tokenised at a time
ALONE = 32  # chunks before other processes are worth their start
MOST_WORKERS = 8
SAMPLE_SEED = 3407  # of the rows that `#N` draws: not the run's seed, so that they stay the same
_SHOWN = 10  # places named of each kind of trouble


@dataclass
class Reading:
    """What was found while rows were read.

    Args:
        formats: Format of each source, each once.
        rows_read: Rows met, those that cannot be used among them.
        rows_refused: Rows that cannot be used.
        rows_empty: Rows with nothing to learn, which are left out.
        faults: The first of the rows that cannot be used.
        notes: What is odd, one sentence each.
        ends: Number of examples made when each source was read to its end.
    """

    formats: list[str] = field(default_factory=list)
    rows_read: int = 0
    rows_refused: int = 0
    rows_empty: int = 0
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)


def read_examples(
    sources: Sequence[Source],
    data: DataSection,
    reading: Reading,
    most: int | None = None,
    refused: Path | None = None,
) -> Iterator[Example]:
    """Read the usable examples of sources, one by one.

    Args:
        sources: What to read.
        data: The config's data section.
        reading: Counts what is met, in place.
        most: Rows to stop after; None reads all.
        refused: File that gets a line of JSON for each row that cannot be used.

    Raises:
        InputError: A source cannot be read.
    """
    count = 0

    def counted(examples: Iterable[Example]) -> Iterator[Example]:
        nonlocal count
        for example in examples:
            count += 1
            yield example

    for source in sources:
        rows = _sampled(source, data, reading)
        if most is not None:
            rows = islice(rows, max(0, most - reading.rows_read))
        yield from counted(merge_turns(_usable(rows, data, reading, refused), data.merge_turns))
        reading.ends.append(count)


def _sampled(source: Source, data: DataSection, reading: Reading) -> Iterator[Row | Fault]:
    """Return a source's rows; with `#N`, N of them drawn by a fixed seed, in their order."""
    rows = read_source(source, data.text_rows, data.streaming)
    if source.sample is None:
        return rows
    if data.streaming and not source.paths:
        return islice(rows, source.sample)
    total = sum(1 for _ in rows)  # reading twice keeps no rows in memory
    if total < source.sample:
        reading.notes.append(f"'{source.name}' has {total} rows, and all of them are taken")
    dice = random.Random(SAMPLE_SEED)
    chosen = set(dice.sample(range(total), min(source.sample, total)))
    again = read_source(source, data.text_rows, data.streaming)
    return (row for number, row in enumerate(again) if number in chosen)


def _usable(
    rows: Iterable[Row | Fault], data: DataSection, reading: Reading, refused: Path | None
) -> Iterator[Example]:
    """Turn rows into examples, and account for those that are none."""
    for item in _made(rows, data, reading):
        if isinstance(item, Fault):
            reading.rows_refused += 1
            if len(reading.faults) < 2 * _SHOWN:
                reading.faults.append(str(item))
            if refused is not None:
                line = {"where": item.where, "reason": item.reason, "excerpt": item.excerpt}
                with refused.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(line, ensure_ascii=False) + "\n")
            continue
        if len(reading.notes) < _SHOWN:
            reading.notes += [f"{item.where} {note}" for note in item.notes]
        if reading.rows_refused and data.on_bad_row == "stop":
            continue  # nothing will come of it; the rest is read to tell all faults at once
        if item.messages or item.text or item.input_ids:
            yield item
        else:
            reading.rows_empty += 1


def _made(
    rows: Iterable[Row | Fault], data: DataSection, reading: Reading
) -> Iterator[Example | Fault]:
    if data.formatting is not None:
        yield from _formatted(rows, data.formatting, reading)
        return
    file, name = None, data.format
    for row in rows:
        reading.rows_read += 1
        if isinstance(row, Fault):
            yield row
            continue
        if row.file != file:  # a file, or the first row of a dataset
            file = row.file
            name = detect_format(row, data.columns) if data.format == "auto" else data.format
            check_columns(row, name, data.columns)
            if name not in reading.formats:
                reading.formats.append(name)
        yield to_example(row, name, data.columns, data.system)


def _formatted(
    rows: Iterable[Row | Fault], named: str, reading: Reading
) -> Iterator[Example | Fault]:
    function = load_formatting(named)
    reading.formats.append(f"function {named}")
    rows = iter(rows)
    while chunk := list(islice(rows, CHUNK)):
        reading.rows_read += len(chunk)
        yield from (item for item in chunk if isinstance(item, Fault))
        yield from apply_formatting(function, [item for item in chunk if isinstance(item, Row)])


def write_store(
    examples: Iterable[Example],
    folder: Path,
    tokenizer: Tokenizer,
    max_length: int,
    data: DataSection,
    tell: Callable[[int], None] = lambda rows: None,
) -> dict[tuple[str, str], int]:
    """Tokenise examples into a new store.

    Args:
        examples: The examples, which are read as they are needed.
        folder: Folder of the store, which is made.
        tokenizer: The model's tokenizer.
        max_length: Longest row in tokens.
        data: The config's data section.
        tell: Hears how many examples are done.

    Returns:
        What was met in the texts, by kind and text.

    Raises:
        InputError: An example cannot be tokenised.
        WhetError: The disk is full, or a worker was killed.
    """
    examples = iter(examples)
    chunks = iter(lambda: list(islice(examples, CHUNK)), [])
    work = _Work(tokenizer, max_length, data.loss_on)
    counts: Counter[tuple[str, str]] = Counter()
    writer = StoreWriter(folder)
    try:
        first = map(work, islice(chunks, ALONE))
        for batch in chain(first, _elsewhere(work, chunks, data.workers)):
            writer.append(batch)
            counts.update(batch.counts)
            tell(writer.num_examples)
    except OSError as error:
        raise WhetError(
            f"the tokenised rows cannot be written to '{folder}': {error.strerror or error}",
            fix="make room there, or set XDG_CACHE_HOME to a folder on another disk",
        ) from error
    finally:
        writer.close()
    return dict(counts)


@dataclass
class _Work:
    """What is done to a chunk, here or in another process."""

    tokenizer: Tokenizer
    max_length: int
    loss_on: str

    def __call__(self, chunk: list[Example]) -> Batch:
        counts: Counter[tuple[str, str]] = Counter()
        for example in chunk:
            inspect_example(example, self.tokenizer, counts)
        pieces = encode(chunk, self.tokenizer, self.max_length, self.loss_on)
        return to_batch(pieces, len(chunk), dict(counts))


_work: _Work | None = None


def _start_worker(work: _Work) -> None:
    global _work
    _work = work
    # One thread each: the processes are as many as the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _do(chunk: list[Example]) -> Batch:
    assert _work is not None
    return _work(chunk)


def num_workers(wish: int | None) -> int:
    """Return how many processes tokenise; 1 is this one alone.

    Forking starts at once and needs nothing of the script that called whet, but must not happen once a
    GPU is in use, and other systems than Linux do not do it well.
    """
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 1
    import torch

    if torch.cuda.is_initialized():
        return 1
    return wish or min(MOST_WORKERS, len(os.sched_getaffinity(0)))


def _elsewhere(work: _Work, chunks: Iterator[list[Example]], wish: int | None) -> Iterator[Batch]:
    """Do chunks in other processes, a few ahead, and yield the results in their order."""
    num = num_workers(wish)
    if num == 1:
        yield from map(work, chunks)
        return
    first = next(chunks, None)
    if first is None:
        return
    pool = ProcessPoolExecutor(
        num, multiprocessing.get_context("fork"), initializer=_start_worker, initargs=(work,)
    )
    waiting: deque[Future[Batch]] = deque()
    try:
        for chunk in chain([first], chunks):
            waiting.append(pool.submit(_do, chunk))
            if len(waiting) > 2 * num:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise WhetError(
            "a process that tokenised rows was killed, as happens when memory runs out",
            fix="set data.workers: 1, or give the machine more memory",
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
