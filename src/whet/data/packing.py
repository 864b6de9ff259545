"""Which examples make one optimizer step, and the passes they are packed into.

A step is what the user asked for (`train.batch_size` examples, or `train.batch_tokens` tokens); how it
is cut into passes changes memory and speed, never the mathematics. Packing is best-fit decreasing: the
longest example first, each into the fullest pass that still has room (Johnson 1974; within 11/9 of the
fewest passes). Examples are never split unless asked for.
"""

from __future__ import annotations

import hashlib
import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from whet.data.tokenize import IGNORED, Tokens, collate

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from whet.engine.passes import PackedPass

# Passes are padded up to a multiple of 1/32 of the longest where shapes should repeat (CUDA graphs): a
# full pass then carries 1.6% padding on average.
BUCKETS = 32


@dataclass(frozen=True, slots=True)
class Packing:
    """How a step becomes passes.

    Args:
        tokens_per_pass: Most tokens of one pass. An example that is longer gets a pass of its own.
        split: Cut examples where a pass is full; a piece then does not see what was before it.
        padded: Make rectangles of padded rows instead, for models that cannot take packed documents.
            Then `tokens_per_pass` bounds the rectangle.
        buckets: Pad a packed pass up to one of BUCKETS lengths, so that shapes repeat.
    """

    tokens_per_pass: int
    split: bool = False
    padded: bool = False
    buckets: bool = False

    def passes(self, rows: Sequence[Tokens]) -> list[list[Tokens]]:
        """Cut the examples of one step into passes."""
        if self.split and not self.padded:
            return list(_split(rows, self.tokens_per_pass))
        cut = _rectangles if self.padded else best_fit
        lengths = [len(tokens.input_ids) for tokens in rows]
        return [[rows[i] for i in group] for group in cut(lengths, self.tokens_per_pass)]

    def batch(self, rows: Sequence[Tokens], pad_token_id: int) -> dict[str, torch.Tensor]:
        """Make the tensors of one pass.

        Args:
            rows: Its examples.
            pad_token_id: What padding is written as.

        Returns:
            Packed: `input_ids`, `position_ids` (they restart with each example) and `labels`, int64,
            (1, T). Padded: `input_ids`, `attention_mask` and `labels`, (B, longest).
        """
        if self.padded:
            return collate(rows, pad_token_id)
        num = sum(len(tokens.input_ids) for tokens in rows)
        return packed_batch(rows, pad_token_id, self.length_of(num) - num)

    def packed_pass(self, rows: Sequence[Tokens], pad_token_id: int, rounded: bool) -> PackedPass:
        """Describe a packed pass for the engine, on the host.

        Args:
            rows: Its examples.
            pad_token_id: What padding is written as.
            rounded: Also round up its documents and labelled rows.
        """
        from whet.engine.passes import pack_pass

        num = sum(len(tokens.input_ids) for tokens in rows)
        documents = [(tokens.input_ids, tokens.labels) for tokens in rows]
        made = pack_pass(documents, pad_token_id, self.length_of(num) - num)
        return made.rounded() if rounded else made

    def length_of(self, num_tokens: int) -> int:
        """Return the length that a packed pass of so many tokens is padded to."""
        if not self.buckets or num_tokens > self.tokens_per_pass:
            return num_tokens
        step = -(-self.tokens_per_pass // BUCKETS)
        return min(self.tokens_per_pass, -(-num_tokens // step) * step)

    def num_entered(self, rows: Sequence[Tokens]) -> int:
        """Count the tokens that a pass of these examples puts into the model, padding included."""
        lengths = [len(tokens.input_ids) for tokens in rows]
        return len(rows) * max(lengths) if self.padded else self.length_of(sum(lengths))


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into as few bins as best-fit decreasing finds.

    Args:
        lengths: Size of each item.
        capacity: Most of one bin; a larger item gets a bin of its own.

    Returns:
        The items' numbers, bin by bin; each bin in rising order.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(rooms, (lengths[item], -1))
        if place == len(rooms):
            bins.append([item])
            insort(rooms, (capacity - lengths[item], len(bins) - 1))
            continue
        room, chosen = rooms.pop(place)
        bins[chosen].append(item)
        insort(rooms, (room - lengths[item], chosen))
    return [sorted(items) for items in bins]


def _rectangles(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Group items of like length so that items times the longest stays within the capacity."""
    groups: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * lengths[item] <= capacity:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def _split(rows: Sequence[Tokens], capacity: int) -> Iterator[list[Tokens]]:
    """Fill passes to the brim, cutting examples.

    A piece starts with the last token of the piece before it, unlabelled, so that no label is lost.
    """
    group: list[Tokens] = []
    room = capacity
    for tokens in rows:
        start, size = 0, len(tokens.input_ids)
        while start < size:
            if room < 2 and group:  # a piece of one token has nothing to learn
                yield group
                group, room = [], capacity
            stop = min(size, start + max(2, room))
            piece = replace(
                tokens,
                input_ids=tokens.input_ids[start:stop],
                labels=tokens.labels[start:stop],
            )
            group.append(piece)
            room -= stop - start
            start = size if stop == size else stop - 1
    if group:
        yield group


def packed_batch(
    rows: Sequence[Tokens], pad_token_id: int = 0, num_padding: int = 0
) -> dict[str, torch.Tensor]:
    """Lay examples side by side in one row.

    Args:
        rows: The examples.
        pad_token_id: What padding is written as.
        num_padding: Tokens of padding, which stand behind as an unlabelled document of their own.

    Returns:
        `input_ids`, `position_ids` and `labels`, int64, (1, T).
    """
    import torch

    ids = [i for tokens in rows for i in tokens.input_ids] + [pad_token_id] * num_padding
    # Nothing stands before the first token to predict it from, see `collate`.
    labels = [label for tokens in rows for label in (IGNORED, *tokens.labels[1:])]
    lengths = [len(tokens.input_ids) for tokens in rows] + [num_padding]
    positions = [position for length in lengths for position in range(length)]
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "labels": torch.tensor([labels + [IGNORED] * num_padding]),
    }


class StepSampler:
    """A seeded permutation for each epoch, cut into optimizer steps.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of one step; not used with `batch_tokens`.
        batch_tokens: Tokens of one step, on average: as many steps as the epoch's tokens make at that
            size, each taking rows until its share of them is reached.
        seed: Seed of the run; None keeps the rows in their order.
        shares: Processes that divide each step among them; the steps are the same for any number.
        share: Which part of a step comes out here. It may be empty.
    """

    def __init__(
        self,
        lengths: Sequence[int] | NDArray[np.int32],
        batch_size: int,
        seed: int | None,
        batch_tokens: int | None = None,
        shares: int = 1,
        share: int = 0,
    ) -> None:
        self.lengths = np.asarray(lengths, np.int64)
        self.shares, self.share = shares, share
        self.batch_size, self.seed = batch_size, seed
        self.batch_tokens = batch_tokens
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation; accelerate calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        if self.batch_tokens is None:
            return -(-len(self.lengths) // self.batch_size)
        return min(len(self.lengths), -(-int(self.lengths.sum()) // self.batch_tokens))

    def position(self, step: int) -> dict[str, int | str]:
        """Return where a run stands after so many steps: what its next step is, and of which order."""
        epoch, within = divmod(step, len(self))
        order = hashlib.sha256(self._order(epoch).astype("<i8").tobytes()).hexdigest()
        return {"epoch": epoch, "step": within, "order_sha256": order}

    def _order(self, epoch: int) -> NDArray[np.int64]:
        import torch

        if self.seed is None:
            return np.arange(len(self.lengths))
        # Seeds of neighbouring runs and epochs must not meet: seed 1, epoch 1 is not seed 2, epoch 0.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.lengths), generator=generator).numpy()

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.steps():
            if self.shares == 1:
                yield rows
                continue
            part = fair_shares(self.lengths[rows].tolist(), self.shares)[self.share]
            yield [rows[i] for i in part]

    def steps(self) -> Iterator[list[int]]:
        """Return the rows of each step of the epoch, over all processes."""
        order = self._order(self.epoch)
        if self.batch_tokens is None:
            for start in range(0, len(order), self.batch_size):
                yield order[start : start + self.batch_size].tolist()
            return
        total, seen, start, num = int(self.lengths.sum()), 0, 0, len(self)
        for step in range(num):
            stop = start
            last = len(order) - (num - 1 - step)  # each later step needs a row too
            while stop < last and (stop == start or seen * num < total * (step + 1)):
                seen += int(self.lengths[order[stop]])
                stop += 1
            yield order[start:stop].tolist()
            start = stop


def fair_shares(costs: Sequence[int], num: int) -> list[list[int]]:
    """Divide items so that the largest share is small: the costliest item first, to whoever has least.

    Longest processing time first (Graham 1969): within 4/3 of the best. The same for everyone who asks.

    Args:
        costs: Cost of each item, such as its tokens.
        num: Shares.

    Returns:
        The items' numbers, share by share, each in rising order; a share may be empty.
    """
    loads = [(0, share) for share in range(num)]
    shares: list[list[int]] = [[] for _ in range(num)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, share = heapq.heappop(loads)
        shares[share].append(item)
        heapq.heappush(loads, (load + costs[item], share))
    return [sorted(items) for items in shares]


def efficiency(packing: Packing, steps: Sequence[Sequence[Tokens]]) -> float:
    """Return the share of real tokens among those that enter the model.

    Args:
        packing: How steps become passes.
        steps: The examples of each step.
    """
    passes = [group for rows in steps for group in packing.passes(rows)]
    real = sum(len(tokens.input_ids) for group in passes for tokens in group)
    return real / sum(packing.num_entered(group) for group in passes)
