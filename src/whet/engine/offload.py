"""Where tensors wait between forward and backward when the device shall not hold them.

From CUDA they go to pinned host memory on a copy stream; from the CPU to a memory-mapped scratch file.
Left out on purpose: what to offload and when to bring it back (`memory.py`), and other devices.
"""

from __future__ import annotations

import functools
import logging
import math
import mmap
import os
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from whet.errors import InputError, WhetError

log = logging.getLogger(__name__)

# The least that is asked of the system at a time: pinning and faulting in fresh pages are slow, and a
# file each would use up a process's descriptors.
SLAB_BYTES = 64 << 20
REGION_ALIGNMENT = 4096  # a page: no two tensors share one, in memory or on disk


@dataclass(frozen=True, slots=True)
class OffloadBytes:
    """Host memory and scratch files of this process.

    Args:
        held_bytes: Taken from the system now, in use or idle.
        used_bytes: Holding a tensor now.
        peak_bytes: The most that was held.
    """

    held_bytes: int
    used_bytes: int
    peak_bytes: int


@dataclass(eq=False, slots=True)
class Slab:
    """One piece of host memory, and the spans (start, stop) of it that are idle, in order."""

    memory: memoryview
    idle: list[tuple[int, int]]

    @property
    def idle_bytes(self) -> int:
        """Bytes that hold nothing."""
        return sum(stop - start for start, stop in self.idle)

    def take(self, num_bytes: int) -> int | None:
        """Return where a span of this length starts, the first that fits, or None."""
        for i, (start, stop) in enumerate(self.idle):
            if stop - start >= num_bytes:
                self.idle[i] = (start + num_bytes, stop)
                return start
        return None

    def give(self, start: int, stop: int) -> None:
        """Take a span back and merge it with its neighbours."""
        merged: list[tuple[int, int]] = []
        for span in sorted([*self.idle, (start, stop)]):
            if merged and merged[-1][1] == span[0]:
                merged[-1] = (merged[-1][0], span[1])
            else:
                merged.append(span)
        self.idle = merged


