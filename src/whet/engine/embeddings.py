"""Frozen embeddings and the frozen head in 8 bit, or in host memory.

For a small card they are a large part of a model (Llama 3 8B: two of 1 GB each in bfloat16).

`cpu` keeps the weight in host memory: the rows a batch needs, and tiles of the head, travel to the
device when they are used, and the values stay what they were. The head crosses the bus twice for each
`engine.head_rows` labelled rows, and reading ids on the host keeps a pass out of CUDA graphs.

`8bit` keeps it on the device as int8 with one float32 scale a row (symmetric absmax, as the rows of arXiv
2208.07339), which changes the arithmetic: the mean loss of SmolLM2-135M in float32 goes from 3.6705 to
3.6719 on 2,363 tokens of C4, and from 1.7922 to 1.7921 on 1,590 tokens of Alpaca.

Tied embeddings stay one storage. Trained ones are refused: neither kind takes an update. A model so held
is saved as an adapter, never whole.

Shapes: N rows, C rows of a chunk, D model width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

from whet.engine.held import EightBitWeight, HeldWeight, HostWeight, multiply_back
from whet.engine.projection import Unsupported, check_own_forward
from whet.errors import InputError

Where = Literal["device", "cpu", "8bit"]


class LazyWeight(torch.Tensor):
    """What a held module shows as its `weight`: shape, dtype and device at once, numbers when used.

    Code that asks only for those (transformers' and peft's, `parity.observe`) costs nothing; code that
    computes with it (trl's own head) gets a dense weight made for that call, and right numbers.
    """

    held: HeldWeight

    @staticmethod
    def __new__(cls: type[LazyWeight], held: HeldWeight, like: torch.Tensor) -> LazyWeight:
        """Show a held weight with the dtype and on the device of another tensor."""
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, dtype=like.dtype, device=like.device
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute with dense weights."""

        def dense(value: Any) -> Any:
            return value.dense() if isinstance(value, cls) else value

        return func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))

    def dense(self) -> torch.Tensor:
        """Make the weight."""
        made = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for part, tile in self.held.tiles(self.dtype, self.device):
            made[part] = tile
        return made

    def data_ptr(self) -> int:  # type: ignore[override]
        """Return the same for two modules with one weight (peft's question whether they are tied)."""
        return self.held.storage_pointer()


class _HeldProduct(torch.autograd.Function):
    """Logits of a held head, for calls outside of `head_loss`: the tiles are read again going back."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, bias_V: torch.Tensor | None, held: HeldWeight
    ) -> torch.Tensor:
        """Return hidden W^T + b."""
        ctx.held = held
        out_NV = hidden_ND.new_empty(len(hidden_ND), held.shape[0])
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for part, tile_VD in held.tiles(hidden_ND.dtype, hidden_ND.device):
                if bias_V is None:
                    torch.mm(hidden_ND, tile_VD.t(), out=out_NV[:, part])
                else:
                    bias = bias_V[part].to(hidden_ND.dtype)
                    torch.addmm(bias, hidden_ND, tile_VD.t(), out=out_NV[:, part])
        return out_NV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits_NV: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of hidden states and bias."""
        dhidden_ND = dbias_V = None
        if ctx.needs_input_grad[0]:
            out_ND = dlogits_NV.new_empty(len(dlogits_NV), ctx.held.shape[1])
            tiles = ctx.held.tiles(dlogits_NV.dtype, dlogits_NV.device)
            dhidden_ND = multiply_back(dlogits_NV, tiles, out_ND)
        if ctx.needs_input_grad[1]:
            dbias_V = dlogits_NV.sum(0)
        return dhidden_ND, dbias_V, None


class HeldModule(nn.Module):
    """What an embedding and a head have in common when their weight is held.

    Args:
        held: The weight.
        anchor: An empty parameter, which has dtype and device of the products and follows `.to`.
    """

    def __init__(self, held: HeldWeight, anchor: nn.Parameter) -> None:
        super().__init__()
        self.held, self.anchor = held, anchor

    @property
    def weight(self) -> LazyWeight:
        """The weight as a dense one, made when it is used."""
        return LazyWeight(self.held, self.anchor)

    def check_frozen(self) -> None:
        """Refuse to be trained, as peft's `modules_to_save` or `model.requires_grad_()` would have it."""
        if self.anchor.requires_grad:
            raise InputError(
                "embeddings and a head that are held in 8 bit or in host memory cannot be trained",
                fix="set plan.embeddings: device",
            )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Name the weight without storage: saving the whole model fails, not its loading later."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight


