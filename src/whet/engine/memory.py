"""What a layer function keeps between forward and backward, and the buffers it works in.

Each tensor a half saves has a policy: keep it, offload it to host memory (on the CPU: to a scratch
file; see `offload.py`), or recompute it in the backward pass. Attention's output and everything behind a
projection back to the model's width is never recomputed: it would cost what it saves.
"""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import torch

from whet.engine.offload import Offloaded

Keep = Literal["keep", "offload"]
KeepOrRecompute = Literal["keep", "offload", "recompute"]


@dataclass(frozen=True, slots=True)
class Policy:
    """Where the saved tensors of one layer stay until its backward pass.

    Args:
        hidden: The inputs of both halves, T x D each.
        qkv: Queries, keys and values, T x (H + 2G)K; recomputing costs the three projections.
        attention: Attention's output (T x HK) and log-sum-exp, and what a norm behind a projection needs.
        gate_up: The inputs of the activation, T x 2F; recomputing costs gate and up projections.
    """

    hidden: Keep = "keep"
    qkv: KeepOrRecompute = "keep"
    attention: Keep = "keep"
    gate_up: KeepOrRecompute = "keep"


# Halves whose tensors are on their way back while another's are in use. One keeps the copy engine
# busy for as long as that half computes; each more would hold one more half's tensors on the device.
PREFETCH_HALVES = 1

# Of each device, whose tensors were offloaded last.
_last: dict[torch.device, weakref.ref[SavedTensors]] = {}


class SavedTensors:
    """The tensors one call of a half saves, put away and brought back by policy.

    Those kept go through `save_for_backward`, so that torch's own hooks on saved tensors see them.
    Those offloaded come back in reverse order: while one half uses its own, those of the half that
    offloaded before it are on their way. A call on one device is made by one thread at a time.
    `sizes` tells the bytes of each.
    """

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []
        self._slots: dict[str, int | Offloaded] = {}
        self._before: weakref.ref[SavedTensors] | None = None
        self._device: torch.device | None = None
        self.sizes: dict[str, int] = {}

    def put(self, name: str, tensor: torch.Tensor | None, policy: KeepOrRecompute) -> None:
        """Save a tensor under a name; None and `recompute` save nothing."""
        if tensor is None or policy == "recompute":
            return
        self._device = tensor.device
        self.sizes[name] = tensor.numel() * tensor.element_size()
        if policy == "offload":
            self._slots[name] = Offloaded(tensor)
        else:
            self._slots[name] = len(self._kept)
            self._kept.append(tensor)

    def close(self, ctx: torch.autograd.function.FunctionCtx) -> None:
        """Hand the kept tensors to autograd; call once, at the end of the forward pass."""
        ctx.save_for_backward(*self._kept)
        self._kept = []
        if self._device is None:
            return
        # The copies that the half before started had this half's work to hide behind. Those of the
        # last half of all are never waited for: it is the first to need them, still on the device.
        self._before = _last.get(self._device)
        before = self._before and self._before()
        for away in before.offloaded if before else ():
            away.leave()
        if self.offloaded:
            _last[self._device] = weakref.ref(self)

    def open(self, ctx: torch.autograd.function.FunctionCtx) -> dict[str, torch.Tensor]:
        """Bring every saved tensor back, by name.

        Offloaded ones belong to the caller afterwards, unless the graph is retained.
        """
        kept = ctx.saved_tensors  # type: ignore[attr-defined]  # raises if the graph was freed
        tensors = {
            name: kept[slot] if isinstance(slot, int) else slot.fetch()
            for name, slot in self._slots.items()
        }
        before = self
        for _ in range(PREFETCH_HALVES if self.offloaded else 0):
            before = before._before and before._before()
            if before is None:
                break
            for away in before.offloaded:
                away.start()
        # Autograd frees what it saved itself behind this call, but not what hangs on ctx, which lives
        # as long as the loss does. There is no public way to ask whether the graph is retained;
        # torch's own compiled backward asks in this one.
        if not torch._C._autograd._get_current_graph_task_keep_graph():  # type: ignore[attr-defined]
            self._slots = {n: slot for n, slot in self._slots.items() if isinstance(slot, int)}
        return tensors

    @property
    def offloaded(self) -> list[Offloaded]:
        """The tensors that wait on the host."""
        return [slot for slot in self._slots.values() if isinstance(slot, Offloaded)]


_workspaces = threading.local()


def workspace(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return a buffer that is overwritten by the next caller of the same name.

    On the CPU a fresh allocation of this size costs more than a pass over it: its pages are mapped and
    zeroed one by one (EPYC Zen 5: 28 GB/s into fresh pages, 130 GB/s into a buffer used before). On CUDA
    torch's own allocator reuses memory, and in stream order; there this is a plain allocation. In a plan
    it is as on the device that is planned for (`planned_workspaces`).

    Args:
        name: Role of the buffer inside one half.
        shape: Its shape.
        dtype: Its type.
        device: Its device.
    """
    planned = _planned.get()
    buffers = _workspaces.__dict__ if planned is None else planned
    if device.type != "cpu" or buffers is ALLOCATE:
        return torch.empty(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    buffer = buffers.get(name)
    if buffer is None or buffer.numel() < num_bytes:
        buffer = buffers[name] = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    return buffer[:num_bytes].view(dtype).view(shape)


def release_workspaces() -> None:
    """Free this thread's buffers."""
    _workspaces.__dict__.clear()


ALLOCATE: dict[str, torch.Tensor] = {}  # stands for "no buffer is kept"
_planned: ContextVar[dict[str, torch.Tensor] | None] = ContextVar("planned", default=None)


def is_planning() -> bool:
    """Tell whether a plan runs the engine on shapes, inside `planned_workspaces`."""
    return _planned.get() is not None


@contextlib.contextmanager
def planned_workspaces(device: str) -> Iterator[dict[str, torch.Tensor]]:
    """Have buffers live as they would on another device, and none of this thread's be touched.

    Args:
        device: `cpu` keeps them for the next caller; `cuda` gives each caller a new one.

    Yields:
        Those that are kept, by name.
    """
    buffers: dict[str, torch.Tensor] = {} if device == "cpu" else ALLOCATE
    token = _planned.set(buffers)
    try:
        yield buffers
    finally:
        _planned.reset(token)
