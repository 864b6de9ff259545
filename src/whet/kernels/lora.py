"""The part of LoRA's backward pass that reads the big gradient dY (arXiv 2106.09685).

Forward:   U = X A^T, Y = X W^T + s U B^T.
Backward:  P = s dY B and dB = s dY^T U, in one pass over dY; then dX = dY W + P A and dA = P^T X, which
           read no T x N tensor twice and are plain products.
"""

# ruff: noqa: ANN001, ANN202 -- Triton kernels carry no annotations

from __future__ import annotations

import torch

from whet.kernels.launch import ceil_div, constexpr, jit, launch, power_of_2, tl, uses_triton
from whet.kernels.spec import Aot, Case, Spec, Tensors, normal

# The one-pass kernel leaves 8 R / BLOCK_N + 8 R / ROWS bytes of partial sums for each element of dY,
# and saves reading it again: 2 bytes in bfloat16. At rank 32 nothing is left of that, and on sm_75 the
# kernel would spill (408 bytes a thread); two products are the better way from there.
MAX_RANK = 16
ROWS = 512


def lora_backward(
    dy_TN: torch.Tensor,
    b_NR: torch.Tensor,
    u_TR: torch.Tensor,
    scale: float,
    *,
    p_TR: torch.Tensor | None = None,
    db_NR: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return P = s dY B, and add s dY^T U to the gradient of B.

    Args:
        dy_TN: Gradient of the projection's output; any row stride.
        b_NR: The adapter's B, in dy's dtype, contiguous along R.
        u_TR: X A^T of the forward, in dy's dtype, contiguous along R.
        scale: alpha / rank.
        p_TR: Where to write P; any row stride.
        db_NR: Float32 accumulator of B's gradient, or None.

    Returns:
        p_TR.
    """
    if p_TR is None:
        p_TR = torch.empty_like(u_TR, memory_format=torch.contiguous_format)
    if uses_triton(dy_TN) and db_NR is not None and u_TR.shape[1] <= MAX_RANK:
        return _launch(dy_TN, b_NR, u_TR, scale, p_TR, db_NR)
    torch.mm(dy_TN, b_NR, out=p_TR)
    p_TR.mul_(scale)
    if db_NR is not None:
        db_NR.add_(sum_product(dy_TN, u_TR), alpha=scale)
    return p_TR


def sum_product(left_TN: torch.Tensor, right_TR: torch.Tensor) -> torch.Tensor:
    """Return left^T right in float32, for a sum over tokens that must not be rounded to 16 bits.

    Rounded, the largest entries of such a sum are off by 2^-9 of themselves, which is more than all
    rounding before them comes to. On the CPU no product of 16-bit operands has a float32 result; there
    the operands are widened, which costs what is told at the caller.

    Args:
        left_TN: float32, float16 or bfloat16.
        right_TR: The same dtype.
    """
    if left_TN.dtype == torch.float32:
        return torch.mm(left_TN.t(), right_TR)
    if left_TN.is_cuda:
        return torch.mm(left_TN.t(), right_TR, out_dtype=torch.float32)
    return torch.mm(left_TN.float().t(), right_TR.float())


@jit
def _lora_backward(
    dy_ptr, b_ptr, u_ptr, p_ptr, db_ptr, dy_stride, b_stride, u_stride, num, width, rank, scale,
    ROWS: constexpr, BLOCK_T: constexpr, BLOCK_N: constexpr, BLOCK_R: constexpr,
):  # fmt: skip
    """Compute this tile's shares of P = s dY B and dB = s dY^T U; the tile is read once.

    A program goes down ROWS rows of BLOCK_N columns. It writes its share of P (to be added over the
    column blocks) and keeps dB (to be added over the row blocks). Products of the tensors' own dtype,
    sums in float32. Reads 1 element; writes 4 R / BLOCK_N + 4 R / ROWS bytes each.
    """
    part_n, part_t = tl.program_id(0), tl.program_id(1)
    col = part_n * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    col_in, r_in = col < width, r < rank
    b_mask = col_in[:, None] & r_in[None, :]
    b_at = col.to(tl.int64)[:, None] * b_stride + r[None, :]
    b = tl.load(b_ptr + b_at, mask=b_mask, other=0.0)
    db = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for start in range(0, ROWS, BLOCK_T):
        row = part_t.to(tl.int64) * ROWS + start + tl.arange(0, BLOCK_T)
        row_in = row < num
        dy = tl.load(
            dy_ptr + row[:, None] * dy_stride + col[None, :],
            mask=row_in[:, None] & col_in[None, :], other=0.0,
        )  # fmt: skip
        u_mask = row_in[:, None] & r_in[None, :]
        u = tl.load(u_ptr + row[:, None] * u_stride + r[None, :], mask=u_mask, other=0.0)
        p = tl.dot(dy, b, input_precision="ieee") * scale
        p_at = (part_n.to(tl.int64) * num + row[:, None]) * rank + r[None, :]
        tl.store(p_ptr + p_at, p, mask=u_mask)
        db = tl.dot(tl.trans(dy), u, db, input_precision="ieee")
    db_at = (part_t.to(tl.int64) * width + col[:, None]) * rank + r[None, :]
    tl.store(db_ptr + db_at, db * scale, mask=b_mask)


def _options(rank: int, itemsize: int) -> dict[str, int]:
    # Float32 products are made one by one, from registers: smaller tiles.
    block_n = 256 if itemsize == 2 else 64
    return {
        "ROWS": ROWS, "BLOCK_T": 32, "BLOCK_N": block_n, "BLOCK_R": max(16, power_of_2(rank)),
        "num_warps": 8, "num_stages": 3,
    }  # fmt: skip


def _launch(
    dy: torch.Tensor,
    b: torch.Tensor,
    u: torch.Tensor,
    scale: float,
    p: torch.Tensor,
    db: torch.Tensor,
) -> torch.Tensor:
    (num, width), rank = dy.shape, u.shape[1]
    if num == 0:
        return p
    options = _options(rank, dy.itemsize)
    grid = (ceil_div(width, options["BLOCK_N"]), ceil_div(num, ROWS))
    p_parts = dy.new_empty((grid[0], num, rank), dtype=torch.float32)
    db_parts = dy.new_empty((grid[1], width, rank), dtype=torch.float32)
    launch(
        _lora_backward, grid, dy, b, u, p_parts, db_parts, dy.stride(0), b.stride(0), u.stride(0),
        num, width, rank, scale, **options,
    )  # fmt: skip
    db.add_(db_parts.sum(0))
    return p.copy_(p_parts.sum(0))


def _make_inputs(
    case: Case, dtype: torch.dtype, device: str, generator: torch.Generator
) -> Tensors:
    num, width, rank = case["T"], case["N"], case["R"]
    pad = case.get("pad", 0)
    return {
        "dy": normal((num, width), dtype, device, generator, pad=pad),
        "b": normal((width, rank), dtype, device, generator, std=0.1),
        "u": normal((num, rank), dtype, device, generator, pad=pad),
    }


def _original(case: Case, inputs: Tensors) -> Tensors:
    return {"_y": torch.nn.functional.linear(inputs["u"], inputs["b"]) * 0.5}


def _backward(case: Case, inputs: Tensors, saved: Tensors) -> Tensors:
    b, u = inputs["b"], inputs["u"]
    db = torch.zeros_like(b, dtype=torch.float32)
    return {"du": lora_backward(inputs["dy"], b, u, 0.5, db_NR=db), "db": db}


def _bytes_moved(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    num, width, rank = case["T"], case["N"], case["R"]
    return 0, (num * width + 2 * (num + width) * rank) * dtype.itemsize


SPEC = Spec(
    name="lora",
    summary="P = s dY B and dB = s dY^T U in one pass over dY to rank 16; above, two products",
    traffic="1 element of dY each, and 8 R (1/256 + 1/512) bytes of partial sums",
    cases=(
        Case("rank 1", {"T": 7, "N": 33, "R": 1}),
        Case("rank 8", {"T": 37, "N": 70, "R": 8, "pad": 3}),
        Case("rank 16, two row parts", {"T": 515, "N": 19, "R": 16}),
        Case("rank 12, two column parts", {"T": 5, "N": 259, "R": 12, "pad": 1}),
        Case("rank 256", {"T": 9, "N": 21, "R": 256}),
        Case("one token", {"T": 1, "N": 16, "R": 4}),
    ),
    large=(
        Case("rank 16", {"T": 4099, "N": 4096, "R": 16}),
        Case("rank 9", {"T": 1027, "N": 14336, "R": 9}),
        Case("rank 256", {"T": 2051, "N": 1024, "R": 256}),
    ),
    bench={
        "cpu": Case("T 1024, N 1536, R 16", {"T": 1024, "N": 1536, "R": 16}),
        "cuda": Case("T 16384, N 4096, R 16", {"T": 16384, "N": 4096, "R": 16}),
    },
    make_inputs=_make_inputs,
    original=_original,
    forward=None,
    backward=_backward,
    upstream={"_y": "dy"},
    leaves=("u", "b"),
    bytes_moved=_bytes_moved,
    flops=lambda case: (0, 4 * case["T"] * case["N"] * case["R"]),
    aot=(
        Aot(
            _lora_backward,
            "*T *T *T *fp32 *fp32 i32 i32 i32 i32 i32 i32 fp32",
            (_options(16, 2),),
        ),
        Aot(
            _lora_backward,
            "*fp32 *fp32 *fp32 *fp32 *fp32 i32 i32 i32 i32 i32 i32 fp32",
            (_options(16, 4),),
        ),
    ),
)
SPECS = (SPEC,)