class HeldHead(HeldModule):
    """A frozen output projection whose weight is held.

    Args:
        original: The linear layer in whose place it stands; it keeps the bias.
        held: The weight.
    """

    def __init__(self, original: nn.Linear, held: HeldWeight) -> None:
        super().__init__(held, _anchor(original.weight))
        self.in_features, self.out_features = original.in_features, original.out_features
        self.bias = original.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits (..., V) of hidden states (..., D)."""
        self.check_frozen()
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        hidden_ND = hidden.reshape(-1, self.in_features)
        logits: torch.Tensor = _HeldProduct.apply(hidden_ND, self.bias, self.held)  # type: ignore[assignment]
        return logits.view(*hidden.shape[:-1], self.out_features)


class HeldEmbedding(HeldModule):
    """A frozen input embedding whose weight is held.

    What the original's class does besides looking up (Gemma 3's scale) its own forward does here too, on
    a small table of the rows that were looked up.

    Args:
        original: The embedding in whose place it stands.
        held: The weight.
    """

    def __init__(self, original: nn.Embedding, held: HeldWeight) -> None:
        super().__init__(held, _anchor(original.weight))
        self.num_embeddings, self.embedding_dim = original.num_embeddings, original.embedding_dim
        self.padding_idx = original.padding_idx
        # A copy of the original without its weight, for which the anchor is taken.
        self.shell: nn.Embedding = copy.deepcopy(original, {id(original.weight): self.anchor})
        self.shell.padding_idx = (
            None  # it matters to gradients only, and is no row of a small table
        )

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (..., D) of ids."""
        self.check_frozen()
        rows = self.held.look_up(input_ids, self.anchor.dtype, self.anchor.device)
        return around(self.shell, rows)


def around(shell: nn.Embedding, rows: torch.Tensor) -> torch.Tensor:
    """Do to rows (..., D) that were looked up what an embedding's forward does to them.

    Args:
        shell: The embedding, whatever its weight is.
        rows: They stand in for the weight.
    """
    if type(shell).forward is nn.Embedding.forward:
        return rows
    table_ND = rows.flatten(0, -2)
    place = torch.arange(len(table_ND), device=rows.device).view(rows.shape[:-1])
    return torch.func.functional_call(shell, {"weight": table_ND}, (place,))


def _anchor(weight_VD: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight_VD.detach().new_empty(0, weight_VD.shape[1]), requires_grad=False)


def place_embeddings(model: Any, where: Where) -> list[str]:
    """Hold a model's frozen input embeddings and head in 8 bit or in host memory, in place.

    Call it before the engine goes in, and best behind peft, when it is settled what is trained (peft's
    own words for an attempt to train 8 bit are hard to read). What it does cannot be undone.

    Args:
        model: A causal language model of transformers, or a peft model around one. Its embeddings and
            head are frozen already (`requires_grad` is False).
        where: `cpu`, in host memory; `8bit`, on the device, which changes the numbers a little;
            `device` leaves everything as it is.

    Returns:
        What was done, a line for each weight.

    Raises:
        InputError: The embeddings or the head are trained, or are of a kind that cannot be held.
    """
    from whet.engine.swap import base_of

    if where == "device":
        return []
    base = base_of(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    plain = isinstance(embedding, nn.Embedding) and embedding.max_norm is None
    _check("the input embeddings", embedding, where, plain)
    if head is not None:
        plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
        _check("the head", head, where, plain)
    make = EightBitWeight if where == "8bit" else HostWeight
    held = make(embedding.weight)
    made = HeldEmbedding(embedding, held)
    _check_alike(made, where)
    _replace_(base, embedding, made)
    if head is None:
        return [_said("input embeddings", embedding.weight, held)]
    if head.weight is embedding.weight:
        _replace_(base, head, HeldHead(head, held))
        return [_said("embeddings and head, which are one weight", head.weight, held)]
    lines = [_said("input embeddings", embedding.weight, held)]
    del embedding  # its dense weight is free while the head's is converted
    held = make(head.weight)
    _replace_(base, head, HeldHead(head, held))
    return [*lines, _said("head", head.weight, held)]


def _check(name: str, module: Any, where: Where, known: bool) -> None:
    """Raise when a module cannot be held."""
    if any(parameter.requires_grad for parameter in module.parameters()):
        raise InputError(
            f"plan.embeddings '{where}' is for frozen weights, and those of {name} are trained",
            fix="freeze them (requires_grad_(False)) or set plan.embeddings: device",
        )
    fix = "set plan.embeddings: device"
    kind = type(module).__name__
    if not known or not module.weight.is_floating_point():
        raise InputError(f"plan.embeddings '{where}' does not know how to hold {name}", kind, fix)
    try:
        check_own_forward(module)
    except Unsupported as reason:
        raise InputError(
            f"plan.embeddings '{where}' does not know how to hold {name}", str(reason), fix
        ) from reason


def _check_alike(made: HeldEmbedding, where: Where) -> None:
    """Raise when the original's class needs more than the rows of its ids, judged on a small table."""
    shell = copy.deepcopy(made.shell).cpu()
    table_ND = torch.linspace(-1, 1, 4 * made.embedding_dim).view(4, -1).to(shell.weight.dtype)
    ids = torch.tensor([[0, 3, 0]])
    try:
        whole = torch.func.functional_call(shell, {"weight": table_ND}, (ids,))
        alike = torch.equal(whole, around(shell, table_ND[ids]))
    except IndexError:
        alike = False
    if not alike:
        raise InputError(
            f"plan.embeddings '{where}' does not know what the input embeddings compute",
            type(shell).__name__,
            "set plan.embeddings: device",
        )


def _replace_(base: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module wherever another is."""
    new.train(old.training)
    for parent in list(base.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)


def _said(name: str, weight_VD: torch.Tensor, held: HeldWeight) -> str:
    before = weight_VD.nbytes / 2**20
    if isinstance(held, EightBitWeight):
        return f"{name}: 8 bit, {held.num_bytes / 2**20:,.1f} MiB instead of {before:,.1f} MiB"
    pinned = " (pinned)" if held.weight_VD.is_pinned() else ""
    return f"{name}: in host memory{pinned}, {before:,.1f} MiB"
