"""A frozen (V, D) weight in 8 bit or in host memory, read in rows and in tiles, and products with it.

The dense weight never exists as a whole: embeddings ask for rows, the head for tiles.

Shapes: N rows, C rows of a chunk, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from whet.engine.memory import workspace
from whet.engine.offload import CopyStream, Flight
from whet.kernels.lora import sum_product

Tile = tuple[slice, torch.Tensor]

# Rows of the vocabulary whose weights exist densely at once: 64 MB of them at width 4096 in bfloat16. A
# product with fewer columns would not fill a large GPU.
TILE_ROWS = 8192


def _parts(num_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, TILE_ROWS):
        yield slice(start, min(num_rows, start + TILE_ROWS))


def quantise_rows(weight_VD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row to int8: w = q s, s = max|w| / 127, q rounded half to even.

    Args:
        weight_VD: Any floating point type.

    Returns:
        q (V, D) in int8 and s (V) in float32.
    """
    rows_VD = torch.empty_like(weight_VD, dtype=torch.int8, memory_format=torch.contiguous_format)
    scale_V = weight_VD.new_empty(len(weight_VD), dtype=torch.float32)
    # A tensor, for CUDA divides by a number through its rounded reciprocal, and gives other scales.
    most = weight_VD.new_full((), 127, dtype=torch.float32)
    for part in _parts(len(weight_VD)):
        block = weight_VD[part].detach().float()
        scale = torch.div(block.abs().amax(1), most, out=scale_V[part])
        rows_VD[part] = (block / scale.masked_fill(scale == 0, 1)[:, None]).round_()
    return rows_VD, scale_V


class EightBitWeight(nn.Module):
    """A weight of embeddings or head as int8 and a scale a row, on the device.

    Args:
        weight_VD: The dense weight. Its dtype is the one the values are rounded to, wherever they are
            used, so that every program, the truth in float64 too, computes with the same values.
    """

    def __init__(self, weight_VD: torch.Tensor) -> None:
        super().__init__()
        rows_VD, scale_V = quantise_rows(weight_VD)
        self.dtype, self.shape = weight_VD.dtype, weight_VD.shape
        # Parameters, for DDP sends buffers around at every step. Scales as int32, for
        # `model.to(torch.bfloat16)` would round a parameter of float32.
        self.rows_VD = nn.Parameter(rows_VD, requires_grad=False)
        self.scale_bits_V = nn.Parameter(scale_V.view(torch.int32), requires_grad=False)

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored weight."""
        return self.rows_VD.nbytes + self.scale_bits_V.nbytes

    def storage_pointer(self) -> int:
        """Return what two modules with one weight have in common."""
        return self.rows_VD.data_ptr()

    def detach(self) -> EightBitWeight:
        """Return the weight itself: it is never part of a graph."""
        return self

    def look_up(self, ids: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return the rows of some ids, (*ids.shape, D) in a dtype."""
        ids = ids.to(device)
        scale = functional.embedding(ids, self.scale_bits_V[:, None]).view(torch.float32)
        return (functional.embedding(ids, self.rows_VD) * scale).to(self.dtype).to(dtype)

    def tiles(self, dtype: torch.dtype, device: torch.device) -> Iterator[Tile]:
        """Yield slices of V and their dense rows; each tile is overwritten by the next.

        Args:
            dtype: Type of the tiles.
            device: Where the module is.
        """
        shape = (min(TILE_ROWS, self.shape[0]), self.shape[1])
        buffer = workspace("head.tile", shape, dtype, device)
        scale_V = self.scale_bits_V.view(torch.float32)
        for part in _parts(self.shape[0]):
            tile, rows, scale = buffer[: part.stop - part.start], self.rows_VD[part], scale_V[part]
            if dtype == self.dtype:
                torch.mul(rows, scale[:, None], out=tile)
            else:
                tile.copy_((rows * scale[:, None]).to(self.dtype))
            yield part, tile


