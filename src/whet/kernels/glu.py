"""The activation between the two halves of an MLP: act(gate) * up, or act(gate) alone (arXiv 2002.05202).

Forward:   a = act(g) * u.
Backward:  du = da * act(g),  dg = da * u * act'(g); a itself is computed again for the gradient of the
           down projection, so that only gate and up need to be kept.
Activations: silu, gelu_tanh, gelu_erf, relu, relu2 (squared). Computed in float32, rounded once.
"""

# ruff: noqa: ANN001, ANN202 -- Triton kernels carry no annotations

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from whet.kernels.launch import ceil_div, constexpr, jit, launch, power_of_2, tl, uses_triton
from whet.kernels.spec import Aot, Case, Spec, Tensors, normal

Activation = Literal["silu", "gelu_tanh", "gelu_erf", "relu", "relu2"]
# Elements of a block of rows on the CPU.
BLOCK_ELEMENTS = 196_608


def glu_forward(
    gate_TF: torch.Tensor,
    up_TF: torch.Tensor | None,
    activation: Activation,
    out_TF: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute act(gate) * up.

    Args:
        gate_TF: Input of the activation; any row stride.
        up_TF: Factor, or None for a plain MLP.
        activation: Which.
        out_TF: Where to write; may be gate itself.
    """
    out_TF = torch.empty_like(gate_TF) if out_TF is None else out_TF
    if uses_triton(gate_TF):
        _launch_forward(gate_TF, up_TF, activation, out_TF)
        return out_TF
    for part in row_blocks(gate_TF):
        value = _activate(gate_TF[part].float(), activation)
        if up_TF is not None:
            # Widened first: of two dtypes torch's product is not vectorised, and three times slower.
            value = value.mul_(up_TF[part].float())
        out_TF[part].copy_(value)
    return out_TF


def glu_backward(
    da_TF: torch.Tensor,
    gate_TF: torch.Tensor,
    up_TF: torch.Tensor | None,
    activation: Activation,
    dgate_TF: torch.Tensor,
    dup_TF: torch.Tensor | None,
    a_TF: torch.Tensor | None,
) -> None:
    """Backward pass of `glu_forward`, writing all three results.

    Args:
        da_TF: Gradient of the forward's output.
        gate_TF: As in the forward.
        up_TF: As in the forward.
        activation: Which.
        dgate_TF: Gradient of gate; may be gate itself.
        dup_TF: Gradient of up; may be up itself. None with `up_TF` None.
        a_TF: The forward's output, computed again; None when nobody needs it.
    """
    if uses_triton(gate_TF):
        _launch_backward(da_TF, gate_TF, up_TF, activation, dgate_TF, dup_TF, a_TF)
        return
    for part in row_blocks(gate_TF):
        up, dup, a = (None if x is None else x[part] for x in (up_TF, dup_TF, a_TF))
        _backward_block(da_TF[part], gate_TF[part], up, activation, dgate_TF[part], dup, a)


def row_blocks(x_TF: torch.Tensor) -> Iterator[slice]:
    """Cut rows into blocks whose float32 temporaries stay in a core's cache; one block off the CPU.

    512 x 1536 bfloat16, EPYC Zen 5: backward 1.5 ms in one piece, 0.7 ms in blocks of 128 rows.

    Args:
        x_TF: What the rows are of.
    """
    num, width = x_TF.shape
    rows = max(1, BLOCK_ELEMENTS // max(1, width)) if x_TF.device.type == "cpu" else max(1, num)
    if isinstance(x_TF, FakeTensor):  # in a plan one block stands for all: they use the same memory
        num = min(num, rows)
    for start in range(0, num, rows):
        yield slice(start, min(num, start + rows))


def _backward_block(
    da_TF: torch.Tensor,
    gate_TF: torch.Tensor,
    up_TF: torch.Tensor | None,
    activation: Activation,
    dgate_TF: torch.Tensor,
    dup_TF: torch.Tensor | None,
    a_TF: torch.Tensor | None,
) -> None:
    da = da_TF.float()
    value, slope = _activate_and_slope(gate_TF.float(), activation)
    if up_TF is None:
        if a_TF is not None:
            a_TF.copy_(value)
        dgate_TF.copy_(slope.mul_(da))
        return
    assert dup_TF is not None
    up = up_TF.float()
    if a_TF is not None:
        a_TF.copy_(value * up)
    slope.mul_(up).mul_(da)
    dup_TF.copy_(value.mul_(da))
    dgate_TF.copy_(slope)


def _activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation == "silu":
        return functional.silu(x)
    if activation == "gelu_tanh":
        return functional.gelu(x, approximate="tanh")
    if activation == "gelu_erf":
        return functional.gelu(x)
    value = functional.relu(x)
    return value.square() if activation == "relu2" else value


def _activate_and_slope(
    x: torch.Tensor, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return act(x) and act'(x), both new tensors."""
    if activation == "silu":
        sigmoid = torch.sigmoid(x)
        value = x * sigmoid
        # s + x s (1 - s) = s + v - v s
        return value, (value * sigmoid).neg_().add_(value).add_(sigmoid)
    if activation == "gelu_tanh":
        scale = math.sqrt(2 / math.pi)
        tanh = torch.tanh(scale * (x + 0.044715 * x**3))
        inner = scale * (1 + 3 * 0.044715 * x * x)
        return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * inner
    if activation == "gelu_erf":
        cdf = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return x * cdf, cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    value = functional.relu(x)
    if activation == "relu2":
        return value.square(), 2 * value
    return value, (x > 0).to(x.dtype)


@jit
def _value_and_slope(x, ACTIVATION: constexpr):
    """Return act(x) and act'(x) in float32."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(x)
        value = x * sigmoid
        slope = sigmoid + value * (1 - sigmoid)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh u) / 2 = sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        sigmoid = tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))
        value = x * sigmoid
        slope = sigmoid + value * (1 - sigmoid) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    elif ACTIVATION == "gelu_erf":
        cdf = 0.5 * (1 + tl.erf(0.7071067811865476 * x))
        value = x * cdf
        slope = cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACTIVATION == "relu":
        value = tl.maximum(x, 0.0)
        slope = tl.where(x > 0, 1.0, 0.0)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        root = tl.maximum(x, 0.0)
        value = root * root
        slope = 2 * root
    return value, slope


@jit
def _glu_forward(
    gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, out_stride, width,
    ACTIVATION: constexpr, BLOCK_F: constexpr,
):  # fmt: skip
    """Compute a = act(g) u for a piece of a row, in float32.

    Reads gate and up, writes a: 3 elements each.
    """
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = col < width
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=inside).to(tl.float32)
    value, _ = _value_and_slope(gate, ACTIVATION)
    if up_ptr is not None:
        value *= tl.load(up_ptr + row * up_stride + col, mask=inside).to(tl.float32)
    tl.store(out_ptr + row * out_stride + col, value.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _glu_backward(
    da_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, a_ptr, da_stride, gate_stride, up_stride,
    dgate_stride, dup_stride, a_stride, width, ACTIVATION: constexpr, BLOCK_F: constexpr,
):  # fmt: skip
    """Compute dg = da u act'(g), du = da act(g) and a = act(g) u again, in float32.

    Reads da, gate and up, writes dgate, dup and a: 6 elements each. A program has read its piece
    before it writes, so dgate may be gate and dup may be up.
    """
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = col < width
    kind = dgate_ptr.dtype.element_ty
    da = tl.load(da_ptr + row * da_stride + col, mask=inside).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=inside).to(tl.float32)
    value, slope = _value_and_slope(gate, ACTIVATION)
    dgate, a = da * slope, value
    if up_ptr is not None:
        up = tl.load(up_ptr + row * up_stride + col, mask=inside).to(tl.float32)
        dgate *= up
        a *= up
        tl.store(dup_ptr + row * dup_stride + col, (da * value).to(kind), mask=inside)
    tl.store(dgate_ptr + row * dgate_stride + col, dgate.to(kind), mask=inside)
    if a_ptr is not None:
        tl.store(a_ptr + row * a_stride + col, a.to(kind), mask=inside)


def _grid_and_options(gate: torch.Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    num, width = gate.shape
    block = min(1024, power_of_2(width))
    return (num, ceil_div(width, block)), {"BLOCK_F": block, "num_warps": 4}


def _stride(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _launch_forward(
    gate: torch.Tensor, up: torch.Tensor | None, activation: Activation, out: torch.Tensor
) -> None:
    grid, options = _grid_and_options(gate)
    if gate.numel():
        launch(
            _glu_forward, grid, gate, up, out, gate.stride(0), _stride(up), out.stride(0),
            gate.shape[1], ACTIVATION=activation, **options,
        )  # fmt: skip


def _launch_backward(
    da: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    activation: Activation,
    dgate: torch.Tensor,
    dup: torch.Tensor | None,
    a: torch.Tensor | None,
) -> None:
    grid, options = _grid_and_options(gate)
    if gate.numel():
        launch(
            _glu_backward, grid, da, gate, up, dgate, dup, a, da.stride(0), gate.stride(0),
            _stride(up), dgate.stride(0), _stride(dup), _stride(a), gate.shape[1],
            ACTIVATION=activation, **options,
        )  # fmt: skip


def _make_inputs(
    case: Case, dtype: torch.dtype, device: str, generator: torch.Generator
) -> Tensors:
    num, width = case["T"], case["F"]
    # Gate and up are the halves of one projection's output.
    both = normal((num, 2 * width), dtype, device, generator, pad=case.get("pad", 0), std=2.0)
    inputs = {"gate": both[:, :width], "da": normal((num, width), dtype, device, generator)}
    return inputs | ({"up": both[:, width:]} if case.get("gated", True) else {})


def _original(case: Case, inputs: Tensors) -> Tensors:
    gate, activation = inputs["gate"], case["activation"]
    if activation == "silu":
        a = functional.silu(gate)
    elif activation.startswith("gelu"):
        a = functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
    else:
        a = functional.relu(gate)
        a = a * a if activation == "relu2" else a
    a = a * inputs["up"] if "up" in inputs else a
    return {"a": a, "a_again": a}


def _forward(case: Case, inputs: Tensors) -> Tensors:
    return {"a": glu_forward(inputs["gate"], inputs.get("up"), case["activation"])}


def _backward(case: Case, inputs: Tensors, saved: Tensors) -> Tensors:
    gate, up = inputs["gate"], inputs.get("up")
    in_place = case.get("in_place")
    dgate = gate if in_place else torch.empty_like(gate)
    dup = up if in_place or up is None else torch.empty_like(up)
    again = torch.empty_like(inputs["da"])
    glu_backward(inputs["da"], gate, up, case["activation"], dgate, dup, again)
    return {"a_again": again, "dgate": dgate} | ({} if dup is None else {"dup": dup})


def _bytes_moved(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    each = case["T"] * case["F"] * dtype.itemsize
    return (3 * each, 6 * each) if case.get("gated", True) else (2 * each, 4 * each)


def _variant(activation: Activation, gated: bool) -> dict[str, object]:
    options: dict[str, object] = {"ACTIVATION": activation, "BLOCK_F": 1024, "num_warps": 4}
    return options | ({} if gated else {"up_ptr": None})


SPEC = Spec(
    name="glu",
    summary="act(gate) * up or act(gate): silu, gelu (tanh and erf), relu, relu squared",
    traffic="forward 3 elements each, backward 6, the forward's result again among them",
    cases=(
        Case("silu", {"T": 5, "F": 37, "activation": "silu", "pad": 3}),
        Case("silu in place", {"T": 3, "F": 1030, "activation": "silu", "in_place": True}),
        Case("gelu_tanh", {"T": 5, "F": 37, "activation": "gelu_tanh", "in_place": True}),
        Case("gelu_erf plain", {"T": 7, "F": 65, "activation": "gelu_erf", "gated": False}),
        Case("relu", {"T": 5, "F": 37, "activation": "relu"}),
        Case("relu2 plain", {"T": 4, "F": 12, "activation": "relu2", "gated": False}),
        Case("one token", {"T": 1, "F": 33, "activation": "silu"}),
    ),
    large=tuple(
        Case(name, {"T": 2049, "F": width, "activation": name})
        for name, width in (
            ("silu", 14336),
            ("gelu_tanh", 9216),
            ("gelu_erf", 3072),
            ("relu", 1000),
            ("relu2", 1001),
        )
    ),  # fmt: skip
    bench={
        "cpu": Case("T 1024, F 1536, silu", {"T": 1024, "F": 1536, "activation": "silu"}),
        "cuda": Case("T 16384, F 14336, silu", {"T": 16384, "F": 14336, "activation": "silu"}),
    },
    make_inputs=_make_inputs,
    original=_original,
    forward=_forward,
    backward=_backward,
    upstream={"a": "da"},
    leaves=("gate", "up"),
    bytes_moved=_bytes_moved,
    aot=(
        Aot(
            _glu_forward,
            "*T *T *T i32 i32 i32 i32",
            (_variant("silu", True), _variant("gelu_erf", False)),
        ),
        Aot(
            _glu_backward,
            "*T *T *T *T *T *T i32 i32 i32 i32 i32 i32 i32",
            (
                _variant("silu", True),
                _variant("gelu_tanh", True),
                _variant("gelu_erf", True),
                _variant("relu", True),
                _variant("relu2", False) | {"dup_ptr": None, "a_ptr": None},
            ),
        ),
    ),
)
SPECS = (SPEC,)
