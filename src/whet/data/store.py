"""Tokenised rows on disk, read through memory maps.

A store is a folder with the token ids of all rows one after another, a byte for each that tells whether
it is learned, a fixed-size record for each row and its place as text. Neither writing nor reading holds
the rows in memory: what grows with their number is on disk, and the system keeps of it what there is
room for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, overload

import numpy as np

from whet.data.formats import Example
from whet.data.tokenize import IGNORED, Piece, Tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Offsets are from the start of the store; lengths and counts are of tokens; key, question and answer are
# hashes of the example's text, of what stands before its answer, and of the answer.
RECORD = np.dtype(
    [
        ("token", "<i8"), ("place", "<i8"), ("example", "<i8"), ("key", "<u8"), ("question", "<u8"),
        ("answer", "<u8"), ("length", "<i4"), ("num_labels", "<i4"), ("num_truncated", "<i4"),
        ("num_lost_labels", "<i4"), ("flags", "<u2"), ("place_bytes", "<u2"),
    ]
)  # fmt: skip
FILES = ("ids.i32", "learned.u8", "records", "places.txt")


@dataclass
class Batch:
    """Pieces as arrays, which is how they travel between processes.

    Args:
        ids: Token ids of all pieces, int32.
        learned: Whether each is learned, uint8.
        records: One record a piece, with offsets from the start of the batch.
        places: Where each piece came from.
        num_examples: How many examples they are of; one may have many pieces, or none.
        counts: How often something was met that the report tells, by kind and text.
    """

    ids: NDArray[np.int32]
    learned: NDArray[np.uint8]
    records: NDArray[Any]
    places: list[str]
    num_examples: int
    counts: dict[tuple[str, str], int] = field(default_factory=dict)


def to_batch(
    pieces: Sequence[Piece], num_examples: int, counts: dict[tuple[str, str], int]
) -> Batch:
    """Lay pieces side by side.

    Args:
        pieces: In their order; `example` counts from the first of them.
        num_examples: How many examples they are of.
        counts: What was met.
    """
    records = np.zeros(len(pieces), RECORD)
    for name in (
        "example",
        "key",
        "question",
        "answer",
        "num_truncated",
        "num_lost_labels",
        "flags",
    ):
        records[name] = [getattr(piece, name) for piece in pieces]
    records["length"] = [len(piece.ids) for piece in pieces]
    records["num_labels"] = [int(piece.learned[1:].sum()) for piece in pieces]
    records["token"] = np.cumsum(records["length"], dtype=np.int64) - records["length"]
    none = [np.zeros(0, np.int32)]
    return Batch(
        np.concatenate([piece.ids for piece in pieces] or none).astype(np.int32, copy=False),
        np.concatenate([piece.learned for piece in pieces] or none).astype(np.uint8, copy=False),
        records,
        [piece.where for piece in pieces],
        num_examples,
        counts,
    )


class StoreWriter:
    """Writes a store from start to end.

    Args:
        folder: A folder that is made; nothing may be in it yet.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.num_tokens = self.num_examples = self.num_records = self._num_place_bytes = 0
        self._files: list[IO[bytes]] = [(folder / name).open("wb") for name in FILES]

    def append(self, batch: Batch) -> None:
        """Write a batch behind the last one."""
        records = batch.records
        places = [place.encode("utf-8", "replace")[:65535] for place in batch.places]
        sizes = np.array([len(place) for place in places], np.int64)
        records["token"] += self.num_tokens
        records["example"] += self.num_examples
        records["place_bytes"] = sizes
        records["place"] = self._num_place_bytes + np.cumsum(sizes) - sizes
        for file, data in zip(
            self._files, (batch.ids, batch.learned, records, b"".join(places)), strict=True
        ):
            file.write(data if isinstance(data, bytes) else data.tobytes())
        self.num_tokens += len(batch.ids)
        self.num_examples += batch.num_examples
        self.num_records += len(records)
        self._num_place_bytes += int(sizes.sum())

    def close(self) -> None:
        """Write what is still in memory."""
        for file in self._files:
            file.close()


