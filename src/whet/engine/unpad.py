"""Packed tokens: what a padded batch becomes at the decoder's entry, and how it is padded again.

A batch of rows, padded left or right, or rows of several documents marked by position ids that
restart, becomes one sequence of T real tokens and the places where documents begin.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch


@dataclass(frozen=True, slots=True)
class Packed:
    """Documents side by side in one sequence of T tokens.

    Args:
        lengths: Tokens of each document; they sum to T, or to E.
        cu_seqlens: int32 (documents + 1) on the device, the place where each begins, and T.
        positions_T: int64 position ids.
        index_T: Place of each token in the flat (B * L) batch it came from; None: all are there.
        batch_shape: (B, L) of that batch.
        longest_bound: What kernels are told of the longest document where it is more, so that
            their shapes repeat.
        expand_E: Of documents that share their first tokens, which are there once: the place of each
            document's token, document by document (`lengths` sums to E). None: nothing is shared.
        own_T: The first place in E of each of the T tokens.
    """

    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor
    positions_T: torch.Tensor
    index_T: torch.Tensor | None
    batch_shape: tuple[int, int]
    longest_bound: int = 0
    expand_E: torch.Tensor | None = None
    own_T: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.positions_T.shape[0]

    @property
    def longest(self) -> int:
        """Tokens of the longest document, or a bound of it."""
        return max(self.longest_bound, *self.lengths, 0)

    def expand(self, values_T: torch.Tensor) -> torch.Tensor:
        """Lay whole documents side by side: (E, ...). Shared tokens are there for each of them."""
        return values_T if self.expand_E is None else values_T.index_select(0, self.expand_E)

    def contract(self, values_E: torch.Tensor) -> torch.Tensor:
        """Take each token once out of whole documents: (T, ...)."""
        return values_E if self.own_T is None else values_E.index_select(0, self.own_T)

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """Take the real tokens of a (B, L, ...) tensor: (T, ...)."""
        flat = values.reshape(-1, *values.shape[2:])
        return flat if self.index_T is None else flat.index_select(0, self.index_T)

    def pad(self, values_T: torch.Tensor) -> torch.Tensor:
        """Put packed (T, ...) values back: (B, L, ...), zeros where padding was."""
        if self.index_T is not None:
            size = self.batch_shape[0] * self.batch_shape[1]
            padded = values_T.new_zeros(size, *values_T.shape[1:])
            values_T = padded.index_copy(0, self.index_T, values_T)
        return values_T.reshape(*self.batch_shape, *values_T.shape[1:])


def from_lengths(lengths: list[int], device: torch.device | str = "cpu") -> Packed:
    """Describe documents of the given lengths that lie side by side, in one row.

    Args:
        lengths: Tokens of each document.
        device: Where the tensors go.
    """
    total = sum(lengths)
    positions = torch.cat([torch.arange(n) for n in lengths]) if lengths else torch.arange(0)
    return Packed(
        tuple(lengths),
        _starts(lengths, torch.device(device)),
        positions.to(device),
        None,
        (1, total),
    )


def _starts(lengths: list[int] | tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def pack_batch(
    batch_shape: tuple[int, int],
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    device: torch.device,
) -> Packed | None:
    """Find the real tokens and the documents of a batch.

    Args:
        batch_shape: (B, L).
        attention_mask: (B, L), 1 for real tokens; None when all are.
        position_ids: (B or 1, L); where a row's ids do not go up by one, a new document begins. None
            counts each row from 0, padding included, as transformers' models do.
        cu_seqlens: Document boundaries that the caller already knows, in the flat batch.
        device: Where the tokens are.

    Returns:
        None when the mask has holes, which no packed form keeps.
    """
    rows, width = batch_shape
    mask = torch.ones(batch_shape, dtype=torch.bool)
    if attention_mask is not None:
        mask = attention_mask.to("cpu", torch.bool)
        edges = mask.int().diff(dim=1).abs().sum(1) + mask[:, 0].int() + mask[:, -1].int()
        if (edges > 2).any():
            return None
    positions = torch.arange(width).expand(batch_shape)
    if position_ids is not None:
        positions = position_ids.to("cpu").expand(batch_shape)
    index = mask.reshape(-1).nonzero()[:, 0]
    packed_positions = positions.reshape(-1)[index]
    if cu_seqlens is not None and len(index) == rows * width:
        lengths = [length for length in cu_seqlens.flatten().diff().tolist() if length]
    else:
        row = index // width
        begins = (row.diff() != 0) | (packed_positions.diff() != 1)
        cuts = [0, *(begins.nonzero()[:, 0] + 1).tolist(), len(index)]
        lengths = [b - a for a, b in zip(cuts, cuts[1:], strict=False) if b > a]
    whole = len(index) == rows * width
    return Packed(
        tuple(lengths),
        _starts(lengths, device),
        packed_positions.to(device),
        None if whole else index.to(device),
        (rows, width),
    )
