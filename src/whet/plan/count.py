"""Count the memory of tensors as they are made and let go, on any device, the meta device too.

The CPU has no allocator to ask for a peak, and resident memory has too much in it (libraries, pages that
are not given back). Here every operator's new storages are seen, and a weak reference tells when they go.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationCounter(TorchDispatchMode):
    """Counts the bytes of storages made inside the body: `now` alive, and `peak`.

    Storages that were there before count nothing, and neither do memory-mapped files. What operators
    use inside themselves is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # half of all calls on fake tensors
            return func(*args, **kwargs)
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf, counted=False)
        out = func(*args, **kwargs)
        mapped = func is torch.ops.aten.from_file.default
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf, counted=not mapped)
        return out

    def _note(self, tensor: torch.Tensor, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        num_bytes = storage.nbytes() if counted else 0
        if key in self._known:
            grown = num_bytes - self._known[key] if self._known[key] else 0
            if grown <= 0:
                return
            self._known[key] += grown  # resized by an operator with `out=`
            self.now += grown
        else:
            self._known[key] = num_bytes
            self.now += num_bytes
            weakref.finalize(storage, self._forget, key).atexit = False
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


def saved_bytes(model: nn.Module, pass_forward: Callable[[], Any]) -> int:
    """Return the bytes that autograd holds between a forward pass and its backward, each storage once.

    Args:
        model: Its parameters and buffers, which are there anyway, do not count.
        pass_forward: Runs the forward pass and returns what keeps its graph alive.
    """
    ignored = storages_of(model)
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in ignored:
            held[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = pass_forward()
    del alive
    return sum(held.values())


def storages_of(model: nn.Module) -> set[int]:
    """Return the addresses of the storages of a model's parameters, buffers and quantisation states."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [scales for tensor in tensors for _, _, scales in quantisation_tensors(tensor)]
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def quantisation_tensors(parameter: torch.Tensor) -> list[tuple[Any, str, torch.Tensor]]:
    """Return the tensors bitsandbytes keeps beside a 4-bit weight, each as (holder, name, tensor)."""
    state = getattr(parameter, "quant_state", None)
    return [
        (holder, name, getattr(holder, name))
        for holder in (state, getattr(state, "state2", None))
        for name in ("absmax", "code", "offset")
        if isinstance(getattr(holder, name, None), torch.Tensor)
    ]
