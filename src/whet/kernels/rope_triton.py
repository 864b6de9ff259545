# ruff: noqa: ANN001, ANN201, ANN202 -- Triton kernels carry no annotations
"""The Triton side of rope.py: q and k go through one launch, a program for some heads of some tokens.

A program takes its heads either from q or from k, by its place in the grid, so one launch does both
and the cosines are read once for every HEADS_PER_PROGRAM heads. Loads of a tile all come before its
stores, and an element is loaded and stored by the same thread: the result may take the input's place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from whet.kernels.launch import ceil_div, constexpr, jit, launch, power_of_2, tl

if TYPE_CHECKING:
    from whet.kernels.rope import HeadNorm

Pair = tuple[torch.Tensor, torch.Tensor]
OptionalPair = tuple["torch.Tensor | None", "torch.Tensor | None"]
Norms = tuple["HeadNorm | None", "HeadNorm | None"]

HEADS_PER_PROGRAM = 4


@jit
def _load(x_ptr, row, col, row_stride, mask):
    return tl.load(x_ptr + row * row_stride + col, mask=mask, other=0.0).to(tl.float32)


@jit
def _columns(WIDTH: constexpr, HALF: constexpr, INTERLEAVED: constexpr,
             BLOCK_R: constexpr, BLOCK_P: constexpr):  # fmt: skip
    """Return where a head's first and second partners and its unrotated rest lie, and their masks."""
    pair = tl.arange(0, BLOCK_R)[None, :]
    rest = 2 * HALF + tl.arange(0, BLOCK_P)[None, :]
    if INTERLEAVED:
        return 2 * pair, 2 * pair + 1, rest, pair < HALF, rest < WIDTH
    return pair, pair + HALF, rest, pair < HALF, rest < WIDTH


