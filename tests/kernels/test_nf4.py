"""NF4 and 8-bit codes are bitsandbytes' own, to the bit."""

import bitsandbytes.functional as bnb
import pytest
import torch

from whet.kernels import nf4
from whet.kernels.nf4_quantize import nf4_quantize
from whet.kernels.optim import dynamic_code

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantized(shape, block, double, dtype=torch.float32):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    return weight, *bnb.quantize_4bit(
        weight, blocksize=block, quant_type="nf4", compress_statistics=double
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double", (False, True))
@pytest.mark.parametrize("block", (32, 64, 128, 256, 1024))  # from 2,048 on theirs is compiled
def test_dequantize_equals_bitsandbytes(block, double, dtype):
    _, packed, state = quantized((24, 2 * block), block, double, dtype)
    weight = nf4.from_quant_state(packed, state)
    expected = bnb.dequantize_4bit(packed, state)
    for pad in (0, 16):
        out = torch.zeros(24, 2 * block + pad, dtype=dtype)
        result = nf4.nf4_dequantize(weight, out[:, : 2 * block])
        assert torch.equal(result, expected)
        assert not out[:, 2 * block :].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "block"), [((24, 576), 128), ((3, 37), 32), ((4, 8192), 4096)])
def test_every_torch_route_equals_the_reference(shape, block, dtype, monkeypatch):
    _, packed, state = quantized(shape, block, True)
    weight = nf4.from_quant_state(packed, state)
    expected = nf4.nf4_dequantize_reference(weight, torch.empty(shape, dtype=dtype))
    assert torch.equal(nf4.nf4_dequantize(weight, torch.empty(shape, dtype=dtype)), expected)
    monkeypatch.setattr(nf4, "_native_dequantize", lambda: None)
    assert torch.equal(nf4.nf4_dequantize(weight, torch.empty(shape, dtype=dtype)), expected)


def assert_nearest_codes(ours, theirs, absmax):
    """Ours is the nearest code; bitsandbytes' CPU code (0.50) takes a neighbour now and then."""
    relative = ((absmax - ours.offset).split(256), ours.absmax2)
    relative = torch.cat([part / top for part, top in zip(*relative, strict=True)])
    missed = (relative[:, None] - ours.code2).abs()
    mine, other = (missed.gather(1, x.long()[:, None])[:, 0] for x in (ours.absmax, theirs))
    assert (mine <= other + 1e-6).all()
    assert (other <= mine + 5e-5).all()
    assert (ours.absmax != theirs).float().mean() < 0.05


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double", (False, True))
@pytest.mark.parametrize("block", (32, 64, 128, 4096))
def test_quantize_equals_bitsandbytes(block, double, dtype):
    matrix, packed, state = quantized((48, 4096), block, double, dtype)
    ours = nf4_quantize(matrix, block=block, double=double)
    theirs = nf4.from_quant_state(packed, state)
    assert ours.shape == theirs.shape and ours.block == theirs.block
    for name in ("packed", "code", "absmax", "absmax2", "code2", "offset"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert (mine is None) == (other is None), name
        if name == "absmax" and double:
            assert_nearest_codes(ours, other, nf4_quantize(matrix, block=block).absmax)
            continue
        assert mine is None or torch.equal(mine, other.view(mine.shape)), name


@pytest.mark.parametrize("signed", (False, True))
def test_dynamic_code_equals_bitsandbytes(signed):
    assert torch.equal(dynamic_code(signed), bnb.create_dynamic_map(signed=signed))
