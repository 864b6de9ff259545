"""Offloaded tensors come back bit for bit, and the memory they waited in is used again."""

import errno
import os
import random
import sys

import pytest
import torch

from whet.engine import offload
from whet.engine.memory import SavedTensors
from whet.engine.offload import (
    Offloaded,
    offload_bytes,
    release_offload_buffers,
    set_scratch_dir,
)
from whet.errors import InputError, WhetError

TENSORS = {
    "odd": lambda: torch.randn(7, 5),
    "not contiguous": lambda: torch.randn(7, 5, dtype=torch.bfloat16).t(),
    "every other column": lambda: torch.randn(3, 8)[:, ::2],
    "integers": lambda: torch.arange(3),
    "booleans": lambda: torch.tensor([True, False, True]),
    "no axes": lambda: torch.tensor(2.5),
    "no elements": lambda: torch.empty(0, 4),
    "needs a gradient": lambda: torch.randn(3, requires_grad=True),
}


@pytest.mark.parametrize("name", TENSORS)
def test_an_offloaded_tensor_comes_back(name, either):
    torch.manual_seed(0)
    tensor = TENSORS[name]()
    away = Offloaded(tensor)
    away.leave()
    away.start()
    back = away.fetch()
    assert back.dtype == tensor.dtype and torch.equal(back, tensor) and not back.requires_grad
    assert not tensor.numel() or back.data_ptr() != tensor.data_ptr()


def test_an_offloaded_tensor_is_a_copy_that_later_writes_do_not_reach(made):
    tensor = torch.ones(4)
    away = Offloaded(tensor)
    tensor.zero_()
    assert torch.equal(away.fetch(), torch.ones(4))


def test_a_scratch_file_has_no_name_and_lies_in_the_folder_that_was_chosen(scratch):
    away = Offloaded(torch.ones(3))
    assert os.listdir(scratch) == []
    if sys.platform == "linux":
        with open("/proc/self/maps") as maps:
            assert [line for line in maps if str(scratch) in line and "(deleted)" in line]
    assert torch.equal(away.fetch(), torch.ones(3))


def test_on_the_cpu_the_mapped_memory_itself_comes_back(made):
    away = Offloaded(torch.ones(3))
    assert away.fetch().data_ptr() == away.fetch().data_ptr()


def test_memory_is_idle_only_when_no_view_shows_it(made):
    back = Offloaded(torch.arange(9.0)).fetch()
    part = back.view(3, 3)[1:].t()
    del back
    assert offload_bytes().used_bytes
    other = Offloaded(torch.zeros(9))
    assert part[0].tolist() == [3.0, 6.0]
    del part, other
    assert not offload_bytes().used_bytes


def test_an_arena_never_gives_the_same_byte_twice(made):
    arena, chance, taken = offload._lanes[torch.device("cpu")].arena, random.Random(0), []
    for number in range(2000):
        if taken and chance.random() < 0.5:
            tensor, value = taken.pop(chance.randrange(len(taken)))
            assert bool((tensor == value).all())
            del tensor
        else:
            tensor = arena.empty(torch.Size([chance.randrange(1, 20000)]), torch.int16)
            taken.append((tensor.fill_(number), number))
    for tensor, value in taken:
        assert bool((tensor == value).all())
    del tensor
    taken.clear()
    assert arena.used_bytes == 0
    before = len(made)
    whole = [arena.empty(torch.Size([num_bytes]), torch.uint8) for num_bytes in list(made)]
    assert len(made) == before and len(whole) == before  # every slab is in one piece again


