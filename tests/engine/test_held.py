"""A held weight gives the rows and tiles of what it holds."""

import pytest
import torch

from tests.engine.conftest import LazyCopies
from whet.engine import held
from whet.engine.held import EightBitWeight, HostWeight, multiply, multiply_back, quantise_rows
from whet.engine.parity import judge

CPU = torch.device("cpu")


def make(dtype=torch.float32, rows=301, width=24):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_rounding_is_to_the_nearest_and_half_to_even():
    row = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -2.5, 3.49, -127.0])
    weight = torch.stack([row, torch.zeros(8), row / 1024, torch.full((8,), -3.0)])
    rows, scale = quantise_rows(weight)
    assert rows[0].tolist() == [127, 0, 2, 2, 0, -2, 3, -127]
    assert torch.equal(rows[2], rows[0]) and not rows[1].any() and not scale[1]
    assert rows[3].tolist() == [-127] * 8
    random = torch.randn(301, 24, generator=torch.Generator().manual_seed(0))
    rows, scale = quantise_rows(random)
    assert ((rows * scale[:, None] - random).abs() <= scale[:, None] * 0.5001).all()


def test_the_weight_that_is_quantised_stays_as_it_is():
    weight = make()
    quantise_rows(weight)
    assert torch.equal(weight, make())


@pytest.mark.parametrize("kind", [EightBitWeight, HostWeight])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("read", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 64, 65, 301])
def test_rows_and_tiles_are_the_same_numbers_in_every_type(kind, dtype, read, rows, monkeypatch):
    monkeypatch.setattr(held, "TILE_ROWS", 64)
    weight = kind(make(dtype, rows))
    ids = torch.arange(rows)
    values = weight.look_up(ids, dtype, CPU)
    if kind is HostWeight:
        assert torch.equal(values, make(dtype, rows))
    assert torch.equal(weight.look_up(ids[None, :, None], read, CPU)[0, :, 0], values.to(read))
    covered = 0
    for part, tile in weight.tiles(read, CPU):
        assert part.start == covered and torch.equal(tile, values[part].to(read))
        covered = part.stop
    assert covered == rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tile_rows", [1, 64, 300, 301])
def test_products_of_tiles_are_as_good_as_those_of_the_whole(dtype, tile_rows, monkeypatch):
    monkeypatch.setattr(held, "TILE_ROWS", tile_rows)
    weight = EightBitWeight(make(dtype))
    dense = weight.look_up(torch.arange(301), dtype, CPU)
    hidden, out = make(dtype, 37, 24), torch.empty(37, 301, dtype=dtype)
    multiply(hidden, weight.tiles(dtype, CPU), out)
    exact = hidden.double() @ dense.double().t()
    assert judge("logits", out, hidden @ dense.t(), exact).passed
    dlogits = torch.empty(37, 2 * 301, dtype=dtype)[:, ::2].copy_(out)
    back = multiply_back(dlogits, weight.tiles(dtype, CPU), torch.empty_like(hidden))
    exact = dlogits.double() @ dense.double()
    assert judge("gradient", back, dlogits @ dense, exact).passed


def test_tiles_come_in_time_from_a_slow_copy_engine(monkeypatch):
    copies = LazyCopies()
    monkeypatch.setattr(held, "TILE_ROWS", 64)
    monkeypatch.setitem(held._copy_streams, CPU, copies)
    weight = HostWeight(make())
    seen = []
    for part, tile in weight._stream(CPU):
        assert torch.equal(tile, weight.weight_VD[part])
        seen.append(part)
        assert len(copies.flying) == (len(seen) < 5)  # the next one is on its way
    assert [part.start for part in seen] == [0, 64, 128, 192, 256] and seen[-1].stop == 301
    for _ in weight._stream(CPU):
        break  # as after an error
    assert not copies.flying


@pytest.mark.gpu
def test_on_cuda_the_tiles_are_right_while_the_device_is_busy():
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(3 * held.TILE_ROWS + 5, 512, generator=generator)
    weight, there = HostWeight(dense), dense.cuda()
    work = torch.randn(4096, 4096, device="cuda")
    wrong = torch.zeros((), device="cuda")  # looked at in the end, so that the CPU runs ahead
    for _ in range(5):
        for part, tile in weight.tiles(torch.float32, there.device):
            work = work @ work * 1e-3
            wrong += (tile != there[part]).sum()
    assert not wrong


@pytest.mark.gpu
def test_on_cuda_rows_are_quantised_as_on_the_cpu():
    for there, here in zip(quantise_rows(make().cuda()), quantise_rows(make()), strict=True):
        assert torch.equal(there.cpu(), here)
