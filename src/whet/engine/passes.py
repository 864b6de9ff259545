"""A training pass as the host describes it: packed documents, and which tokens are learned.

A batch in transformers' form is a dict of tensors, from which the model has to find documents and
labelled rows again: on CUDA it would copy masks to the host and wait for every kernel before them. The
trainer knows all that before it makes a tensor. It says so here, and the host runs ahead of the GPU
through the whole pass. A pass may also be rounded up, so that its shapes repeat (`graphs.py`).

Shapes: T packed tokens, N labelled rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from whet.engine.unpad import Packed
from whet.kernels.launch import ceil_div, power_of_2

IGNORED = -100  # a target that counts nothing
# Labelled rows are rounded up to a multiple of T / 8: at most eight shapes for each T, and on average
# T / 16 rows too many in the head.
ROW_STEPS = 8


@dataclass(frozen=True, slots=True)
class PackedPass:
    """Documents side by side, and the rows of them that are learned; made by `pack_pass`.

    Args:
        flat: int64; token ids (T), positions (T), labelled rows (N), their targets (N), and the places
            where documents begin, two int32 in one int64. One tensor, so that it is one copy to a GPU.
        lengths: Tokens of each document, padding as one of its own; empty ones at the end are rounding.
        num_rows: N. The rows beyond the labelled ones are row 0 with the target -100.
        num_labels: Labelled tokens.
        longest: Tokens of the longest document, or a bound of it.
        places: Of documents that share their first tokens: `expand_E` and `own_T` of Packed, int64, one
            behind the other. None: nothing is shared.
        num_shared: Tokens by which the documents are longer than T for it.
    """

    flat: torch.Tensor
    lengths: tuple[int, ...]
    num_rows: int
    num_labels: int
    longest: int
    places: torch.Tensor | None = None
    num_shared: int = 0

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.lengths) - self.num_shared

    @property
    def key(self) -> tuple[int, int, int, int]:
        """Everything that shapes depend on: T, documents, N, and the longest document."""
        return self.num_tokens, len(self.lengths), self.num_rows, self.longest

    @property
    def input_ids(self) -> torch.Tensor:
        """Token ids, (1, T)."""
        return self._parts()[0][None]

    @property
    def packed(self) -> Packed:
        """Where the documents are."""
        parts = self._parts()
        starts = parts[4].view(torch.int32)[: len(self.lengths) + 1]
        shape = (1, self.num_tokens)
        made = Packed(self.lengths, starts, parts[1], None, shape, longest_bound=self.longest)
        if self.places is None:
            return made
        expand_E, own_T = self.places.split((sum(self.lengths), self.num_tokens))
        return replace(made, expand_E=expand_E, own_T=own_T)

    @property
    def rows_N(self) -> torch.Tensor:  # noqa: N802 - a shape suffix
        """The rows that predict a labelled token."""
        return self._parts()[2]

    @property
    def target_N(self) -> torch.Tensor:  # noqa: N802 - a shape suffix
        """The token that each of them should predict."""
        return self._parts()[3]

    def _parts(self) -> Sequence[torch.Tensor]:
        num, rows = self.num_tokens, self.num_rows
        return self.flat.split((num, num, rows, rows, len(self.flat) - 2 * (num + rows)))

    def to(self, device: torch.device) -> PackedPass:
        """Move it to a device, in copies that nobody waits for."""

        def moved(values: torch.Tensor) -> torch.Tensor:
            if device.type != "cuda":
                return values.to(device)
            return values.pin_memory().to(device, non_blocking=True)

        places = None if self.places is None else moved(self.places)
        return replace(self, flat=moved(self.flat), places=places)

    def rounded(self) -> PackedPass:
        """Round up all that shapes depend on but T; for a pass on the host.

        The number of documents and the longest become powers of two, labelled rows a multiple of T / 8.
        Flash attention's kernels leave at once where a document is empty or a bound too high.
        """
        assert self.places is None, "documents that share tokens have no repeating shapes"
        num, (ids, positions, rows, target, _) = self.num_tokens, self._parts()
        step = ceil_div(num, ROW_STEPS)
        more = min(num, step * max(1, ceil_div(self.num_rows, step))) - self.num_rows
        lengths = [*self.lengths, *[0] * (power_of_2(len(self.lengths)) - len(self.lengths))]
        return PackedPass(
            torch.cat([
                ids, positions, rows, rows.new_zeros(more), target, target.new_full((more,), IGNORED),
                _starts(lengths),
            ]),
            tuple(lengths), self.num_rows + more, self.num_labels, min(num, power_of_2(self.longest)),
        )  # fmt: skip

    def as_batch(self) -> dict[str, torch.Tensor]:
        """Return it in transformers' form: `input_ids`, `position_ids` and `labels`, (1, T)."""
        assert self.places is None, "transformers' models cannot share tokens between documents"
        labels_T = torch.full_like(self._parts()[0], IGNORED)
        rows, target = (x[: self.num_labels] for x in (self.rows_N, self.target_N))
        return {
            "input_ids": self.input_ids,
            "position_ids": self.packed.positions_T[None],
            "labels": labels_T.index_copy(0, rows + 1, target)[None],
        }


