"""AdamW (arXiv 1711.05101) over a flat buffer, its two moments in float32 or in 8-bit blocks.

m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,
p = p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).
8-bit moments (arXiv 2110.02861): blocks of 256 with one float32 scale each and a code of 256 values,
the same as bitsandbytes'. The step uses the new moments before they are rounded to their codes.
"""

# ruff: noqa: ANN001, ANN202 -- Triton kernels carry no annotations

from __future__ import annotations

from functools import lru_cache

import torch

from whet.kernels.launch import ceil_div, constexpr, jit, launch, tl, uses_triton
from whet.kernels.spec import Aot, Case, Spec, Tensors, normal, wide

BLOCK_8BIT = 256


def adamw_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
) -> None:
    """One AdamW step in place, in float32 arithmetic.

    Args:
        param: Flat parameters, any float dtype.
        grad: Their gradients.
        exp_avg: float32 first moment.
        exp_avg_sq: float32 second moment.
        lr: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        step: Number of this step, from 1.
        grad_scale: The gradients are multiplied by it first (clipping, loss scaling).
    """
    numbers = (lr, beta1, beta2, eps, weight_decay, step, grad_scale)
    if uses_triton(param):
        _launch(param, grad, exp_avg, exp_avg_sq, None, None, numbers)
        return
    g = grad.float() * grad_scale
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
    p = param.float() * (1 - lr * weight_decay)
    param.copy_(p.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step)))


def adamw_8bit_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    exp_avg_scale: torch.Tensor,
    exp_avg_sq_scale: torch.Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
) -> None:
    """One AdamW step in place whose moments are 8-bit codes; `encode_8bit(zeros)` starts them.

    Args:
        param: Flat parameters, any float dtype.
        grad: Their gradients.
        exp_avg: uint8 codes of the first moment (signed code).
        exp_avg_sq: uint8 codes of the second moment (unsigned code).
        exp_avg_scale: float32 scale of each block of 256 codes.
        exp_avg_sq_scale: The same for the second moment.
        lr: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        step: Number of this step, from 1.
        grad_scale: The gradients are multiplied by it first (clipping, loss scaling).
    """
    numbers = (lr, beta1, beta2, eps, weight_decay, step, grad_scale)
    if uses_triton(param):
        _launch(param, grad, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, numbers)
        return
    m = decode_8bit(exp_avg, exp_avg_scale, signed=True)
    v = decode_8bit(exp_avg_sq, exp_avg_sq_scale, signed=False)
    adamw_(
        param, grad, m, v, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
        weight_decay=weight_decay, step=step, grad_scale=grad_scale,
    )  # fmt: skip
    for value, codes, scale, signed in (
        (m, exp_avg, exp_avg_scale, True),
        (v, exp_avg_sq, exp_avg_sq_scale, False),
    ):
        new_codes, new_scale = encode_8bit(value, signed=signed)
        codes.copy_(new_codes)
        scale.copy_(new_scale)


