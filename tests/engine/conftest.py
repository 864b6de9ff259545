"""Fixtures that play a copy stream on the CPU, and count what offloading asks of the system."""

import ctypes
import gc
from collections import deque

import pytest
import torch

from whet.engine import memory, offload
from whet.engine.offload import Arena, Flight, Lane, set_scratch_dir

CPU = torch.device("cpu")


def at_address(tensor):
    """The same memory, which may meanwhile be given to somebody else."""
    num_bytes = tensor.numel() * tensor.element_size()
    if not num_bytes:
        return tensor
    memory = (ctypes.c_uint8 * num_bytes).from_address(tensor.data_ptr())
    return torch.frombuffer(memory, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)


class LazyCopies:
    """A CUDA device's copy stream, played on the CPU: copies wait until somebody waits for them.

    That is the slowest copy engine there can be. What is brought is poison until then, host memory is
    referred to by its address alone, and each flight must end in exactly one way.
    """

    def __init__(self):
        self.queue = deque()
        self.log = []
        self.flying = set()
        self.stream = self

    def _fly(self, what, tensor, target, source):
        done = object()
        self.queue.append((done, target, source))
        self.log.append((what, tensor.numel()))
        self.flying.add(done)
        return Flight(tensor, None, done)

    def _end(self, what, flight):
        self.log.append((what, flight.tensor.numel()))
        self.flying.remove(flight.done)
        return flight.tensor

    def _wait(self, done):
        while any(one[0] is done for one in self.queue):
            _, target, source = self.queue.popleft()
            target.copy_(source)

    def send(self, tensor, host):
        return self._fly("send", tensor, at_address(host), tensor)

    def bring(self, host):
        tensor = torch.empty_like(host)
        tensor.view(-1).view(torch.uint8).fill_(0xFF)  # NaN in every float type
        return self._fly("bring", tensor, tensor, at_address(host))

    def land(self, flight):
        self._wait(flight.done)
        return self._end("land", flight)

    def let_go(self, flight):
        self._wait(flight.done)
        self._end("let go", flight)

    def abandon(self, flight):
        self._end("abandon", flight)

    def synchronize(self):
        for done, *_ in list(self.queue):
            self._wait(done)


@pytest.fixture
def made(monkeypatch):
    """The sizes of the scratch files made during a test, in an arena of its own with small slabs."""
    sizes = []

    def slab(num_bytes):
        sizes.append(num_bytes)
        return offload._scratch_slab(num_bytes)

    monkeypatch.setattr(offload, "SLAB_BYTES", 16384)
    monkeypatch.setitem(offload._lanes, CPU, Lane(Arena(slab)))
    monkeypatch.setattr(memory, "_last", {})
    return sizes


@pytest.fixture
def lazy(made, monkeypatch):
    """Copies as CUDA makes them, on the CPU."""
    copies = LazyCopies()
    monkeypatch.setitem(offload._lanes, CPU, Lane(offload._lanes[CPU].arena, copies))
    for module in ("attention_half", "mlp_half", "group", "head"):  # buffers are fresh on CUDA
        monkeypatch.setattr(
            f"whet.engine.{module}.workspace",
            lambda name, shape, dtype, device: torch.empty(shape, dtype=dtype, device=device),
        )
    yield copies
    gc.collect()
    assert not copies.flying


@pytest.fixture(params=["mapped", "lazy"])
def either(request):
    """The CPU's own way, and CUDA's played on the CPU."""
    request.getfixturevalue("made" if request.param == "mapped" else "lazy")


@pytest.fixture
def scratch(tmp_path, made):
    set_scratch_dir(tmp_path)
    yield tmp_path
    set_scratch_dir(None)