def test_bytes_are_counted_and_idle_buffers_released(made):
    away = Offloaded(torch.zeros(5000, dtype=torch.uint8))
    other = Offloaded(torch.zeros(16000, dtype=torch.uint8))  # does not fit beside it
    found = offload_bytes()
    assert made == [16384, 32768]
    assert (found.held_bytes, found.used_bytes) == (49152, 8192 + 16384)
    del other
    release_offload_buffers()
    found = offload_bytes()
    assert (found.held_bytes, found.used_bytes, found.peak_bytes) == (16384, 8192, 49152)
    assert not away.fetch().any()
    del away
    release_offload_buffers()
    assert offload_bytes().held_bytes == 0


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve a file")
def test_a_full_disk_is_told_in_one_sentence_and_harms_nothing(made, scratch, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    first = Offloaded(torch.arange(100))
    with monkeypatch.context() as patched, pytest.raises(WhetError) as told:
        patched.setattr(os, "posix_fallocate", full)
        Offloaded(torch.zeros(5000))
    assert str(told.value) == (
        f"cannot set 0.00 GiB aside in {scratch} for offloaded tensors; got No space left on device; "
        "free space there, choose another folder with set_scratch_dir, or offload less"
    )
    assert os.listdir(scratch) == []
    assert offload_bytes().held_bytes == made[0]
    assert torch.equal(first.fetch(), torch.arange(100))
    assert not Offloaded(torch.zeros(5000)).fetch().any()


def test_a_scratch_file_is_as_large_on_disk_as_in_memory(made, scratch, monkeypatch):
    sizes, reserve = [], os.posix_fallocate

    def watched(descriptor, *args):
        reserve(descriptor, *args)
        sizes.append(os.fstat(descriptor).st_blocks * 512)

    monkeypatch.setattr(os, "posix_fallocate", watched)
    Offloaded(torch.zeros(5000))
    assert sizes and sizes[0] >= made[0]  # written later, a sparse file would end in a bus error


def test_a_system_that_cannot_reserve_a_file_writes_it(made, scratch, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    away = Offloaded(torch.arange(600_000))
    assert made[0] > 1 << 20
    assert torch.equal(away.fetch(), torch.arange(600_000))


def test_memory_that_cannot_be_pinned_is_told(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("CUDA error: out of memory\nand a page more")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(WhetError, match="cannot pin 1.00 GiB .*out of memory; close"):
        offload._pinned_slab(1 << 30)


def test_a_scratch_folder_must_be_there(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        set_scratch_dir(tmp_path / "nowhere")


def test_a_folder_in_ram_is_left_for_one_on_disk(monkeypatch, caplog):
    monkeypatch.setattr(offload, "_is_ram", lambda folder: folder == "/tmp/ram")
    caplog.set_level("INFO", logger="whet")
    assert offload._on_disk.__wrapped__("/tmp/ram") == "/var/tmp"
    assert "/tmp/ram is RAM" in caplog.text
    assert offload._on_disk.__wrapped__("/tmp/disk") == "/tmp/disk"
    monkeypatch.setattr(offload, "_is_ram", lambda folder: True)
    assert offload._on_disk.__wrapped__("/tmp/ram") == "/tmp/ram"


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="no /dev/shm")
def test_tmpfs_is_known_as_ram():
    assert offload._is_ram("/dev/shm")
    assert not offload._is_ram("/proc")


class Wide(torch.autograd.Function):
    """A half in small that computes for a while."""

    @staticmethod
    def forward(ctx, x, weight, policy):
        saved = SavedTensors()
        saved.put("x", x, policy)
        saved.put("halves", (x @ weight)[:, ::2], policy)  # not contiguous
        saved.close(ctx)
        ctx.saved, ctx.weight = saved, weight
        return (x @ weight).sin()

    @staticmethod
    def backward(ctx, dy):
        saved = ctx.saved.open(ctx)
        dx = dy * (saved["x"] @ ctx.weight).cos()
        dx[:, ::2] += saved["halves"]
        return dx @ ctx.weight.t(), None, None


def cuda_passes(x, weight, policy, num_passes, num_halves=24):
    outputs = []
    for number in range(num_passes):
        y = x * (number + 1)
        for _ in range(num_halves):
            y = Wide.apply(y, weight, policy)
        outputs.append(y)
    return [torch.autograd.grad(y.sum(), x)[0] for y in reversed(outputs)]


@pytest.mark.gpu
@pytest.mark.parametrize("num_passes", [1, 3])
def test_on_cuda_offloading_changes_no_bit_and_lowers_the_peak(num_passes):
    torch.manual_seed(0)
    weight = torch.randn(1024, 1024, device="cuda") / 32
    peaks, held = {}, set()
    for step in range(4):
        x = torch.randn(4096 - 128 * step, 1024, device="cuda", requires_grad=True)
        found = {}
        for policy in ("keep", "offload"):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            found[policy] = cuda_passes(x, weight, policy, num_passes)
            torch.cuda.synchronize()
            peaks[policy] = torch.cuda.max_memory_allocated()
        for kept, back in zip(found["keep"], found["offload"], strict=True):
            assert torch.equal(kept, back)
        assert peaks["offload"] < peaks["keep"] / 2
        assert not offload_bytes().used_bytes
        held.add(offload_bytes().held_bytes)
    assert len(held) == 1  # a later step, with fewer tokens, pins nothing new
    release_offload_buffers()
    assert not offload_bytes().held_bytes


@pytest.mark.gpu
def test_on_cuda_a_tensor_on_its_way_may_be_dropped():
    x = torch.randn(4096, 1024, device="cuda", requires_grad=True)
    weight = torch.randn(1024, 1024, device="cuda") / 32
    for _ in range(8):
        first = Wide.apply(x, weight, "offload")
        second = Wide.apply(first, weight, "offload")
        third = Wide.apply(second, weight, "offload")
        torch.autograd.grad(third.sum(), second)
        del first, second, third
        other = torch.full((4096, 1024), 3.0, device="cuda")  # may get the dropped one's memory
        torch.cuda.synchronize()
        assert bool((other == 3.0).all())
    assert not offload_bytes().used_bytes