class HostWeight:
    """A weight of embeddings or head in host memory, pinned where there is a GPU.

    It is no part of a module's state: `.to(device)`, a cast and DDP must leave it as it is and where.

    Args:
        weight_VD: The dense weight. One that is in host memory already is not copied.
    """

    def __init__(self, weight_VD: torch.Tensor) -> None:
        weight_VD = weight_VD.detach()
        if torch.cuda.is_available():
            pinned = torch.empty(weight_VD.shape, dtype=weight_VD.dtype, pin_memory=True)
            weight_VD = pinned.copy_(weight_VD)
        self.weight_VD, self.dtype, self.shape = weight_VD, weight_VD.dtype, weight_VD.shape

    def __deepcopy__(self, memo: dict[int, Any]) -> HostWeight:
        """Share the weight with copies of the model: nobody writes it, and a copy is not pinned."""
        return self

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored weight."""
        return self.weight_VD.nbytes

    def storage_pointer(self) -> int:
        """Return what two modules with one weight have in common."""
        return self.weight_VD.data_ptr()

    def detach(self) -> HostWeight:
        """Return the weight itself: it is never part of a graph."""
        return self

    def look_up(self, ids: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return the rows of some ids, (*ids.shape, D) in a dtype; each row travels once."""
        host = self.weight_VD
        if device == host.device:
            return functional.embedding(ids.to(device), host).to(dtype)
        distinct, place = ids.cpu().unique(return_inverse=True)
        rows = torch.empty(
            (len(distinct), self.shape[1]), dtype=self.dtype, pin_memory=host.is_pinned()
        )
        torch.index_select(host, 0, distinct, out=rows)
        return functional.embedding(place.to(device), rows.to(device, non_blocking=True)).to(dtype)

    def tiles(self, dtype: torch.dtype, device: torch.device) -> Iterator[Tile]:
        """Yield slices of V and their dense rows; each tile is overwritten by the next but one.

        Where the weight can be used as it lies it is one tile, and the numbers are those of a dense head.

        Args:
            dtype: Type of the tiles.
            device: Where they are needed.
        """
        host = self.weight_VD
        if device == host.device and dtype == self.dtype:
            yield slice(0, len(host)), host
        elif device.type == "cuda":
            for part, tile in self._stream(device):
                yield part, tile.to(dtype)
        else:
            shape = (min(TILE_ROWS, len(host)), self.shape[1])
            buffer = workspace("head.tile", shape, dtype, device)
            for part in _parts(len(host)):
                yield part, buffer[: part.stop - part.start].copy_(host[part])

    def _stream(self, device: torch.device) -> Iterator[Tile]:
        """Copy tile after tile to a GPU, each while the one before it is used."""
        copies = _copy_stream(device)
        parts = list(_parts(self.shape[0]))
        ahead: Flight | None = copies.bring(self.weight_VD[parts[0]])
        try:
            for part, following in zip(parts, [*parts[1:], None], strict=True):
                assert ahead is not None
                tile = copies.land(ahead)
                # Starts behind the product with the tile before, and runs beside the one with this.
                ahead = copies.bring(self.weight_VD[following]) if following else None
                yield part, tile
        finally:
            if ahead is not None:  # after an error: memory that is being written to stays taken
                copies.let_go(ahead)


_copy_streams: dict[torch.device, CopyStream] = {}


def _copy_stream(device: torch.device) -> CopyStream:
    # A stream of its own: behind saved tensors on their way to the host, a tile would come late.
    if device not in _copy_streams:
        _copy_streams[device] = CopyStream(device)
    return _copy_streams[device]


HeldWeight = EightBitWeight | HostWeight


def multiply(hidden_CD: torch.Tensor, tiles: Iterable[Tile], out_CV: torch.Tensor) -> torch.Tensor:
    """Write hidden W^T, tile by tile; the product of a weight in one tile is the plain product.

    Args:
        hidden_CD: In the dtype of the tiles.
        tiles: Slices of V with their rows of W.
        out_CV: Where to write.
    """
    for part, tile_VD in tiles:
        torch.mm(hidden_CD, tile_VD.t(), out=out_CV[:, part])
    return out_CV


def multiply_back(
    dlogits_CV: torch.Tensor, tiles: Iterable[Tile], out_CD: torch.Tensor
) -> torch.Tensor:
    """Write dlogits W, summed over tiles in float32 at least and rounded once.

    Args:
        dlogits_CV: Gradient of the logits.
        tiles: Slices of V with their rows of W.
        out_CD: Where to write.
    """
    exact = torch.promote_types(out_CD.dtype, torch.float32)
    total_CD: torch.Tensor | None = None
    for part, tile_VD in tiles:
        if len(tile_VD) == dlogits_CV.shape[1]:
            return torch.mm(dlogits_CV, tile_VD, out=out_CD)
        if total_CD is None:
            total_CD = torch.zeros(out_CD.shape, dtype=exact, device=out_CD.device)
        if out_CD.dtype == exact:
            total_CD.addmm_(dlogits_CV[:, part], tile_VD)
        else:
            total_CD.add_(sum_product(dlogits_CV[:, part].t(), tile_VD))
    assert total_CD is not None
    return out_CD.copy_(total_CD)