def pack_pass(
    documents: Sequence[tuple[Sequence[int], Sequence[int]]],
    pad_token_id: int = 0,
    num_padding: int = 0,
) -> PackedPass:
    """Describe a pass over documents.

    Args:
        documents: Token ids and labels of each; a label is the token's own id, or -100. That of a first
            token counts nothing: there is nothing to predict it from.
        pad_token_id: What padding is written as.
        num_padding: Tokens of padding, which stand behind as an unlabelled document of their own.
    """
    lengths = [len(ids) for ids, _ in documents] + ([num_padding] if num_padding else [])
    ids = [i for ids, _ in documents for i in ids] + [pad_token_id] * num_padding
    targets = [label for _, labels in documents for label in (*labels[1:], IGNORED)]
    target_T = torch.tensor(targets, dtype=torch.int64)
    rows_N = (target_T != IGNORED).nonzero()[:, 0]
    flat = torch.cat([
        torch.tensor(ids, dtype=torch.int64), *(torch.arange(length) for length in lengths),
        rows_N, target_T[rows_N], _starts(lengths),
    ])  # fmt: skip
    num = len(rows_N)
    return PackedPass(flat, tuple(lengths), num, num, max(lengths))


def pack_shared(
    groups: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]],
    pad_token_id: int = 0,
    num_padding: int = 0,
) -> PackedPass:
    """Describe a pass over groups of documents that begin alike: two answers to one prompt.

    What all documents of a group begin with is there once, and each of them attends to it. Labelled rows
    come document by document, also where two of them are one row.

    Args:
        groups: The documents of each group, as in `pack_pass`.
        pad_token_id: What padding is written as.
        num_padding: Tokens of padding.
    """
    ids: list[int] = []
    positions: list[int] = []
    expand, own, rows, targets, lengths = [], [], [], [], []
    padding = [[([pad_token_id] * num_padding, [IGNORED] * num_padding)]] if num_padding else []
    for documents in [*groups, *padding]:
        begin, shared = len(ids), num_common([tokens for tokens, _ in documents])
        for number, (tokens, labels) in enumerate(documents):
            skip = shared if number else 0
            new = range(len(ids), len(ids) + len(tokens) - skip)
            own += range(len(expand) + skip, len(expand) + len(tokens))
            places = [*range(begin, begin + skip), *new]
            expand += places
            ids += tokens[skip:]
            positions += range(skip, len(tokens))
            lengths.append(len(tokens))
            learned = [i for i in range(1, len(tokens)) if labels[i] != IGNORED]
            rows += [places[i - 1] for i in learned]
            targets += [labels[i] for i in learned]
    flat = [torch.tensor(values, dtype=torch.int64) for values in (ids, positions, rows, targets)]
    num = len(rows)
    num_shared = sum(lengths) - len(ids)
    places = torch.tensor(expand + own, dtype=torch.int64) if num_shared else None
    return PackedPass(
        torch.cat([*flat, _starts(lengths)]), tuple(lengths), num, num, max(lengths), places, num_shared
    )  # fmt: skip


def num_common(documents: Sequence[Sequence[int]]) -> int:
    """Count the tokens that all documents begin with."""
    num = 0
    for tokens in zip(*documents, strict=False):
        if any(token != tokens[0] for token in tokens):
            break
        num += 1
    return num


def _starts(lengths: Sequence[int]) -> torch.Tensor:
    """Return where documents begin, and T, as int32 in the bytes of an int64 tensor."""
    starts = [0, *accumulate(lengths)]
    padding = [starts[-1]] * (len(starts) % 2)
    return torch.tensor(starts + padding, dtype=torch.int32).view(torch.int64)