class TokenStore:
    """A store that was written.

    Args:
        folder: Its folder.
        keeper: Anything that must live as long as the store does, such as the temporary folder it is in.
    """

    def __init__(self, folder: Path, keeper: object = None) -> None:
        self.folder, self.keeper = folder, keeper
        self.ids = _mapped(folder / FILES[0], np.dtype(np.int32))
        self.learned = _mapped(folder / FILES[1], np.dtype(np.uint8))
        self.records = _mapped(folder / FILES[2], RECORD)
        self._places = _mapped(folder / FILES[3], np.dtype(np.uint8))

    def place(self, number: int) -> str:
        """Return where a row came from."""
        record = self.records[number]
        start = int(record["place"])
        return bytes(self._places[start : start + int(record["place_bytes"])]).decode()

    def tokens(self, number: int) -> Tokens:
        """Return one row."""
        record = self.records[number]
        start, stop = int(record["token"]), int(record["token"]) + int(record["length"])
        ids, learned = self.ids[start:stop], self.learned[start:stop]
        return Tokens(
            ids.tolist(),
            np.where(learned, ids, IGNORED).tolist(),
            self.place(number),
            int(record["num_truncated"]),
            int(record["num_lost_labels"]),
            int(record["flags"]),
        )


def _mapped(file: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if not file.stat().st_size:  # nothing cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(file, dtype, mode="r")


class TokenRows(Sequence[Tokens]):
    """Some rows of a store, in some order, as a sequence of Tokens that are read when asked for.

    Args:
        store: The store.
        numbers: Numbers of its rows, int64; a row may be there more than once.
    """

    def __init__(self, store: TokenStore, numbers: NDArray[np.int64]) -> None:
        self.store, self.numbers = store, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, key: int) -> Tokens: ...
    @overload
    def __getitem__(self, key: slice) -> TokenRows: ...
    def __getitem__(self, key: int | slice) -> Tokens | TokenRows:
        if isinstance(key, slice):
            return TokenRows(self.store, self.numbers[key])
        return self.store.tokens(int(self.numbers[key]))

    def __iter__(self) -> Iterator[Tokens]:
        return (self.store.tokens(int(number)) for number in self.numbers)

    def column(self, name: str) -> NDArray[Any]:
        """Return one field of the rows' records."""
        return np.asarray(self.store.records[name][self.numbers])

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each row, int32."""
        return self.column("length")


class StoredExamples(Sequence[Example]):
    """Examples in a file of JSON lines, read when asked for.

    Args:
        file: The file.
        offsets: Where the examples start in it, int64.
        keeper: Anything that must live as long.
    """

    def __init__(self, file: Path, offsets: NDArray[np.int64], keeper: object = None) -> None:
        self.file, self.offsets, self.keeper = file, offsets, keeper

    def __len__(self) -> int:
        return len(self.offsets)

    @overload
    def __getitem__(self, key: int) -> Example: ...
    @overload
    def __getitem__(self, key: slice) -> StoredExamples: ...
    def __getitem__(self, key: int | slice) -> Example | StoredExamples:
        if isinstance(key, slice):
            return StoredExamples(self.file, self.offsets[key], self.keeper)
        with self.file.open("rb") as file:
            file.seek(int(self.offsets[key]))
            return _example(json.loads(file.readline()))


def _example(values: dict[str, Any]) -> Example:
    """Make an example of what JSON keeps of it."""
    made: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Example(**made)


def lengths_of(rows: Sequence[Tokens]) -> NDArray[np.int32]:
    """Return the tokens of each row, int32, without reading rows that are in a store."""
    if isinstance(rows, TokenRows):
        return rows.lengths
    return np.array([len(tokens.input_ids) for tokens in rows], np.int32)


def count_labels(rows: Sequence[Tokens]) -> int:
    """Return how many tokens are learned, without reading rows that are in a store."""
    if isinstance(rows, TokenRows):
        return int(rows.column("num_labels").sum(dtype=np.int64))
    return sum(tokens.num_labels for tokens in rows)
