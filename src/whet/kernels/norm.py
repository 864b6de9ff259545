"""RMSNorm (arXiv 1910.07467) and LayerNorm (arXiv 1607.06450), with a residual added on the way out.

Forward:   y = (x - mean) * rstd * w + b (+ residual); RMSNorm has mean = 0 and no b.
Backward:  dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) (+ add), g = dy * w, xhat = (x-mean) * rstd;
           dw = sum_T dy * xhat, db = sum_T dy. RMSNorm leaves out mean(g).
With `unit_offset` the weight is 1 + w (Gemma). Everything is computed in float32 and rounded once.
"""

# ruff: noqa: ANN001, ANN202 -- Triton kernels carry no annotations

from __future__ import annotations

import torch

from whet.kernels.launch import ceil_div, constexpr, jit, launch, power_of_2, tl, uses_triton
from whet.kernels.spec import Aot, Case, Spec, Tensors, normal, wide

# Rows whose share of the weight's gradient one program sums: fixed, so that the order of the sum, and
# with it the result, is the same on every GPU.
ROWS_PER_SUM = 256


def norm_forward(
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor | None,
    *,
    eps: float,
    centered: bool,
    unit_offset: bool = False,
    residual_TD: torch.Tensor | None = None,
    out_TD: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Normalise each row.

    Args:
        x_TD: Rows; contiguous along D.
        weight_D: Scale.
        bias_D: Shift, or None.
        eps: Added to the variance.
        centered: LayerNorm (True) or RMSNorm (False).
        unit_offset: Scale by 1 + weight.
        residual_TD: Added to the result.
        out_TD: Where to write; a new tensor of x's dtype when None.

    Returns:
        (y_TD, mean_T in float32 or None, rstd_T in float32).
    """
    out_TD = torch.empty_like(x_TD) if out_TD is None else out_TD
    if uses_triton(x_TD):
        return _launch_forward(
            x_TD, weight_D, bias_D, eps, centered, unit_offset, residual_TD, out_TD
        )
    x = x_TD.float()
    mean = None
    if centered:
        mean = x.mean(-1)
        x = x - mean[:, None]
    rstd = torch.linalg.vector_norm(x, dim=-1).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y = (x * rstd[:, None]).mul_(_scale(weight_D, unit_offset))
    if bias_D is not None:
        y.add_(bias_D.float())
    if residual_TD is not None:
        y.add_(residual_TD.float())
    out_TD.copy_(y)
    return out_TD, mean, rstd


def norm_backward(
    dy_TD: torch.Tensor,
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    mean_T: torch.Tensor | None,
    rstd_T: torch.Tensor,
    *,
    unit_offset: bool = False,
    add_TD: torch.Tensor | None = None,
    out_TD: torch.Tensor | None = None,
    dweight_D: torch.Tensor | None = None,
    dbias_D: torch.Tensor | None = None,
) -> torch.Tensor:
    """Backward pass of `norm_forward` to x, weight and bias.

    Args:
        dy_TD: Gradient of the normalised output.
        x_TD: The forward's input.
        weight_D: Its scale.
        mean_T: What the forward returned.
        rstd_T: What the forward returned.
        unit_offset: As in the forward.
        add_TD: Added to dx: the gradient that flows around the norm.
        out_TD: Where to write dx; may be dy.
        dweight_D: Float32 accumulator; the weight's gradient is added to it when given.
        dbias_D: The same for the bias.

    Returns:
        dx_TD (+ add_TD).
    """
    out_TD = torch.empty_like(x_TD) if out_TD is None else out_TD
    if uses_triton(x_TD):
        return _launch_backward(
            dy_TD, x_TD, weight_D, mean_T, rstd_T, unit_offset, add_TD, out_TD, dweight_D, dbias_D
        )
    xhat = x_TD.float()
    if mean_T is not None:
        xhat = xhat - mean_T[:, None]
    xhat = xhat * rstd_T[:, None]
    g = dy_TD.float()
    if dweight_D is not None:
        dweight_D.add_((g * xhat).sum(0))
    if dbias_D is not None:
        dbias_D.add_(g.sum(0))
    g = g * _scale(weight_D, unit_offset)
    projection = torch.linalg.vecdot(g, xhat).div_(x_TD.shape[-1])
    dx = torch.addcmul(g, xhat, projection[:, None], value=-1)
    if mean_T is not None:
        dx.sub_(g.mean(-1, keepdim=True))
    dx.mul_(rstd_T[:, None])
    if add_TD is not None:
        dx.add_(add_TD.float())
    return out_TD.copy_(dx)


def _scale(weight_D: torch.Tensor, unit_offset: bool) -> torch.Tensor:
    weight = weight_D.float()
    return weight + 1 if unit_offset else weight


@jit
def _norm_forward(
    x_ptr, w_ptr, b_ptr, res_ptr, y_ptr, mean_ptr, rstd_ptr, x_stride, res_stride, y_stride, width, eps,
    UNIT_OFFSET: constexpr, BLOCK_D: constexpr,
):  # fmt: skip
    """Compute y = (x - mean) rstd w + b + residual, one program a row, the row kept in registers.

    Sums in float32. Reads x (and residual) and writes y: 2 (3) elements each.
    """
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_D)
    inside = col < width
    x = tl.load(x_ptr + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
    if mean_ptr is not None:
        mean = tl.sum(x, 0) / width
        tl.store(mean_ptr + row, mean)
        x = tl.where(inside, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
    tl.store(rstd_ptr + row, rstd)
    w = tl.load(w_ptr + col, mask=inside, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        w += 1
    y = x * rstd * w
    if b_ptr is not None:
        y += tl.load(b_ptr + col, mask=inside, other=0.0).to(tl.float32)
    if res_ptr is not None:
        y += tl.load(res_ptr + row * res_stride + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * y_stride + col, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _norm_backward(
    dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, add_ptr, dx_ptr, dy_stride, x_stride, add_stride,
    dx_stride, width, UNIT_OFFSET: constexpr, BLOCK_D: constexpr,
):  # fmt: skip
    """Compute dx = rstd (g - mean(g) - xhat mean(g xhat)) + add with g = dy w, one program a row.

    Sums in float32. Reads dy, x (and add) and writes dx: 3 (4) elements each.
    """
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_D)
    inside = col < width
    xhat = tl.load(x_ptr + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row)
    if mean_ptr is not None:
        xhat = tl.where(inside, xhat - tl.load(mean_ptr + row), 0.0)
    xhat *= rstd
    w = tl.load(w_ptr + col, mask=inside, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        w += 1
    g = tl.load(dy_ptr + row * dy_stride + col, mask=inside, other=0.0).to(tl.float32) * w
    dx = g - xhat * (tl.sum(g * xhat, 0) / width)
    if mean_ptr is not None:
        dx -= tl.sum(g, 0) / width
    dx *= rstd
    if add_ptr is not None:
        dx += tl.load(add_ptr + row * add_stride + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row * dx_stride + col, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@jit
def _norm_weight_backward(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, dw_ptr, db_ptr, dy_stride, x_stride, num, width,
    ROWS: constexpr, BLOCK_T: constexpr, BLOCK_D: constexpr,
):  # fmt: skip
    """Compute dw = sum_T dy xhat and db = sum_T dy over ROWS rows: one row of the partial sums.

    Only full fine-tuning asks for it, so it reads dy and x once more rather than crowd the registers
    of the kernel above. Sums in float32. Reads 2 elements each; writes 4 bytes for every ROWS of them.
    """
    part = tl.program_id(0)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = col < width
    dw = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    db = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(0, ROWS, BLOCK_T):
        row = part.to(tl.int64) * ROWS + start + tl.arange(0, BLOCK_T)
        mask = (row < num)[:, None] & inside[None, :]
        g = tl.load(dy_ptr + row[:, None] * dy_stride + col[None, :], mask=mask, other=0.0)
        g = g.to(tl.float32)
        if dw_ptr is not None:
            x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0)
            xhat = x.to(tl.float32)
            if mean_ptr is not None:
                xhat -= tl.load(mean_ptr + row, mask=row < num, other=0.0)[:, None]
            dw += g * xhat * tl.load(rstd_ptr + row, mask=row < num, other=0.0)[:, None]
        if db_ptr is not None:
            db += g
    if dw_ptr is not None:
        tl.store(dw_ptr + part * width + col, tl.sum(dw, 0), mask=inside)
    if db_ptr is not None:
        tl.store(db_ptr + part * width + col, tl.sum(db, 0), mask=inside)


def _row_options(width: int) -> dict[str, int]:
    """Return the block that holds a row, and the warps that keep it in registers."""
    block = power_of_2(width)
    return {"BLOCK_D": block, "num_warps": min(16, max(1, block // 512))}


def _launch_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, centered: bool,
    unit_offset: bool, residual: torch.Tensor | None, out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:  # fmt: skip
    num, width = x.shape
    rstd = torch.empty(num, dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if centered else None
    if num:
        launch(
            _norm_forward, (num,), x, weight, bias, residual, out, mean, rstd, x.stride(0),
            0 if residual is None else residual.stride(0), out.stride(0), width, eps,
            UNIT_OFFSET=unit_offset, **_row_options(width),
        )  # fmt: skip
    return out, mean, rstd


def _launch_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    unit_offset: bool,
    add: torch.Tensor | None,
    out: torch.Tensor,
    dweight: torch.Tensor | None,
    dbias: torch.Tensor | None,
) -> torch.Tensor:
    num, width = x.shape
    if num == 0:
        return out
    if dweight is not None or dbias is not None:  # first, because out may be dy
        parts = ceil_div(num, ROWS_PER_SUM)
        dw = None if dweight is None else dy.new_empty((parts, width), dtype=torch.float32)
        db = None if dbias is None else dy.new_empty((parts, width), dtype=torch.float32)
        launch(
            _norm_weight_backward, (parts, ceil_div(width, 128)), dy, x, mean, rstd, dw, db,
            dy.stride(0), x.stride(0), num, width,
            ROWS=ROWS_PER_SUM, BLOCK_T=16, BLOCK_D=128, num_warps=4,
        )  # fmt: skip
        if dweight is not None and dw is not None:
            dweight.add_(dw.sum(0))
        if dbias is not None and db is not None:
            dbias.add_(db.sum(0))
    launch(
        _norm_backward, (num,), dy, x, weight, mean, rstd, add, out, dy.stride(0), x.stride(0),
        0 if add is None else add.stride(0), out.stride(0), width,
        UNIT_OFFSET=unit_offset, **_row_options(width),
    )  # fmt: skip
    return out


def _make_inputs(
    case: Case, dtype: torch.dtype, device: str, generator: torch.Generator
) -> Tensors:
    num, width = case["T"], case["D"]
    shape, pad = (num, width), case.get("pad", 0)
    inputs = {
        "x": normal(shape, dtype, device, generator, pad=pad, mean=0.5),
        "weight": normal((width,), dtype, device, generator, mean=case.get("mean", 1.0), std=0.3),
        "dy": normal(shape, dtype, device, generator, pad=pad),
    }
    if case.get("bias"):
        inputs["bias"] = normal((width,), dtype, device, generator)
    for name in ("residual", "add"):
        if case.get(name):
            inputs[name] = normal(shape, dtype, device, generator, pad=pad)
    return inputs


def _original(case: Case, inputs: Tensors) -> Tensors:
    x, weight = inputs["x"], inputs["weight"]
    if case.get("centered"):
        bias = inputs.get("bias")
        y = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)
    else:
        x32 = wide(x)
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-5)
        if case.get("unit_offset"):
            y = (normed * (1 + wide(weight))).to(x.dtype)
        else:
            y = weight * normed.to(x.dtype)
    if "residual" in inputs:
        y = y + inputs["residual"]
    return {"y": y, "_around": x.view_as(x)}


def _forward(case: Case, inputs: Tensors) -> Tensors:
    y, mean, rstd = norm_forward(
        inputs["x"], inputs["weight"], inputs.get("bias"), eps=1e-5,
        centered=case.get("centered", False), unit_offset=case.get("unit_offset", False),
        residual_TD=inputs.get("residual"),
    )  # fmt: skip
    return {"y": y, "_rstd": rstd} | ({} if mean is None else {"_mean": mean})


def _backward(case: Case, inputs: Tensors, saved: Tensors) -> Tensors:
    weight, bias = inputs["weight"], inputs.get("bias")
    trained = "weight" not in case.get("frozen", ())
    dweight = torch.zeros_like(weight, dtype=torch.float32) if trained else None
    dbias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
    dx = norm_backward(
        inputs["dy"], inputs["x"], weight, saved.get("_mean"), saved["_rstd"],
        unit_offset=case.get("unit_offset", False), add_TD=inputs.get("add"),
        dweight_D=dweight, dbias_D=dbias,
    )  # fmt: skip
    gradients = {"dx": dx, "dweight": dweight, "dbias": dbias}
    return {name: value for name, value in gradients.items() if value is not None}


def _bytes_moved(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    each = case["T"] * case["D"] * dtype.itemsize
    again = 0 if case.get("frozen") else 2
    return each * (3 if case.get("residual") else 2), each * (again + (4 if case.get("add") else 3))


SPEC = Spec(
    name="norm",
    summary="RMSNorm and LayerNorm, unit offset, residual added after; deterministic weight gradients",
    traffic="forward 2 elements each, backward 3; with residual or `add` one more",
    cases=(
        Case("rms", {"T": 5, "D": 33, "add": True}),
        Case(
            "gemma", {"T": 4, "D": 40, "pad": 3, "unit_offset": True, "mean": 0.0, "residual": True}
        ),
        Case("layer", {"T": 7, "D": 50, "centered": True, "bias": True, "pad": 1, "add": True}),
        Case("one token, wide", {"T": 1, "D": 16383, "centered": True}),
        Case("two sums", {"T": 259, "D": 3, "bias": True, "centered": True}),
    ),
    large=(
        Case("rms", {"T": 4097, "D": 4096, "add": True}),
        Case("gemma", {"T": 1000, "D": 3584, "unit_offset": True, "mean": 0.0, "residual": True}),
        Case("layer", {"T": 2050, "D": 768, "centered": True, "bias": True, "pad": 8}),
        Case("widest", {"T": 300, "D": 16384, "add": True}),
    ),
    bench={
        "cpu": Case("T 1024, D 576", {"T": 1024, "D": 576, "frozen": ("weight",)}),
        "cuda": Case("T 16384, D 4096", {"T": 16384, "D": 4096, "frozen": ("weight",)}),
    },
    make_inputs=_make_inputs,
    original=_original,
    forward=_forward,
    backward=_backward,
    upstream={"y": "dy", "_around": "add"},
    leaves=("x", "weight", "bias"),
    bytes_moved=_bytes_moved,
    aot=(
        Aot(
            _norm_forward,
            "*T *T *T *T *T *fp32 *fp32 i32 i32 i32 i32 fp32",
            (
                {"b_ptr": None, "mean_ptr": None, "UNIT_OFFSET": True, **_row_options(4096)},
                {"UNIT_OFFSET": False, **_row_options(16384)},
            ),
        ),
        Aot(
            _norm_backward,
            "*T *T *T *fp32 *fp32 *T *T i32 i32 i32 i32 i32",
            (
                {"mean_ptr": None, "UNIT_OFFSET": True, **_row_options(4096)},
                {"UNIT_OFFSET": False, **_row_options(16384)},
            ),
        ),
        Aot(
            _norm_weight_backward,
            "*T *T *fp32 *fp32 *fp32 *fp32 i32 i32 i32 i32",
            ({"ROWS": ROWS_PER_SUM, "BLOCK_T": 16, "BLOCK_D": 128, "num_warps": 4},),
        ),
    ),
)
SPECS = (SPEC,)