class Arena:
    """Host memory that is reused, in slabs from which tensors are cut.

    Idle neighbours merge, instead of size classes with a list each: between two steps a slab is one span
    again, so passes of any mix of token counts reuse the same bytes. The first place that fits is
    taken, so that equal steps cut the slabs up equally and a second one never needs more. 512 MiB take
    0.04 s into a mapped file that was used before, 0.5 s into new ones (one core of an EPYC, ext4).

    Args:
        make_slab: Gets so many bytes from the system; they go back when nobody refers to them.
    """

    def __init__(self, make_slab: Callable[[int], memoryview]) -> None:
        self.peak_bytes = 0
        self._make_slab = make_slab
        self._slabs: list[Slab] = []
        self._lock = threading.Lock()
        # Finalizers only append here: they run in any thread and in the middle of anything, also of
        # a method that holds the lock.
        self._returned: deque[tuple[Slab, int, int]] = deque()

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor in this memory, which is idle again once no tensor shows any of it.

        Args:
            shape: Its shape.
            dtype: Its type.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        if not num_bytes:
            return torch.empty(shape, dtype=dtype)
        size = -(-num_bytes // REGION_ALIGNMENT) * REGION_ALIGNMENT
        with self._lock:
            slab, start = self._take(size)
        region = slab.memory[start : start + num_bytes]
        # The tensor's storage, which all its views share, keeps the region alive, and nothing else.
        weakref.finalize(region, self._returned.append, (slab, start, start + size)).atexit = False
        return torch.frombuffer(region, dtype=torch.uint8).view(dtype).view(shape)

    def _take(self, size: int) -> tuple[Slab, int]:
        self._merge_returned()
        for slab in self._slabs:
            start = slab.take(size)
            if start is not None:
                return slab, start
        # A power of two, because torch pins no other size (it rounds up without a word:
        # https://github.com/pytorch/pytorch/issues/150517); twice what is needed, so that at most a third
        # of a slab is left over behind equal tensors.
        slab_bytes = 1 << (max(SLAB_BYTES, 2 * size) - 1).bit_length()
        slab = Slab(self._make_slab(slab_bytes), [(0, slab_bytes)])
        self._slabs.append(slab)
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        start = slab.take(size)
        assert start is not None
        return slab, start

    def _merge_returned(self) -> None:
        while self._returned:
            slab, start, stop = self._returned.popleft()
            slab.give(start, stop)

    def release_idle(self) -> None:
        """Give every slab that holds no tensor back to the system."""
        with self._lock:
            self._merge_returned()
            self._slabs = [s for s in self._slabs if s.idle_bytes < len(s.memory)]

    @property
    def held_bytes(self) -> int:
        """Bytes of all slabs."""
        return sum(len(slab.memory) for slab in self._slabs)

    @property
    def used_bytes(self) -> int:
        """Bytes of the slabs that hold a tensor."""
        with self._lock:
            self._merge_returned()
            return self.held_bytes - sum(slab.idle_bytes for slab in self._slabs)


def _pinned_slab(num_bytes: int) -> memoryview:
    try:
        pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
    except RuntimeError as error:
        raise WhetError(
            f"cannot pin {num_bytes / 2**30:.2f} GiB of host memory for offloaded tensors",
            str(error).splitlines()[0],
            "close other programs, or offload less",
        ) from error
    return memoryview(pinned)  # type: ignore[arg-type]  # arrays are buffers


_scratch_dir: Path | None = None


def set_scratch_dir(path: str | os.PathLike[str] | None) -> None:
    """Choose where scratch files are made from now on; those that hold tensors stay where they are.

    Args:
        path: A folder; None is the system's folder for temporary files, or /var/tmp where that is RAM.

    Raises:
        InputError: There is no such folder.
    """
    global _scratch_dir
    if path is not None and not os.path.isdir(path):
        raise InputError("the scratch folder is not a folder", os.fspath(path), "make it first")
    _scratch_dir = None if path is None else Path(path)
    _lanes[torch.device("cpu")].arena.release_idle()


@functools.cache  # told once
def _on_disk(folder: str) -> str:
    """Return the folder, or /var/tmp where it is RAM: a file there would free no memory at all.

    Fedora, Arch and Debian 13 mount tmpfs on /tmp; /var/tmp survives a reboot, so it is on a disk.
    """
    other = "/var/tmp"
    if not _is_ram(folder) or not os.access(other, os.W_OK) or _is_ram(other):
        return folder
    log.info("offloaded tensors go to %s, because %s is RAM (tmpfs)", other, folder)
    return other


def _is_ram(folder: str) -> bool:
    """Tell whether a folder is in tmpfs; only Linux says so."""
    mounts = Path("/proc/self/mountinfo")
    if not mounts.exists():
        return False
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    lines = [line.partition(" - ") for line in mounts.read_text().splitlines()]
    return any(
        mount.split()[2] == number and source.split()[0] in ("tmpfs", "ramfs")
        for mount, _, source in lines
    )


def _scratch_slab(num_bytes: int) -> memoryview:
    """Map a new file that has no name, so that nothing is left of it however the process ends."""
    folder = os.fspath(_scratch_dir) if _scratch_dir else _on_disk(tempfile.gettempdir())
    try:
        with tempfile.TemporaryFile(dir=folder, prefix="whet-") as file:
            # A sparse file would be made on a full disk too, and end the process with a bus error
            # when its pages are written.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            else:  # macOS has none
                for start in range(0, num_bytes, 1 << 20):
                    file.write(bytes(min(1 << 20, num_bytes - start)))
                file.flush()
            return memoryview(mmap.mmap(file.fileno(), num_bytes))
    except OSError as error:
        raise WhetError(
            f"cannot set {num_bytes / 2**30:.2f} GiB aside in {folder} for offloaded tensors",
            error.strerror,
            "free space there, choose another folder with set_scratch_dir, or offload less",
        ) from error


@dataclass(frozen=True, slots=True)
class Flight:
    """A tensor on the device while it is being copied from or to the host.

    Args:
        tensor: The tensor.
        stream: The compute stream that it was made on.
        done: Event behind the copy.
    """

    tensor: torch.Tensor
    stream: torch.cuda.Stream
    done: torch.cuda.Event


class CopyStream:
    """Copies between a CUDA device and its pinned memory, on one stream for both ways.

    One, because copies out belong to the forward pass and copies back to the backward pass, and because
    its order then guards the host: bytes read by a copy back are overwritten by a later copy out
    only, behind it. The device's side is guarded by events that the compute stream waits for before
    it lets go of a tensor. `record_stream` would do that too, but only once the GPU has got there:
    a CPU that runs ahead would find nothing free and allocate every layer's tensors anew.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def send(self, tensor: torch.Tensor, host: torch.Tensor) -> Flight:
        """Start a copy to the host, behind what the current stream has been given to do."""
        compute = torch.cuda.current_stream(tensor.device)
        self.stream.wait_stream(compute)
        with torch.cuda.stream(self.stream):
            host.copy_(tensor, non_blocking=True)
        return self._take_off(tensor, compute)

    def bring(self, host: torch.Tensor) -> Flight:
        """Start a copy to the device, into memory that earlier work of the current stream may use."""
        compute = torch.cuda.current_stream(self.stream.device)
        tensor = torch.empty(host.shape, dtype=host.dtype, device=self.stream.device)
        self.stream.wait_stream(compute)
        with torch.cuda.stream(self.stream):
            tensor.copy_(host, non_blocking=True)
        return self._take_off(tensor, compute)

    def _take_off(self, tensor: torch.Tensor, compute: torch.cuda.Stream) -> Flight:
        done = torch.cuda.Event()
        done.record(self.stream)
        return Flight(tensor, compute, done)

    def land(self, flight: Flight) -> torch.Tensor:
        """Return the tensor, for the current stream to use behind the copy."""
        current = torch.cuda.current_stream(self.stream.device)
        current.wait_event(flight.done)
        if current != flight.stream:
            flight.tensor.record_stream(current)
        return flight.tensor

    def let_go(self, flight: Flight) -> None:
        """Make the memory's own stream wait for the copy; the tensor may be freed after this."""
        flight.stream.wait_event(flight.done)

    def abandon(self, flight: Flight) -> None:
        """Let a tensor be freed at once whose copy may be under way, by whatever stream is current."""
        flight.tensor.record_stream(self.stream)


class Lane(NamedTuple):
    """A device's way to the host and back: its memory there, and how tensors travel.

    On the CPU they do not: the memory itself is handed out.
    """

    arena: Arena
    copies: CopyStream | None = None


_lanes = {torch.device("cpu"): Lane(Arena(_scratch_slab))}
_lanes_lock = threading.Lock()


def _lane(device: torch.device) -> Lane:
    with _lanes_lock:
        if device not in _lanes:
            assert device.type == "cuda", device
            _lanes[device] = Lane(Arena(_pinned_slab), CopyStream(device))
        return _lanes[device]


class Offloaded:
    """A tensor that waits on the host; when dropped, its memory is idle again, wherever it was.

    Args:
        tensor: Any tensor; its strides are not kept. As with `save_for_backward`, it is not written
            to afterwards: on CUDA the copy is made later, and may not be needed at all.
    """

    _flight: Flight | None = None

    def __init__(self, tensor: torch.Tensor) -> None:
        lane = _lane(tensor.device)
        self._copies = lane.copies
        self._host = lane.arena.empty(tensor.shape, tensor.dtype)
        if self._copies is None:
            self._host.copy_(tensor.detach())
        else:
            self._flight = self._copies.send(tensor.detach(), self._host)

    def leave(self) -> None:
        """Free the tensor on the device, behind its copy."""
        if self._copies is not None and self._flight is not None:
            self._copies.let_go(self._flight)
            self._flight = None

    def start(self) -> None:
        """Begin to bring the tensor back, unless it is still or already on the device."""
        if self._copies is not None and self._flight is None:
            self._flight = self._copies.bring(self._host)

    def fetch(self) -> torch.Tensor:
        """Return the tensor on its device; on the CPU it is the waiting memory itself."""
        if self._copies is None:
            return self._host
        self.start()
        flight, self._flight = self._flight, None
        assert flight is not None
        return self._copies.land(flight)

    def __del__(self) -> None:
        if self._flight is not None and self._copies is not None:
            self._copies.abandon(self._flight)


def offload_bytes() -> OffloadBytes:
    """Tell how much host memory and scratch space offloaded tensors take, over all devices."""
    arenas = [lane.arena for lane in _lanes.values()]
    return OffloadBytes(
        sum(arena.held_bytes for arena in arenas),
        sum(arena.used_bytes for arena in arenas),
        sum(arena.peak_bytes for arena in arenas),
    )


def release_offload_buffers() -> None:
    """Give host memory and scratch files that hold no tensor back, for instance after an OOM.

    Pinned memory goes to torch's own cache of it, for whoever pins next.
    """
    for lane in _lanes.values():
        if lane.copies is not None:
            lane.copies.stream.synchronize()  # a copy back may still read what was given back
        lane.arena.release_idle()
