"""What one of several processes has of a model: each parameter, cut as a strategy cuts it.

Calculated from shapes. FSDP2 cuts a parameter by its first dimension (`fully_shard`, arXiv 2304.11277),
ZeRO a flat list of numbers (arXiv 1910.02054), tensor parallel along the dimension that transformers'
plan for the model names (arXiv 1909.08053). What each keeps besides is in `rank_static`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from math import prod
from typing import Any, Literal

import torch

from whet.engine.model import decoder_of
from whet.engine.swap import base_of, decoder_layers
from whet.plan.count import quantisation_tensors
from whet.plan.memory import Item, Static, Where, state_bytes
from whet.plan.shape import ShapedModel

Kind = Literal["ddp", "fsdp", "zero2", "zero3"]
# DeepSpeed's documented defaults, in numbers of the gradients' or weights' type: what is reduced at a
# time (`reduce_bucket_size`), and what may stay gathered (`stage3_max_live_parameters`).
ZERO_BUCKET = 5 * 10**8
ZERO_LIVE = 10**9


@dataclass(frozen=True, slots=True)
class Strategy:
    """How processes share the work.

    Args:
        kind: What replicas of the model do with what is trained: `ddp` keeps all of it in each, `fsdp` is
            FSDP2's full shard, `zero2` and `zero3` are DeepSpeed's.
        offload: What is cut waits in host memory.
        tensor: Processes that compute one replica together.
    """

    kind: Kind
    offload: bool = False
    tensor: int = 1

    def name(self, num_ranks: int) -> str:
        """Return what a person calls it, among so many ranks."""
        kind = self.kind + (" + offload" if self.offload else "")
        if self.tensor == 1:
            return kind
        return f"tp {self.tensor}" + (f" x {kind}" if self.tensor < num_ranks else "")

    def settings(self, num_ranks: int) -> dict[str, Any] | None:
        """Return the keys of the config that ask for it; None where whet can plan it and not run it."""
        if self.tensor > 1:
            return {"parallel.strategy": "tp"} if self.tensor == num_ranks else None
        found: dict[str, Any] = {"parallel.strategy": self.kind}
        if self.kind.startswith("zero"):
            found = {"parallel.strategy": "deepspeed", "parallel.zero_stage": int(self.kind[-1])}
        return {**found, "parallel.offload": True} if self.offload else found


@dataclass(frozen=True, slots=True)
class Piece:
    """One parameter.

    Args:
        shape: Whole.
        size: Bytes of one number.
        role: What it is.
        trained: Whether it has a gradient.
        scales: Bytes of 4-bit weights' scales.
        cut: Dimension that tensor parallel cuts; None: each process has all of it.
    """

    shape: tuple[int, ...]
    size: int
    role: Literal["weights", "quantised", "table", "adapters"]
    trained: bool
    scales: int = 0
    cut: int | None = None

    @property
    def num(self) -> int:
        """How many numbers it has."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of all of it."""
        return self.num * self.size + self.scales

    @property
    def sent_bytes(self) -> int:
        """Bytes that are put together from the processes: all but the scales of 4-bit weights."""
        return self.num * self.size

    def within(self, tensor: int) -> Piece:
        """Return what one of the processes that compute a replica together has of it."""
        return self if self.cut is None else self.rows_of(tensor, self.cut)

    def rows_of(self, num: int, dim: int = 0) -> Piece:
        """Return the largest of the pieces when a dimension is cut in so many."""
        if not self.shape:
            return self
        shape = list(self.shape)
        shape[dim] = -(-shape[dim] // num)
        return replace(self, shape=tuple(shape))

    def like(self) -> torch.Tensor:
        """Return a tensor of its shape and size, without memory."""
        dtype = {1: torch.uint8, 2: torch.bfloat16}.get(self.size, torch.float32)
        return torch.empty(self.shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Pieces:
    """The parameters of a model.

    Args:
        layers: Those of a decoder layer, and how many like it follow each other.
        outside: Embeddings, the head and the last norm; tied ones once.
        splits: Whether transformers has a tensor-parallel plan for the model.
        heads: Key and value heads, which tensor parallel shares out.
        width: Of the hidden states.
        size: Bytes of one number of a hidden state.
        vocabulary: Rows of the head.
    """

    layers: tuple[tuple[tuple[Piece, ...], int], ...]
    outside: tuple[Piece, ...]
    splits: bool
    heads: int
    width: int
    size: int
    vocabulary: int

    @property
    def num_layers(self) -> int:
        """How many decoder layers there are."""
        return sum(count for _, count in self.layers)

    def counted(self) -> Iterator[tuple[Piece, int]]:
        """Yield every parameter with how many there are like it."""
        for piece in self.outside:
            yield piece, 1
        for layer, count in self.layers:
            for piece in layer:
                yield piece, count

    def trained(self) -> Iterator[tuple[Piece, int]]:
        """Yield those that have a gradient."""
        return ((piece, count) for piece, count in self.counted() if piece.trained)

    @property
    def adapted(self) -> bool:
        """Whether adapters are all that is trained."""
        return all(piece.role == "adapters" for piece, _ in self.trained())

    @cached_property
    def num_parameters(self) -> int:
        """Numbers of the model without adapters; two 4-bit weights are a byte."""
        return sum(
            count * p.num * (2 if p.role == "quantised" else 1)
            for p, count in self.counted()
            if p.role != "adapters"
        )

    def within(self, tensor: int) -> Pieces:
        """Return what one of the processes that compute a replica together has."""
        if tensor == 1:
            return self
        return replace(
            self,
            layers=tuple((tuple(p.within(tensor) for p in layer), n) for layer, n in self.layers),
            outside=tuple(p.within(tensor) for p in self.outside),
        )

    def deepened(self, num_layers: int) -> Pieces:
        """Return the pieces of a model with more layers like the last one, or with fewer."""
        kept, left = [], num_layers
        for layer, count in self.layers:
            kept.append((layer, min(count, left)))
            left -= min(count, left)
        last, count = kept[-1]
        kept[-1] = (last, count + left)
        return replace(self, layers=tuple(pair for pair in kept if pair[1]))


def pieces_of(made: ShapedModel) -> Pieces:
    """List the parameters of a model in shapes, adapted and frozen."""
    base = base_of(made.model)
    plan = getattr(base, "tp_plan", None) or {}
    names = {id(module): name for name, module in base.named_modules()}
    tables = {
        id(module.weight)
        for module in (base.get_input_embeddings(), base.get_output_embeddings())
        if isinstance(getattr(module, "weight", None), torch.Tensor)
    }
    found: dict[int, Piece] = {}
    for module in made.model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            path = f"{names.get(id(module), '')}.{name}"
            piece = _piece(path, parameter, plan, id(parameter) in tables, made.halved)
            found.setdefault(id(parameter), piece)
    blocks = decoder_layers(decoder_of(base))
    layers = [tuple(found.pop(id(p)) for p in block.parameters()) for block in blocks]
    config = base.config.get_text_config()
    weight = base.get_input_embeddings().weight
    return Pieces(
        tuple((layer, sum(1 for _ in alike)) for layer, alike in groupby(layers)),
        tuple(found.values()), bool(plan),
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        config.hidden_size, weight.element_size() * (2 if made.halved else 1),
        base.get_output_embeddings().weight.shape[0],
    )  # fmt: skip


def _piece(
    path: str, parameter: torch.nn.Parameter, plan: dict[str, str], table: bool, halved: bool
) -> Piece:
    size, scales = parameter.element_size(), 0
    for *_, tensor in quantisation_tensors(parameter):
        scales += tensor.numel() * tensor.element_size()
    if halved and parameter.dtype is torch.bfloat16:
        size *= 2
    adapter = "lora_" in path
    role = "table" if table else "adapters" if adapter else "quantised" if scales else "weights"
    cut = _cut(path, plan)
    if parameter.ndim == 1 and cut == 1:
        cut = None  # a bias behind a sum over processes is added once, whole
    return Piece(tuple(parameter.shape), size, role, parameter.requires_grad, scales, cut)


def _cut(path: str, plan: dict[str, str]) -> int | None:
    """Return the dimension of a parameter that a tensor-parallel plan cuts.

    peft cuts B where the matrix is cut by its outputs, and A where it is cut by its inputs.
    """
    module = path.rpartition(".")[0]
    adapter = re.search(r"\.lora_([AB])\.", path)
    module = re.split(r"\.(?:base_layer|lora_\w+)\b", module)[0]
    style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", module), "")
    dim = {"colwise": 0, "rowwise": 1, "embedding_rowwise": 0}.get(style.split("_gather")[0])
    if adapter and dim is not None:
        return dim if {"A": 1, "B": 0}[adapter[1]] == dim else None
    return dim


@dataclass(frozen=True)
class RankStatic(Static):
    """What a rank has besides its passes.

    Args:
        placed: The items, each where it is.
    """

    placed: tuple[Item, ...] = ()

    @property
    def items(self) -> list[Item]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The items, empty ones left out."""
        return [item for item in self.placed if item.num_bytes]


@dataclass(frozen=True, slots=True)
class _Cut:
    """One rank's part of the pieces of a replica."""

    strategy: Strategy
    replicas: int

    def weight(self, piece: Piece) -> int:
        """Bytes of a parameter; the scales of 4-bit weights stay whole."""
        if self.strategy.kind in ("ddp", "zero2"):
            return piece.num_bytes
        if self.strategy.kind == "zero3":
            return piece.size * -(-piece.num // self.replicas)
        return piece.rows_of(self.replicas).num_bytes

    def trained(self, piece: Piece) -> Piece:
        """The part of a trained parameter that this rank steps."""
        if self.strategy.kind == "ddp":
            return piece
        if self.strategy.kind == "fsdp":
            return piece.rows_of(self.replicas)
        return replace(piece, shape=(-(-piece.num // self.replicas),))


def rank_static(
    pieces: Pieces, strategy: Strategy, replicas: int, optimizer: str,
    embeddings: str = "device", device: str = "cuda",
) -> RankStatic:  # fmt: skip
    """Count what a rank needs besides its passes.

    Args:
        pieces: The model's, whole.
        strategy: How it is shared.
        replicas: Processes among which a replica's part is shared again.
        optimizer: By its name in transformers.
        embeddings: As in `plan.embeddings`.
        device: What is planned for.
    """
    own, cut = pieces.within(strategy.tensor), _Cut(strategy, replicas)
    waits: Where = "host" if strategy.offload and device == "cuda" else "device"
    gathers = strategy.kind in ("fsdp", "zero3")
    weights_at: Where = waits if gathers else "device"
    states_at: Where = "host" if optimizer.startswith("paged") and device == "cuda" else waits
    tables_at: Where = "host" if embeddings == "cpu" and device == "cuda" else weights_at
    roles = ("weights", "quantised", "table", "adapters")
    sums, scales = dict.fromkeys(roles, 0), 0
    for piece, count in own.counted():
        eighth = piece.role == "table" and embeddings == "8bit"
        size = piece.num + 4 * piece.shape[0] if eighth else cut.weight(piece)
        apart = piece.scales if weights_at == "host" else 0
        sums[piece.role] += count * (size - apart)
        scales += count * apart
    parts = [(cut.trained(piece), count) for piece, count in own.trained()]
    in_backward = optimizer in ("lomo", "adalomo") or optimizer.endswith("_layerwise")
    largest = max((4 * part.num for part, _ in parts), default=0)
    gradients, on_the_way = _gradients(own, cut, parts)
    gradients = largest if in_backward else gradients
    zero = strategy.kind.startswith("zero")
    states = sum(n * _state_bytes(optimizer, part, zero) for part, n in parts)
    floats = sum(4 * n * part.num for part, n in parts)
    master = floats if zero else 0
    step = floats if device == "cuda" else 2 * largest
    gradients_at: Where = "device" if strategy.kind == "fsdp" and own.adapted else waits
    placed = (
        Item("weights", sums["weights"], weights_at),
        Item("quantised weights", sums["quantised"], weights_at),
        Item("scales", scales),
        Item("embeddings and head", sums["table"], tables_at),
        Item("adapters", sums["adapters"], weights_at),
        Item("gathered weights", _gathered(own, strategy, replicas)),
        Item("gradients", gradients, gradients_at),
        Item("gradients on their way", on_the_way),
        Item("master weights", master, waits),
        Item("optimizer states", states, states_at),
    )
    whole = {
        role: sum(n * p.num_bytes for p, n in own.counted() if p.role == role) for role in sums
    }
    return RankStatic(
        weights=whole["weights"], quantised=whole["quantised"], embeddings=sums["table"],
        embeddings_where=tables_at, adapters=sums["adapters"], gradients=gradients, states=states,
        states_where=states_at, step=0 if waits == "host" else step, placed=placed,
    )  # fmt: skip


def _state_bytes(optimizer: str, part: Piece, zero: bool) -> int:
    """Bytes of the optimizer's state; DeepSpeed steps its own float32 copy of the numbers."""
    return state_bytes(optimizer, replace(part, size=4).like() if zero else part.like())


def _sent(pieces: Sequence[Piece]) -> int:
    return sum(piece.sent_bytes for piece in pieces)


def _gathered(own: Pieces, strategy: Strategy, replicas: int) -> int:
    """Return the bytes that are whole for a while.

    FSDP2: the layer at work, the next one, and what is outside of the layers from the beginning to the
    end of a pass. ZeRO 3 lets go of a weight once so many numbers are there (`ZERO_LIVE`).
    """
    if strategy.kind not in ("fsdp", "zero3") or replicas == 1:
        return 0
    largest = max(_sent(layer) for layer, _ in own.layers)
    outside = _sent(own.outside)
    if strategy.kind == "fsdp":
        return min(2, own.num_layers) * largest + outside
    everything = sum(count * _sent(layer) for layer, count in own.layers) + outside
    return min(everything, max(ZERO_LIVE * own.size, 2 * largest))


def _gradients(own: Pieces, cut: _Cut, parts: list[tuple[Piece, int]]) -> tuple[int, int]:
    """Return the bytes of the gradients that stay, and of those that are being reduced.

    DDP copies them into buckets, all of them in the end. FSDP2 has a layer's whole gradients and the
    same once more in the order in which they are sent; an adapter's stay whole until a step's last pass.
    """
    kind, whole = cut.strategy.kind, sum(n * piece.num_bytes for piece, n in own.trained())
    kept = sum(n * part.num_bytes for part, n in parts)
    if cut.replicas == 1:
        return whole, 0
    if kind == "ddp":
        return whole, whole
    if kind in ("zero2", "zero3"):
        return kept, ZERO_BUCKET * max((piece.size for piece, _ in own.trained()), default=0)
    largest = max(sum(p.num_bytes for p in layer if p.trained) for layer, _ in own.layers)
    if own.adapted:
        return whole, largest
    return kept, 2 * largest + sum(p.num_bytes for p in own.outside if p.trained)