@lru_cache
def dynamic_code(signed: bool, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the 256 values of the dynamic code in order (arXiv 2110.02861, section 2).

    Each decade from 1e-6 to 1 has twice as many values as the one below it, at the middles of equal
    steps; 0 and 1 are values too.

    Args:
        signed: With a sign, or one bit more of fraction.
        device: Where to put it.
    """
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values.to(device)


@lru_cache
def _midpoints(signed: bool, device: torch.device) -> torch.Tensor:
    code = dynamic_code(signed, device)
    return (code[1:] + code[:-1]) / 2


def encode_8bit(values: torch.Tensor, *, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each value to the nearest multiple of its block's largest by a code.

    Args:
        values: Flat, float32.
        signed: Which code; unsigned takes values from 0 up.

    Returns:
        (codes in uint8, float32 scale of each block of 256).
    """
    num = values.numel()
    blocks = ceil_div(num, BLOCK_8BIT)
    padded = torch.nn.functional.pad(values, (0, blocks * BLOCK_8BIT - num)).view(blocks, -1)
    scale = padded.abs().amax(1)
    relative = padded / scale.clamp_min(1e-38)[:, None]
    return _nearest_codes(relative.view(-1)[:num], signed), scale


@lru_cache
def _guesses(signed: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a first guess for each upper half of a float32, and the midpoint above each code.

    The guess is the code of the lowest number with that half. No two midpoints share an upper half, so
    it is right, or one short when the number lies above the next midpoint.
    """
    middles = _midpoints(signed, device)
    upper = torch.arange(65536, device=device)
    bits = torch.where(upper < 32768, upper, upper - 65536) << 16
    lowest = torch.where(bits < 0, bits | 0xFFFF, bits).to(torch.int32).view(torch.float32)
    guess = torch.bucketize(lowest, middles, out_int32=True)
    return guess, torch.cat((middles, middles.new_full((1,), float("inf"))))


def _nearest_codes(relative: torch.Tensor, signed: bool) -> torch.Tensor:
    # Two look-ups where bisection takes eight: 9 ms a million numbers, not 40 (EPYC Zen 5, one thread).
    guess, next_middle = _guesses(signed, relative.device)
    code = guess.index_select(0, (relative.view(torch.int32) >> 16) & 0xFFFF)
    return code.add_(relative > next_middle.index_select(0, code)).to(torch.uint8)


def decode_8bit(codes: torch.Tensor, scale: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """Return the float32 values of 8-bit codes.

    Args:
        codes: Flat, uint8.
        scale: float32 scale of each block of 256.
        signed: Which code.
    """
    each = scale.repeat_interleave(BLOCK_8BIT)[: codes.numel()]
    return dynamic_code(signed, codes.device)[codes.int()] * each


@jit
def _encode(relative, middle_ptr):
    """Return how many of the 255 midpoints lie below each value, by bisection in 8 steps."""
    code = tl.zeros(relative.shape, tl.int32)
    half = 128
    for _ in tl.static_range(8):
        code += tl.where(relative > tl.load(middle_ptr + code + (half - 1)), half, 0)
        half = half // 2
    return code


@jit
def _adamw(
    p_ptr, g_ptr, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, m_code_ptr, v_code_ptr, m_middle_ptr,
    v_middle_ptr, num, decay, step_size, share1, share2, inverse_correction2, eps, grad_scale,
    ROWS: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """Compute m += (1 - b1)(g - m), v += (1 - b2)(g^2 - v), p = p decay - step_size m / (sqrt(v') + eps).

    Float32. Reads p, g, m, v and writes p, m, v: 3 elements and 16 (8-bit moments: 4) bytes each.
    """
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = at < num
    block_in = block * BLOCK < num
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32) * grad_scale
    p = tl.load(p_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if m_scale_ptr is not None:
        m_scale = tl.load(m_scale_ptr + block, mask=block_in, other=0.0)[:, None]
        v_scale = tl.load(v_scale_ptr + block, mask=block_in, other=0.0)[:, None]
        m = tl.load(m_code_ptr + tl.load(m_ptr + at, mask=inside, other=0).to(tl.int32)) * m_scale
        v = tl.load(v_code_ptr + tl.load(v_ptr + at, mask=inside, other=0).to(tl.int32)) * v_scale
    else:
        m = tl.load(m_ptr + at, mask=inside, other=0.0)
        v = tl.load(v_ptr + at, mask=inside, other=0.0)
    m += share1 * (g - m)
    v += share2 * (g * g - v)
    p = p * decay - step_size * m / (tl.sqrt(v * inverse_correction2) + eps)
    tl.store(p_ptr + at, p.to(p_ptr.dtype.element_ty), mask=inside)
    if m_scale_ptr is not None:
        m, v = tl.where(inside, m, 0.0), tl.where(inside, v, 0.0)
        m_scale, v_scale = tl.max(tl.abs(m), 1), tl.max(v, 1)
        tl.store(m_scale_ptr + block, m_scale, mask=block_in)
        tl.store(v_scale_ptr + block, v_scale, mask=block_in)
        m = _encode(m / tl.maximum(m_scale, 1e-38)[:, None], m_middle_ptr).to(tl.uint8)
        v = _encode(v / tl.maximum(v_scale, 1e-38)[:, None], v_middle_ptr).to(tl.uint8)
    tl.store(m_ptr + at, m, mask=inside)
    tl.store(v_ptr + at, v, mask=inside)


_OPTIONS = {"ROWS": 4, "BLOCK": BLOCK_8BIT, "num_warps": 4}


def _launch(
    param: torch.Tensor,
    grad: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    m_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    numbers: tuple[float, float, float, float, float, int, float],
) -> None:
    lr, beta1, beta2, eps, weight_decay, step, grad_scale = numbers
    tables: tuple[torch.Tensor | None, ...] = (None,) * 4
    if m_scale is not None:
        device = param.device
        tables = (
            dynamic_code(True, device), dynamic_code(False, device),
            _midpoints(True, device), _midpoints(False, device),
        )  # fmt: skip
    num = param.numel()
    if num:
        launch(
            _adamw, (ceil_div(num, 4 * BLOCK_8BIT),), param, grad, m, v, m_scale, v_scale, *tables,
            num, 1 - lr * weight_decay, lr / (1 - beta1**step), 1 - beta1, 1 - beta2,
            1 / (1 - beta2**step), eps, grad_scale, **_OPTIONS,
        )  # fmt: skip


_NUMBERS = {
    "lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "step": 3,
    "grad_scale": 0.5,
}  # fmt: skip


def _make_inputs(
    case: Case, dtype: torch.dtype, device: str, generator: torch.Generator
) -> Tensors:
    shape = (case["n"],)
    m = normal(shape, torch.float32, device, generator, std=0.1)
    v = normal(shape, torch.float32, device, generator, std=0.1).square_() + 1e-4
    return {
        "param": normal(shape, dtype, device, generator),
        "grad": normal(shape, dtype, device, generator),
        "exp_avg": m,
        "exp_avg_sq": v,
    }


def _make_inputs_8bit(
    case: Case, dtype: torch.dtype, device: str, generator: torch.Generator
) -> Tensors:
    inputs = _make_inputs(case, dtype, device, generator)
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        inputs[name], inputs[f"{name}_scale"] = encode_8bit(inputs[name], signed=signed)
    return inputs


def _original(case: Case, inputs: Tensors) -> Tensors:
    """AdamW as torch.optim's loop over tensors does it, the moments in float32."""
    n, p, g = _NUMBERS, inputs["param"].clone(), wide(inputs["grad"]) * _NUMBERS["grad_scale"]
    p.mul_(1 - n["lr"] * n["weight_decay"])
    m = inputs["exp_avg"].lerp(g, 1 - n["beta1"])
    v = (inputs["exp_avg_sq"] * n["beta2"]).addcmul_(g, g, value=1 - n["beta2"])
    below = v.sqrt() / (1 - n["beta2"] ** n["step"]) ** 0.5 + n["eps"]
    p.sub_((m / below * (n["lr"] / (1 - n["beta1"] ** n["step"]))).to(p.dtype))
    return {"param": p, "exp_avg": m, "exp_avg_sq": v}


def _exact_8bit(case: Case, inputs: Tensors) -> Tensors:
    """The step on the decoded moments, which are not rounded to codes again."""
    moments = {}
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        scale = inputs[f"{name}_scale"]
        code = dynamic_code(signed, scale.device).to(scale.dtype)
        index = torch.arange(case["n"], device=scale.device) // BLOCK_8BIT
        moments[name] = code[inputs[name].long()] * scale[index]
    return _original(case, inputs | moments)


def _original_8bit(case: Case, inputs: Tensors) -> Tensors:
    """The same, each moment then rounded to the nearest value by comparing it with all 256."""
    outputs = _exact_8bit(case, inputs)
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        code = dynamic_code(signed, inputs["param"].device)
        parts = []
        for block in outputs[name].split(BLOCK_8BIT):
            values = code * block.abs().max()
            parts.append(values[(block[:, None] - values).abs().argmin(1)])
        outputs[name] = torch.cat(parts)
    return outputs


def _forward(case: Case, inputs: Tensors) -> Tensors:
    adamw_(*inputs.values(), **_NUMBERS)
    return {name: inputs[name] for name in ("param", "exp_avg", "exp_avg_sq")}


def _forward_8bit(case: Case, inputs: Tensors) -> Tensors:
    param, grad, m, v, m_scale, v_scale = inputs.values()
    adamw_8bit_(param, grad, m, v, m_scale, v_scale, **_NUMBERS)
    return {
        "param": param,
        "exp_avg": decode_8bit(m, m_scale, signed=True),
        "exp_avg_sq": decode_8bit(v, v_scale, signed=False),
    }


_CASES = (Case("odd", {"n": 1537}), Case("one", {"n": 1}), Case("one block", {"n": 256}))
_LARGE = (Case("a million", {"n": (1 << 20) + 7}),)
_BENCH = {"cpu": Case("n 2^20", {"n": 1 << 20}), "cuda": Case("n 2^27", {"n": 1 << 27})}
_TABLES = (
    "m_scale_ptr", "v_scale_ptr", "m_code_ptr", "v_code_ptr", "m_middle_ptr", "v_middle_ptr",
)  # fmt: skip
_TYPES = " i64 fp32 fp32 fp32 fp32 fp32 fp32 fp32"

SPEC = Spec(
    name="adamw",
    summary="AdamW over a flat buffer, float32 moments",
    traffic="3 elements (param twice, gradient) and 16 bytes of moments each",
    cases=_CASES,
    large=_LARGE,
    bench=_BENCH,
    make_inputs=_make_inputs,
    original=_original,
    forward=_forward,
    bytes_moved=lambda case, dtype: (case["n"] * (3 * dtype.itemsize + 16), 0),
    aot=(
        Aot(
            _adamw,
            "*T *T *fp32 *fp32 *fp32 *fp32 *fp32 *fp32 *fp32 *fp32" + _TYPES,
            (_OPTIONS | dict.fromkeys(_TABLES),),
        ),
    ),
)
SPEC_8BIT = Spec(
    name="adamw_8bit",
    summary="AdamW over a flat buffer, moments in 8-bit blocks of 256",
    traffic="3 elements and 4 bytes of moments each",
    cases=_CASES,
    large=_LARGE,
    bench=_BENCH,
    make_inputs=_make_inputs_8bit,
    original=_original_8bit,
    reference=_exact_8bit,
    forward=_forward_8bit,
    bytes_moved=lambda case, dtype: (case["n"] * (3 * dtype.itemsize + 4), 0),
    aot=(
        Aot(
            _adamw,
            "*T *T *u8 *u8 *fp32 *fp32 *fp32 *fp32 *fp32 *fp32" + _TYPES,
            (_OPTIONS,),
        ),
    ),
)
SPECS = (SPEC, SPEC_8BIT)
