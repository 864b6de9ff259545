# ruff: noqa: ANN001, ANN202 -- Triton kernels carry no annotations
"""Quantise a matrix to NF4 (arXiv 2305.14314, section 3), to the same codes as bitsandbytes.

absmax = max |w| of a block, code = the nearest to w / absmax; with `double` the scales, less their
mean, are themselves quantised to 8 bits in blocks of 256 (plain torch: they are few). There is no
gradient. LoftQ and a model that is loaded without bitsandbytes need it.
"""

from __future__ import annotations

import torch

from whet.kernels.launch import ceil_div, constexpr, jit, launch, tl, uses_triton
from whet.kernels.nf4 import (
    BENCH,
    CASES,
    LARGE,
    NF4_CODE,
    NF4Weight,
    bytes_moved,
    launch_options,
)
from whet.kernels.optim import dynamic_code
from whet.kernels.spec import Aot, Case, Spec, Tensors, normal


def nf4_quantize(
    weight_NK: torch.Tensor, *, block: int = 64, double: bool = False, block2: int = 256
) -> NF4Weight:
    """Quantise a matrix, to the same codes and scales as bitsandbytes.

    Args:
        weight_NK: The matrix, any float dtype.
        block: Elements that share a scale.
        double: Quantise the scales to 8 bits too.
        block2: Scales that share a scale, with `double`.

    Returns:
        The quantised matrix, which shares no memory with it.
    """
    flat = weight_NK.reshape(-1)
    code = torch.tensor(NF4_CODE, device=flat.device)
    middles = (code[1:] + code[:-1]) / 2
    if uses_triton(flat):
        packed, absmax = _launch_quantize(flat, middles, block)
    else:
        blocks = ceil_div(flat.numel(), block)
        padded = torch.nn.functional.pad(flat.float(), (0, blocks * block - flat.numel()))
        padded = padded.view(blocks, block)
        absmax = padded.abs().amax(1)
        relative = padded * (1 / absmax.clamp_min(1e-38))[:, None]
        codes = torch.bucketize(relative.view(-1), middles, out_int32=True).to(torch.uint8)
        packed = ((codes[::2] << 4) | codes[1::2])[: ceil_div(flat.numel(), 2)]
    shape = (weight_NK.shape[0], weight_NK.shape[1])
    packed = packed[:, None]
    if not double:
        return NF4Weight(packed, shape, code, block, absmax)
    offset = absmax.mean()
    centered, code2 = absmax - offset, dynamic_code(True, flat.device)
    blocks2 = ceil_div(absmax.numel(), block2)
    padded = torch.nn.functional.pad(centered, (0, blocks2 * block2 - absmax.numel()))
    absmax2 = padded.view(blocks2, block2).abs().amax(1)
    relative = (padded.view(blocks2, block2) * (1 / absmax2.clamp_min(1e-38))[:, None]).view(-1)
    middles2 = (code2[1:] + code2[:-1]) / 2
    absmax8 = torch.bucketize(relative[: absmax.numel()], middles2, out_int32=True)
    return NF4Weight(
        packed, shape, code, block, absmax8.to(torch.uint8), absmax2, code2, block2, offset
    )


@jit
def _quantize(w_ptr, middle_ptr, packed_ptr, absmax_ptr, num, BLOCK: constexpr, GROUPS: constexpr):
    """Compute absmax and, by bisection among the 15 midpoints, the code nearest to w / absmax.

    Float32, the division rounded as IEEE says. Reads 1 element, writes 1/2 byte each.
    """
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * BLOCK + 2 * tl.arange(0, BLOCK // 2)[None, :]
    even = tl.load(w_ptr + at, mask=at < num, other=0.0).to(tl.float32)
    odd = tl.load(w_ptr + at + 1, mask=at + 1 < num, other=0.0).to(tl.float32)
    absmax = tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), 1)
    inverse = tl.math.div_rn(1.0, tl.maximum(absmax, 1e-38))[:, None]
    even *= inverse
    odd *= inverse
    high = tl.zeros(even.shape, tl.int32)
    low = tl.zeros(even.shape, tl.int32)
    half = 8
    for _ in tl.static_range(4):
        high += tl.where(even > tl.load(middle_ptr + high + (half - 1)), half, 0)
        low += tl.where(odd > tl.load(middle_ptr + low + (half - 1)), half, 0)
        half = half // 2
    byte = group[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(packed_ptr + byte, ((high << 4) | low).to(tl.uint8), mask=at < num)
    tl.store(absmax_ptr + group, absmax, mask=group * BLOCK < num)


def _launch_quantize(
    flat: torch.Tensor, middles: torch.Tensor, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    num, options = flat.numel(), launch_options(block)
    packed = torch.empty(ceil_div(num, 2), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(ceil_div(num, block), dtype=torch.float32, device=flat.device)
    if num:
        grid = (ceil_div(num, options["BLOCK"] * options["GROUPS"]),)
        launch(
            _quantize, grid, flat, middles, packed, absmax, num, enable_fp_fusion=False, **options
        )
    return packed, absmax


def _make_inputs_quantize(
    case: Case, dtype: torch.dtype, device: str, generator: torch.Generator
) -> Tensors:
    weight = normal((case["N"], case["K"]), dtype, device, generator)
    weight[0, : case["block"]] = 0  # a block whose scale is 0
    return {"w": weight}


def _original_quantize(case: Case, inputs: Tensors) -> Tensors:
    """The definition: count the midpoints that lie below each value over its block's largest."""
    flat = inputs["w"].float().flatten()
    code = torch.tensor(NF4_CODE, device=flat.device)
    index = torch.arange(len(flat), device=flat.device) // case["block"]
    absmax = torch.zeros(int(index[-1]) + 1, device=flat.device)
    absmax.scatter_reduce_(0, index, flat.abs(), "amax")
    relative = flat * (1 / absmax.clamp_min(1e-38))[index]
    codes = torch.zeros(len(flat) + len(flat) % 2, dtype=torch.uint8, device=flat.device)
    codes[len(flat) :] = 7
    for low, high in zip(code[:-1], code[1:], strict=True):
        codes[: len(flat)] += relative > (low + high) / 2
    return {"packed": (16 * codes[::2] + codes[1::2])[:, None], "absmax": absmax}


def _forward_quantize(case: Case, inputs: Tensors) -> Tensors:
    weight = nf4_quantize(inputs["w"], block=case["block"])
    return {"packed": weight.packed, "absmax": weight.absmax}


SPEC = Spec(
    name="nf4_quantize",
    summary="A matrix to NF4 codes and scales, the same as bitsandbytes'",
    traffic="1 element and half a byte each, and the scales",
    cases=CASES,
    large=LARGE,
    bench=BENCH,
    make_inputs=_make_inputs_quantize,
    original=_original_quantize,
    forward=_forward_quantize,
    bytes_moved=bytes_moved,
    exact=True,
    aot=(
        Aot(
            _quantize,
            "*T *fp32 *u8 *fp32 i64",
            tuple(launch_options(block) | {"enable_fp_fusion": False} for block in (64, 4096)),
        ),
    ),
)
SPECS = (SPEC,)
