"""What a layer function keeps between forward and backward, and the buffers it works in.

Each tensor a half saves has a policy: keep it, offload it to host memory (on the CPU: to a scratch
file), or recompute it in the backward pass. Attention's output and everything behind a projection
back to the model's width is never recomputed: it would cost what it saves.
"""

from __future__ import annotations

import math
import tempfile
import threading
from dataclasses import dataclass
from typing import Literal

import torch

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


@dataclass(frozen=True, slots=True)
class Offloaded:
    """A tensor that waits in host memory or in a scratch file."""

    host: torch.Tensor
    device: torch.device
    ready: object | None

    def fetch(self) -> torch.Tensor:
        """Bring the tensor back to its device."""
        if self.device.type != "cuda":
            return self.host
        # The backward pass runs on the stream that waits here, behind the copy that wrote the host.
        torch.cuda.current_stream(self.device).wait_event(self.ready)  # type: ignore[arg-type]
        return self.host.to(self.device, non_blocking=True)


Saved = torch.Tensor | Offloaded | None


def offload(tensor: torch.Tensor) -> Offloaded:
    """Copy a tensor to pinned host memory, or from the CPU to a scratch file that has no name.

    Args:
        tensor: Any tensor; its strides are not kept.
    """
    if tensor.device.type != "cuda":
        if not tensor.numel():
            return Offloaded(tensor.clone(), tensor.device, None)
        with tempfile.NamedTemporaryFile(prefix="whet-") as file:
            num_bytes = tensor.numel() * tensor.element_size()
            file.truncate(num_bytes)
            host = torch.from_file(file.name, shared=True, size=num_bytes, dtype=torch.uint8)
        host = host.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return Offloaded(host, tensor.device, None)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    stream = _copy_stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        ready = stream.record_event()
    return Offloaded(host, tensor.device, ready)


class SavedTensors:
    """The tensors one call of a half saves, put away and brought back by policy.

    Those kept go through `save_for_backward`, so that torch's own hooks on saved tensors see them.
    """

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []
        self._slots: dict[str, int | Offloaded] = {}

    def put(self, name: str, tensor: torch.Tensor | None, policy: KeepOrRecompute) -> None:
        """Save a tensor under a name; None and `recompute` save nothing."""
        if tensor is None or policy == "recompute":
            return
        if policy == "offload":
            self._slots[name] = offload(tensor)
        else:
            self._slots[name] = len(self._kept)
            self._kept.append(tensor)

    def close(self, ctx: torch.autograd.function.FunctionCtx) -> None:
        """Hand the kept tensors to autograd; call once, at the end of the forward pass."""
        ctx.save_for_backward(*self._kept)
        self._kept = []

    def open(self, ctx: torch.autograd.function.FunctionCtx) -> dict[str, torch.Tensor]:
        """Bring every saved tensor back, by name."""
        kept = ctx.saved_tensors  # type: ignore[attr-defined]
        return {
            name: kept[slot] if isinstance(slot, int) else slot.fetch()
            for name, slot in self._slots.items()
        }


_copy_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _copy_streams:
        _copy_streams[device] = torch.cuda.Stream(device)
    return _copy_streams[device]


_workspaces = threading.local()


def workspace(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return a buffer that is overwritten by the next caller of the same name.

    On the CPU a fresh allocation of this size costs more than a pass over it: its pages are mapped and
    zeroed one by one (EPYC Zen 5: 28 GB/s into fresh pages, 130 GB/s into a buffer used before). On CUDA
    torch's own allocator reuses memory, and in stream order; there this is a plain allocation.

    Args:
        name: Role of the buffer inside one half.
        shape: Its shape.
        dtype: Its type.
        device: Its device.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    buffers = _workspaces.__dict__
    num_bytes = math.prod(shape) * dtype.itemsize
    buffer = buffers.get(name)
    if buffer is None or buffer.numel() < num_bytes:
        buffer = buffers[name] = torch.empty(num_bytes, dtype=torch.uint8)
    return buffer[:num_bytes].view(dtype).view(shape)


def release_workspaces() -> None:
    """Free this thread's buffers."""
    _workspaces.__dict__.clear()