@jit
def _store(out_ptr, row, col, row_stride, value, mask):
    tl.store(out_ptr + row * row_stride + col, value.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def forward_kernel(
    q_ptr, k_ptr, qo_ptr, ko_ptr, cos_ptr, sin_ptr, qw_ptr, kw_ptr, q_t, q_h, k_t, k_h, qo_t, qo_h,
    ko_t, ko_h, cos_t, sin_t, num, q_heads, k_heads, q_eps, k_eps, q_offset, k_offset,
    WIDTH: constexpr, HALF: constexpr, INTERLEAVED: constexpr, HEADS: constexpr,
    BLOCK_T: constexpr, BLOCK_R: constexpr, BLOCK_P: constexpr,
):  # fmt: skip
    """Normalise and rotate some heads, of q or of k, of BLOCK_T tokens.

    (a, b) -> (a cos - b sin, b cos + a sin) after x rstd w, in float32. Reads and writes each element
    of q and k once; cosines and sines once for every HEADS heads.
    """
    token = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    inside = token < num
    chunk = tl.program_id(1)
    q_chunks = tl.cdiv(q_heads, HEADS)
    of_k = chunk >= q_chunks
    first = tl.where(of_k, chunk - q_chunks, chunk) * HEADS
    last = tl.minimum(first + HEADS, tl.where(of_k, k_heads, q_heads))
    x_ptr, out_ptr = tl.where(of_k, k_ptr, q_ptr), tl.where(of_k, ko_ptr, qo_ptr)
    x_t, x_h = tl.where(of_k, k_t, q_t), tl.where(of_k, k_h, q_h).to(tl.int64)
    o_t, o_h = tl.where(of_k, ko_t, qo_t), tl.where(of_k, ko_h, qo_h).to(tl.int64)
    col_a, col_b, col_p, pair, rest = _columns(WIDTH, HALF, INTERLEAVED, BLOCK_R, BLOCK_P)
    if cos_ptr is not None:
        cos = _load(cos_ptr, token, tl.arange(0, BLOCK_R)[None, :], cos_t, inside & pair)
        sin = _load(sin_ptr, token, tl.arange(0, BLOCK_R)[None, :], sin_t, inside & pair)
    if qw_ptr is not None:
        w_ptr = tl.where(of_k, kw_ptr, qw_ptr)
        offset, eps = tl.where(of_k, k_offset, q_offset), tl.where(of_k, k_eps, q_eps)
        w_a = _load(w_ptr, 0, col_a, 0, pair) + offset
        w_b = _load(w_ptr, 0, col_b, 0, pair) + offset
        w_p = _load(w_ptr, 0, col_p, 0, rest) + offset
    for head in range(first, last):
        x_base, o_base = x_ptr + head * x_h, out_ptr + head * o_h
        a = _load(x_base, token, col_a, x_t, inside & pair)
        b = _load(x_base, token, col_b, x_t, inside & pair)
        p = _load(x_base, token, col_p, x_t, inside & rest)
        if qw_ptr is not None:
            square = tl.sum(a * a, 1) + tl.sum(b * b, 1) + tl.sum(p * p, 1)
            rstd = (1 / tl.sqrt(square / WIDTH + eps))[:, None]
            a, b, p = a * rstd * w_a, b * rstd * w_b, p * rstd * w_p
        if cos_ptr is not None:
            a, b = a * cos - b * sin, b * cos + a * sin
        _store(o_base, token, col_a, o_t, a, inside & pair)
        _store(o_base, token, col_b, o_t, b, inside & pair)
        _store(o_base, token, col_p, o_t, p, inside & rest)


@jit
def backward_kernel(
    dq_ptr, dk_ptr, q_ptr, k_ptr, qo_ptr, ko_ptr, cos_ptr, sin_ptr, qw_ptr, kw_ptr, dw_ptr,
    dq_t, dq_h, dk_t, dk_h, q_t, q_h, k_t, k_h, qo_t, qo_h, ko_t, ko_h, cos_t, sin_t,
    num, q_heads, k_heads, q_eps, k_eps, q_offset, k_offset,
    WIDTH: constexpr, HALF: constexpr, INTERLEAVED: constexpr, HEADS: constexpr,
    BLOCK_T: constexpr, BLOCK_R: constexpr, BLOCK_P: constexpr,
):  # fmt: skip
    """Turn the gradients of some heads of BLOCK_T tokens back, then through the norm.

    (a, b) -> (a cos + b sin, b cos - a sin) =: g; with xhat = x rstd: dw = sum g xhat, one row of
    partial sums for each program; dx = rstd (g w - xhat mean(g w xhat)). Float32. Reads and writes each
    element once; with a norm also reads q and k.
    """
    token = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    inside = token < num
    chunk = tl.program_id(1)
    q_chunks = tl.cdiv(q_heads, HEADS)
    of_k = chunk >= q_chunks
    first = tl.where(of_k, chunk - q_chunks, chunk) * HEADS
    last = tl.minimum(first + HEADS, tl.where(of_k, k_heads, q_heads))
    dy_ptr, out_ptr = tl.where(of_k, dk_ptr, dq_ptr), tl.where(of_k, ko_ptr, qo_ptr)
    dy_t, dy_h = tl.where(of_k, dk_t, dq_t), tl.where(of_k, dk_h, dq_h).to(tl.int64)
    o_t, o_h = tl.where(of_k, ko_t, qo_t), tl.where(of_k, ko_h, qo_h).to(tl.int64)
    col_a, col_b, col_p, pair, rest = _columns(WIDTH, HALF, INTERLEAVED, BLOCK_R, BLOCK_P)
    if cos_ptr is not None:
        cos = _load(cos_ptr, token, tl.arange(0, BLOCK_R)[None, :], cos_t, inside & pair)
        sin = _load(sin_ptr, token, tl.arange(0, BLOCK_R)[None, :], sin_t, inside & pair)
    if qw_ptr is not None:
        x_ptr, x_t, x_h = (
            tl.where(of_k, k_ptr, q_ptr),
            tl.where(of_k, k_t, q_t),
            tl.where(of_k, k_h, q_h),
        )
        w_ptr = tl.where(of_k, kw_ptr, qw_ptr)
        offset, eps = tl.where(of_k, k_offset, q_offset), tl.where(of_k, k_eps, q_eps)
        w_a = _load(w_ptr, 0, col_a, 0, pair) + offset
        w_b = _load(w_ptr, 0, col_b, 0, pair) + offset
        w_p = _load(w_ptr, 0, col_p, 0, rest) + offset
        dw_a = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        dw_b = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        dw_p = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    for head in range(first, last):
        dy_base, o_base = dy_ptr + head * dy_h, out_ptr + head * o_h
        a = _load(dy_base, token, col_a, dy_t, inside & pair)
        b = _load(dy_base, token, col_b, dy_t, inside & pair)
        p = _load(dy_base, token, col_p, dy_t, inside & rest)
        if cos_ptr is not None:
            a, b = a * cos + b * sin, b * cos - a * sin
        if qw_ptr is not None:
            x_base = x_ptr + head * x_h
            x_a = _load(x_base, token, col_a, x_t, inside & pair)
            x_b = _load(x_base, token, col_b, x_t, inside & pair)
            x_p = _load(x_base, token, col_p, x_t, inside & rest)
            square = tl.sum(x_a * x_a, 1) + tl.sum(x_b * x_b, 1) + tl.sum(x_p * x_p, 1)
            rstd = (1 / tl.sqrt(square / WIDTH + eps))[:, None]
            x_a, x_b, x_p = x_a * rstd, x_b * rstd, x_p * rstd
            dw_a += a * x_a
            dw_b += b * x_b
            dw_p += p * x_p
            a, b, p = a * w_a, b * w_b, p * w_p
            projection = tl.sum(a * x_a, 1) + tl.sum(b * x_b, 1) + tl.sum(p * x_p, 1)
            projection = (projection / WIDTH)[:, None]
            a = rstd * (a - x_a * projection)
            b = rstd * (b - x_b * projection)
            p = rstd * (p - x_p * projection)
        _store(o_base, token, col_a, o_t, a, inside & pair)
        _store(o_base, token, col_b, o_t, b, inside & pair)
        _store(o_base, token, col_p, o_t, p, inside & rest)
    if dw_ptr is not None:
        row = (tl.program_id(0) * tl.num_programs(1) + chunk).to(tl.int64)
        _store(dw_ptr, row, col_a, WIDTH, tl.sum(dw_a, 0)[None, :], pair)
        _store(dw_ptr, row, col_b, WIDTH, tl.sum(dw_b, 0)[None, :], pair)
        _store(dw_ptr, row, col_p, WIDTH, tl.sum(dw_p, 0)[None, :], rest)


def launch_options(width: int, half: int, interleaved: bool) -> dict[str, Any]:
    """Return the constants of a launch.

    Args:
        width: A head's width.
        half: Half of its rotated part.
        interleaved: Which entries are partners.
    """
    return {
        "WIDTH": width, "HALF": half, "INTERLEAVED": interleaved, "HEADS": HEADS_PER_PROGRAM,
        "BLOCK_T": max(1, 2048 // power_of_2(width)), "BLOCK_R": power_of_2(half),
        "BLOCK_P": power_of_2(width - 2 * half), "num_warps": 4,
    }  # fmt: skip


def _numbers(cos: torch.Tensor | None, sin: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor,
             norms: Norms) -> tuple[float, ...]:  # fmt: skip
    """List the arguments both kernels take after the tensors' strides."""
    assert (norms[0] is None) == (norms[1] is None), "q and k are both normed, or neither"
    rows = (0 if cos is None else cos.stride(0), 0 if sin is None else sin.stride(0))
    eps = tuple(0.0 if norm is None else norm.eps for norm in norms)
    offset = tuple(1.0 if norm is not None and norm.unit_offset else 0.0 for norm in norms)
    return (*rows, q.shape[0], q.shape[1], k.shape[1], *eps, *offset)


def _strides(*tensors: torch.Tensor | None) -> list[int]:
    return [n for x in tensors for n in ((0, 0) if x is None else (x.stride(0), x.stride(1)))]


def launch_forward(xs: Pair, outs: Pair, cos: torch.Tensor | None, sin: torch.Tensor | None,
                    interleaved: bool, norms: Norms) -> None:  # fmt: skip
    """Launch `forward_kernel`; see rope.rope_forward."""
    (q, k), (num, _, width) = xs, xs[0].shape
    chunks = ceil_div(q.shape[1], HEADS_PER_PROGRAM) + ceil_div(k.shape[1], HEADS_PER_PROGRAM)
    options = launch_options(width, width // 2 if cos is None else cos.shape[-1], interleaved)
    grid = (ceil_div(num, options["BLOCK_T"]), chunks)
    weights = [None if norm is None else norm.weight_K for norm in norms]
    if num:
        launch(
            forward_kernel, grid, *xs, *outs, cos, sin, *weights, *_strides(*xs, *outs),
            *_numbers(cos, sin, q, k, norms), **options,
        )  # fmt: skip


def launch_backward(
    dys: Pair, xs: OptionalPair, outs: Pair,
    cos: torch.Tensor | None, sin: torch.Tensor | None, interleaved: bool, norms: Norms,
    dweights: OptionalPair,
) -> None:  # fmt: skip
    """Launch `backward_kernel` and add up the weights' gradients; see rope.rope_backward."""
    (dq, dk), (num, heads, width) = dys, dys[0].shape
    chunks = ceil_div(heads, HEADS_PER_PROGRAM) + ceil_div(dk.shape[1], HEADS_PER_PROGRAM)
    options = launch_options(width, width // 2 if cos is None else cos.shape[-1], interleaved)
    grid = (ceil_div(num, options["BLOCK_T"]), chunks)
    weights = [None if norm is None else norm.weight_K for norm in norms]
    partial = None
    if any(dweight is not None for dweight in dweights):
        partial = dq.new_empty((*grid, width), dtype=torch.float32)
    if num == 0:
        return
    launch(
        backward_kernel, grid, *dys, *xs, *outs, cos, sin, *weights, partial,
        *_strides(*dys, *xs, *outs), *_numbers(cos, sin, dq, dk, norms), **options,
    )  # fmt: skip
    if partial is not None:
        split = ceil_div(heads, HEADS_PER_PROGRAM)
        for dweight, part in zip(dweights, (partial[:, :split], partial[:, split:]), strict=True):
            if dweight is not None:
                dweight.add_(part.sum((0, 1)))
