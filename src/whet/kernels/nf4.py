"""NF4 weights (arXiv 2305.14314, section 3): 4-bit codes in blocks, whose scales are themselves 8-bit.

Dequantise: w[i] = code[nibble(i)] * absmax[i / block], absmax = code8[absmax8] * absmax2 + offset; two
nibbles a byte, the high one first. Bit-equal to bitsandbytes in float32, float16 and bfloat16.
Reads half a byte and the block's share of a scale, and writes one element of the workspace each.
"""

# ruff: noqa: ANN001, ANN202 -- Triton kernels carry no annotations

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from whet.kernels.launch import ceil_div, constexpr, jit, launch, tl, uses_triton
from whet.kernels.optim import dynamic_code
from whet.kernels.spec import Aot, Case, Spec, Tensors, normal

# arXiv 2305.14314, appendix E: the quantiles of a normal distribution, in float32, with an exact 0.
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class NF4Weight:
    """One quantised matrix, as bitsandbytes stores it.

    Args:
        packed: uint8, two codes a byte, row by row.
        shape: (N, K) of the matrix.
        code: float32 (16), the value of each code.
        block: Elements that share a scale.
        absmax: Scale of each block: float32, or uint8 when it is quantised itself.
        absmax2: float32 scale of each block of scales, or None.
        code2: float32 (256), the value of each 8-bit scale, or None.
        block2: Scales that share an absmax2.
        offset: float32 scalar, the mean that was taken from the scales, or None.
    """

    packed: torch.Tensor
    shape: tuple[int, int]
    code: torch.Tensor
    block: int
    absmax: torch.Tensor
    absmax2: torch.Tensor | None = None
    code2: torch.Tensor | None = None
    block2: int = 256
    offset: torch.Tensor | None = None


def from_quant_state(packed: torch.Tensor, state: Any) -> NF4Weight:
    """Read bitsandbytes' `QuantState` of a 4-bit parameter.

    Args:
        packed: The parameter's data.
        state: Its `quant_state`.
    """
    shape = (int(state.shape[0]), int(state.shape[1]))
    nested = state.state2 if state.nested else None
    return NF4Weight(
        packed, shape, state.code, state.blocksize, state.absmax,
        absmax2=nested.absmax if nested else None,
        code2=nested.code if nested else None,
        block2=nested.blocksize if nested else 256,
        offset=state.offset if nested else None,
    )  # fmt: skip


def nf4_scales(weight: NF4Weight) -> torch.Tensor:
    """Return the float32 scale of each block."""
    if weight.absmax2 is None:
        return weight.absmax
    assert weight.code2 is not None and weight.offset is not None
    native = getattr(torch.ops.bitsandbytes, "dequantize_blockwise", None)
    if native is not None and not weight.absmax.is_cuda:  # three times faster, and equal to the bit
        found = native(weight.absmax, weight.absmax2, weight.code2, weight.block2, torch.float32)
        return found + weight.offset
    scales = weight.code2[weight.absmax.int()]
    blocks = -(-scales.numel() // weight.block2)
    padded = torch.nn.functional.pad(scales, (0, blocks * weight.block2 - scales.numel()))
    scaled = (padded.view(blocks, -1) * weight.absmax2[:, None]).view(-1)[: scales.numel()]
    return scaled + weight.offset


def nf4_dequantize_reference(weight: NF4Weight, out_NK: torch.Tensor) -> torch.Tensor:
    """Dequantise in plain torch, writing into out (any row stride)."""
    high, low = weight.packed.view(-1) >> 4, weight.packed.view(-1) & 15
    codes = torch.stack((high, low), dim=1).view(-1).int()
    values = weight.code[codes]
    scales = nf4_scales(weight).repeat_interleave(weight.block)[: values.numel()]
    num = weight.shape[0] * weight.shape[1]
    return out_NK.copy_((values * scales)[:num].view(weight.shape))


def nf4_dequantize(weight: NF4Weight, out_NK: torch.Tensor) -> torch.Tensor:
    """Dequantise into a workspace.

    Args:
        weight: The quantised matrix.
        out_NK: float32, float16 or bfloat16, contiguous along K, any row stride.

    Returns:
        out_NK.
    """
    if uses_triton(out_NK):
        return _launch_dequantize(weight, out_NK)
    native = _native_dequantize()
    # Where a row is not a whole number of blocks, bitsandbytes 0.50 reads the wrong scales on the CPU
    # (a 576-wide matrix in blocks of 128), and from 2,048 on it leaves its fast code.
    if native is not None and weight.shape[1] % weight.block == 0 and weight.block < 2048:
        scales = nf4_scales(weight)
        return out_NK.copy_(
            native(weight.packed, scales, weight.block, "nf4", weight.shape, out_NK.dtype)
        )
    # A byte picks its two values at once, as one 64-bit number: 2.2 ms for 3.5 M elements where the
    # reference takes 11 and bitsandbytes' own code 1.0 (EPYC Zen 5, one thread).
    pairs = _pairs(weight.code).index_select(0, weight.packed.view(-1).int())
    values = pairs.view(torch.float32)
    num = weight.shape[0] * weight.shape[1]
    if num % weight.block:
        each = nf4_scales(weight).repeat_interleave(weight.block)
        values = values[:num].mul_(each[:num])
    else:
        values = values.view(-1, weight.block).mul_(nf4_scales(weight)[:, None])
    return out_NK.copy_(values.view(weight.shape))


def _native_dequantize() -> Callable[..., torch.Tensor] | None:
    """Return bitsandbytes' operator if somebody imported bitsandbytes."""
    return getattr(torch.ops.bitsandbytes, "dequantize_4bit", None)


def _pairs(code: torch.Tensor) -> torch.Tensor:
    """Return the two values of each byte, as 256 64-bit numbers."""
    return torch.cartesian_prod(code, code).view(torch.int64).view(-1)


@jit
def _dequantize(
    packed_ptr, code_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, out_ptr, num, width,
    out_stride, block2, CONTIGUOUS: constexpr, BLOCK: constexpr, GROUPS: constexpr,
):  # fmt: skip
    """Compute w = code[nibble] * absmax, absmax = code8[absmax8] * absmax2 + offset, GROUPS blocks.

    Float32, rounded once; compiled without fused multiply-add, which would round the scale once where
    bitsandbytes rounds it twice. Reads 1/2 byte, writes 1 element each.
    """
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    group_in = group * BLOCK < num
    scale = tl.load(absmax_ptr + group, mask=group_in, other=0)
    if code2_ptr is not None:
        scale = tl.load(code2_ptr + scale.to(tl.int32))
        scale = scale * tl.load(absmax2_ptr + group // block2, mask=group_in, other=0.0)
        scale = scale + tl.load(offset_ptr)
    at = group[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    byte = tl.load(packed_ptr + at, mask=at * 2 < num, other=0).to(tl.int32)
    high = tl.load(code_ptr + (byte >> 4)) * scale[:, None]
    low = tl.load(code_ptr + (byte & 15)) * scale[:, None]
    values = tl.reshape(tl.join(high, low), (GROUPS, BLOCK)).to(out_ptr.dtype.element_ty)
    at = group[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = at < num
    if not CONTIGUOUS:
        row = at // width
        at = row * out_stride + (at - row * width)
    tl.store(out_ptr + at, values, mask=inside)


def launch_options(block: int) -> dict[str, int]:
    """Return the constants of a launch, for blocks of that many elements."""
    return {"BLOCK": block, "GROUPS": max(1, 1024 // block), "num_warps": 4}


def _launch_dequantize(weight: NF4Weight, out: torch.Tensor) -> torch.Tensor:
    num, options = weight.shape[0] * weight.shape[1], launch_options(weight.block)
    if num:
        launch(
            _dequantize, (ceil_div(num, options["BLOCK"] * options["GROUPS"]),), weight.packed,
            weight.code, weight.absmax, weight.absmax2, weight.code2, weight.offset, out, num,
            weight.shape[1], out.stride(0), weight.block2,
            CONTIGUOUS=out.is_contiguous(), enable_fp_fusion=False, **options,
        )  # fmt: skip
    return out


def _make_inputs(
    case: Case, dtype: torch.dtype, device: str, generator: torch.Generator
) -> Tensors:
    num, width, block = case["N"], case["K"], case["block"]
    blocks = ceil_div(num * width, block)

    def random_bytes(count: int) -> torch.Tensor:
        shape = (count, 1)
        return torch.randint(0, 256, shape, generator=generator, device=device, dtype=torch.uint8)

    inputs = {
        "packed": random_bytes(ceil_div(num * width, 2)),
        "code": torch.tensor(NF4_CODE, device=device),
        "absmax": normal((blocks,), torch.float32, device, generator).abs(),
        "out": normal((num, width), dtype, device, generator, pad=case.get("pad", 0)),
    }
    if case.get("double"):
        inputs["absmax"] = random_bytes(blocks)[:, 0]
        inputs["absmax2"] = normal((ceil_div(blocks, 256),), torch.float32, device, generator)
        inputs["code2"] = dynamic_code(True, device)
        inputs["offset"] = torch.tensor(0.7, device=device)
    return inputs


def _weight(case: Case, inputs: Tensors) -> NF4Weight:
    return NF4Weight(
        inputs["packed"], (case["N"], case["K"]), inputs["code"], case["block"], inputs["absmax"],
        absmax2=inputs.get("absmax2"), code2=inputs.get("code2"), offset=inputs.get("offset"),
    )  # fmt: skip


def _original(case: Case, inputs: Tensors) -> Tensors:
    return {"w": nf4_dequantize_reference(_weight(case, inputs), inputs["out"])}


def _forward(case: Case, inputs: Tensors) -> Tensors:
    return {"w": nf4_dequantize(_weight(case, inputs), inputs["out"])}


def bytes_moved(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    """Return what either direction reads and writes."""
    elements = case["N"] * case["K"]
    scales = elements // case["block"] * (1 if case.get("double") else 4)
    return elements * dtype.itemsize + elements // 2 + scales, 0


CASES = (
    Case("blocks of 64", {"N": 5, "K": 128, "block": 64}),
    Case("doubled, strided", {"N": 3, "K": 192, "block": 64, "double": True, "pad": 16}),
    Case("rows of half a block", {"N": 6, "K": 64, "block": 128, "double": True}),
    Case("odd", {"N": 3, "K": 37, "block": 32, "pad": 3}),
    Case("many scales", {"N": 65, "K": 256, "block": 32, "double": True}),
    Case("one value", {"N": 1, "K": 1, "block": 64}),
)
LARGE = (
    Case("blocks of 64", {"N": 4096, "K": 4096, "block": 64, "double": True}),
    Case("strided", {"N": 1025, "K": 14336, "block": 128, "pad": 64}),
)
BENCH = {
    "cpu": Case("1536 x 2304", {"N": 1536, "K": 2304, "block": 64, "double": True}),
    "cuda": Case("14336 x 4096", {"N": 14336, "K": 4096, "block": 64, "double": True}),
}
_DEQUANTIZE_TYPES = "*fp32 *fp32 *T i64 i32 i32 i32"

SPEC = Spec(
    name="nf4",
    summary="NF4 to a strided workspace, scales in float32 or 8 bits; bit-equal to bitsandbytes",
    traffic="half a byte and 1 element each, and the scales",
    cases=CASES,
    large=LARGE,
    bench=BENCH,
    make_inputs=_make_inputs,
    original=_original,
    forward=_forward,
    bytes_moved=bytes_moved,
    exact=True,
    aot=(
        Aot(
            _dequantize,
            "*u8 *fp32 *u8 *fp32 " + _DEQUANTIZE_TYPES,
            tuple(
                {"CONTIGUOUS": c, "enable_fp_fusion": False, **launch_options(64)}
                for c in (True, False)
            ),
        ),
        Aot(
            _dequantize,
            "*u8 *fp32 *fp32 *fp32 " + _DEQUANTIZE_TYPES,
            (
                {"CONTIGUOUS": True, "enable_fp_fusion": False, **launch_options(4096)}
                | dict.fromkeys(("absmax2_ptr", "code2_ptr", "offset_ptr")),
            ),
        ),
    ),
)
SPECS = (SPEC,)
