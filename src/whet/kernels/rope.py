"""Rotary position embedding of q and k in one pass (arXiv 2104.09864), with an optional norm per head.

Forward:   (a, b) -> (a cos - b sin, b cos + a sin) for each pair (a, b) of a head's first 2R entries;
           entries past 2R are copied. Half layout pairs entry i with i + R, interleaved 2i with 2i + 1.
           A q/k norm (RMSNorm over the head's width, Qwen3 and Gemma 3) comes first.
Backward:  the same with -sin, then the norm's backward.
cos and sin may carry a scale (YaRN, longrope): the map is linear, and its transpose is what is applied.
Computed in float32, rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from whet.kernels import rope_triton
from whet.kernels.launch import uses_triton
from whet.kernels.norm import norm_backward, norm_forward
from whet.kernels.spec import Aot, Case, Spec, Tensors, normal, wide


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMSNorm over each head's width, applied before the rotation."""

    weight_K: torch.Tensor
    eps: float
    unit_offset: bool = False


def rope_forward(
    q_THK: torch.Tensor,
    k_TGK: torch.Tensor,
    cos_TR: torch.Tensor | None,
    sin_TR: torch.Tensor | None,
    *,
    interleaved: bool = False,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    q_out_THK: torch.Tensor | None = None,
    k_out_TGK: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise (optionally) and rotate q and k.

    Args:
        q_THK: Queries; any strides, contiguous along K.
        k_TGK: Keys.
        cos_TR: Cosines of each token's angles, R = half the rotary width. None rotates nothing.
        sin_TR: Sines.
        interleaved: Pair neighbours instead of halves.
        q_norm: Norm of the queries.
        k_norm: Norm of the keys; on CUDA there are both or neither.
        q_out_THK: Where to write; may be q itself.
        k_out_TGK: Where to write; may be k itself.

    Returns:
        (q_out_THK, k_out_TGK).
    """
    q_out_THK = torch.empty_like(q_THK) if q_out_THK is None else q_out_THK
    k_out_TGK = torch.empty_like(k_TGK) if k_out_TGK is None else k_out_TGK
    if uses_triton(q_THK):
        rope_triton.launch_forward(
            (q_THK, k_TGK), (q_out_THK, k_out_TGK), cos_TR, sin_TR, interleaved, (q_norm, k_norm)
        )
        return q_out_THK, k_out_TGK
    for x, out, norm in ((q_THK, q_out_THK, q_norm), (k_TGK, k_out_TGK, k_norm)):
        if norm is not None:
            flat = x.reshape(-1, x.shape[-1])
            x = norm_forward(
                flat, norm.weight_K, None, eps=norm.eps, centered=False,
                unit_offset=norm.unit_offset, out_TD=torch.empty_like(flat, dtype=torch.float32),
            )[0].view(x.shape)  # fmt: skip
        _rotate(x, cos_TR, sin_TR, interleaved, out)
    return q_out_THK, k_out_TGK


def rope_backward(
    dq_THK: torch.Tensor,
    dk_TGK: torch.Tensor,
    cos_TR: torch.Tensor | None,
    sin_TR: torch.Tensor | None,
    *,
    interleaved: bool = False,
    q_THK: torch.Tensor | None = None,
    k_TGK: torch.Tensor | None = None,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    dq_norm_K: torch.Tensor | None = None,
    dk_norm_K: torch.Tensor | None = None,
    dq_out_THK: torch.Tensor | None = None,
    dk_out_TGK: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Backward pass of `rope_forward`.

    Args:
        dq_THK: Gradient of the rotated queries.
        dk_TGK: Gradient of the rotated keys.
        cos_TR: As in the forward.
        sin_TR: As in the forward.
        interleaved: As in the forward.
        q_THK: The forward's input; needed with a norm.
        k_TGK: The same for the keys.
        q_norm: As in the forward.
        k_norm: As in the forward.
        dq_norm_K: Float32 accumulator for the gradient of q_norm's weight, or None.
        dk_norm_K: The same for k_norm's.
        dq_out_THK: Where to write; may be dq itself.
        dk_out_TGK: Where to write; may be dk itself.

    Returns:
        (dq_out_THK, dk_out_TGK).
    """
    dq_out_THK = torch.empty_like(dq_THK) if dq_out_THK is None else dq_out_THK
    dk_out_TGK = torch.empty_like(dk_TGK) if dk_out_TGK is None else dk_out_TGK
    if uses_triton(dq_THK):
        rope_triton.launch_backward(
            (dq_THK, dk_TGK), (q_THK, k_TGK), (dq_out_THK, dk_out_TGK), cos_TR, sin_TR, interleaved,
            (q_norm, k_norm), (dq_norm_K, dk_norm_K),
        )  # fmt: skip
        return dq_out_THK, dk_out_TGK
    back = None if sin_TR is None else -sin_TR
    for dy, x, norm, dweight, out in (
        (dq_THK, q_THK, q_norm, dq_norm_K, dq_out_THK),
        (dk_TGK, k_TGK, k_norm, dk_norm_K, dk_out_TGK),
    ):
        if norm is None:
            _rotate(dy, cos_TR, back, interleaved, out)
            continue
        assert x is not None, "a head norm's backward needs the forward's input"
        width = dy.shape[-1]
        rotated = torch.empty(dy.shape, dtype=torch.float32, device=dy.device)
        _rotate(dy, cos_TR, back, interleaved, rotated)
        flat = x.reshape(-1, width)
        x32 = flat.float()
        rstd = (x32.square().mean(-1) + norm.eps).rsqrt()
        dx = norm_backward(
            rotated.view(-1, width), flat, norm.weight_K, None, rstd,
            unit_offset=norm.unit_offset, dweight_D=dweight,
            out_TD=torch.empty_like(x32),
        )  # fmt: skip
        out.copy_(dx.view(out.shape))
    return dq_out_THK, dk_out_TGK


def _rotate(
    x: torch.Tensor,
    cos_TR: torch.Tensor | None,
    sin_TR: torch.Tensor | None,
    interleaved: bool,
    out: torch.Tensor,
) -> None:
    """Write the rotated (T, heads, K) tensor x to out, which may be x."""
    if cos_TR is None or sin_TR is None:
        if out is not x:
            out.copy_(x)
        return
    half = cos_TR.shape[-1]
    cos, sin = cos_TR.float()[:, None], sin_TR.float()[:, None]
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    a, b = x[..., first].float(), x[..., second].float()
    if x.dtype == torch.float32:  # .float() was no copy, and out may be x
        a = a.clone()
    out[..., first].copy_((a * cos).addcmul_(b, sin, value=-1))
    out[..., second].copy_((b * cos).addcmul_(a, sin))
    if out is not x and 2 * half < x.shape[-1]:
        out[..., 2 * half :].copy_(x[..., 2 * half :])


def _make_inputs(
    case: Case, dtype: torch.dtype, device: str, generator: torch.Generator
) -> Tensors:
    num, width, half = case["T"], case["K"], case.get("R", case["K"] // 2)
    inputs: Tensors = {}
    for name, heads in (("q", case["H"]), ("k", case["G"])):
        shape = (num, heads, width)
        # Heads of one wide row, as a fused projection leaves them.
        row = normal((num, heads * width), dtype, device, generator, pad=case.get("pad", 0))
        inputs[name] = row.unflatten(1, (heads, width))
        inputs[f"d{name}_out"] = normal(shape, dtype, device, generator)
        if case.get("norm"):
            mean = 0.0 if case.get("unit_offset") else 1.0
            inputs[f"{name}_weight"] = normal(
                (width,), dtype, device, generator, mean=mean, std=0.3
            )
    if case.get("rotate", True):
        position = torch.arange(3, 3 + num, device=device, dtype=torch.float64)[:, None]
        angle = position * 100.0 ** (-torch.arange(half, device=device) / half)
        inputs |= {"cos": angle.cos().mul(1.1).to(dtype), "sin": angle.sin().mul(1.1).to(dtype)}
    return inputs


def _original(case: Case, inputs: Tensors) -> Tensors:
    outputs = {}
    for name in ("q", "k"):
        x = inputs[name]
        if f"{name}_weight" in inputs:
            x32, weight = wide(x), wide(inputs[f"{name}_weight"])
            weight = 1 + weight if case.get("unit_offset") else weight
            x = (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6) * weight).to(x.dtype)
        if "cos" in inputs:
            half = inputs["cos"].shape[-1]
            turn, rest = x[..., : 2 * half], x[..., 2 * half :]
            if case.get("interleaved"):
                cos, sin = (inputs[n].repeat_interleave(2, -1)[:, None] for n in ("cos", "sin"))
                other = torch.stack((-turn[..., 1::2], turn[..., ::2]), -1).flatten(-2)
            else:
                cos, sin = (torch.cat((inputs[n], inputs[n]), -1)[:, None] for n in ("cos", "sin"))
                other = torch.cat((-turn[..., half:], turn[..., :half]), -1)
            x = torch.cat((turn * cos + other * sin, rest), -1)
        outputs[f"{name}_out"] = x
    return outputs


def _norms(case: Case, inputs: Tensors) -> dict[str, Any]:
    options: dict[str, Any] = {"interleaved": case.get("interleaved", False)}
    if case.get("norm"):
        for name in ("q", "k"):
            weight = inputs[f"{name}_weight"]
            options[f"{name}_norm"] = HeadNorm(weight, 1e-6, case.get("unit_offset", False))
    return options


def _forward(case: Case, inputs: Tensors) -> Tensors:
    place: dict[str, Any] = {}
    if case.get("in_place"):
        inputs = inputs | {n: inputs[n].clone() for n in ("q", "k")}
        place = {"q_out_THK": inputs["q"], "k_out_TGK": inputs["k"]}
    q, k = rope_forward(
        inputs["q"], inputs["k"], inputs.get("cos"), inputs.get("sin"),
        **_norms(case, inputs), **place,
    )  # fmt: skip
    return {"q_out": q, "k_out": k}


def _backward(case: Case, inputs: Tensors, saved: Tensors) -> Tensors:
    dweights = {
        n: torch.zeros(case["K"], device=inputs[n].device) for n in ("q", "k") if case.get("norm")
    }
    dq, dk = inputs["dq_out"], inputs["dk_out"]
    place: dict[str, Any] = {}
    if case.get("in_place"):
        place = {"dq_out_THK": dq, "dk_out_TGK": dk}
    dq, dk = rope_backward(
        dq, dk, inputs.get("cos"), inputs.get("sin"), q_THK=inputs["q"], k_TGK=inputs["k"],
        dq_norm_K=dweights.get("q"), dk_norm_K=dweights.get("k"), **_norms(case, inputs), **place,
    )  # fmt: skip
    return {"dq": dq, "dk": dk} | {f"d{n}_weight": value for n, value in dweights.items()}


def _bytes_moved(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    each = case["T"] * (case["H"] + case["G"]) * case["K"] * dtype.itemsize
    return 2 * each, (3 if case.get("norm") else 2) * each


SPEC = Spec(
    name="rope",
    summary="Rotary embedding of q and k in one launch, half or interleaved, with q/k head norms",
    traffic="2 elements each, forward and backward; with norms the backward reads one more",
    cases=(
        Case("half", {"T": 5, "H": 3, "G": 1, "K": 32, "pad": 5, "in_place": True}),
        Case(
            "interleaved, partial", {"T": 3, "H": 5, "G": 2, "K": 48, "R": 10, "interleaved": True}
        ),
        Case("norms", {"T": 67, "H": 2, "G": 2, "K": 32, "norm": True}),
        Case(
            "gemma, partial",
            {"T": 4, "H": 6, "G": 1, "K": 80, "R": 16, "norm": True, "unit_offset": True, "pad": 3},
        ),
        Case("norms alone", {"T": 2, "H": 2, "G": 1, "K": 64, "norm": True, "rotate": False}),
        Case("one token", {"T": 1, "H": 1, "G": 1, "K": 256, "in_place": True}),
    ),
    large=(
        Case("llama", {"T": 4099, "H": 32, "G": 8, "K": 128, "in_place": True}),
        Case("qwen3", {"T": 2051, "H": 32, "G": 8, "K": 128, "norm": True}),
        Case("gemma 3", {"T": 1025, "H": 8, "G": 4, "K": 256, "norm": True, "unit_offset": True}),
        Case("gpt-j", {"T": 1025, "H": 16, "G": 16, "K": 256, "R": 32, "interleaved": True}),
    ),
    bench={
        "cpu": Case("T 1024, 9+3 heads of 64", {"T": 1024, "H": 9, "G": 3, "K": 64}),
        "cuda": Case("T 16384, 32+8 heads of 128", {"T": 16384, "H": 32, "G": 8, "K": 128}),
    },
    make_inputs=_make_inputs,
    original=_original,
    forward=_forward,
    backward=_backward,
    upstream={"q_out": "dq_out", "k_out": "dk_out"},
    leaves=("q", "k", "q_weight", "k_weight"),
    bytes_moved=_bytes_moved,
    aot=(
        Aot(
            rope_triton.forward_kernel,
            " ".join(["*T"] * 8 + ["i32"] * 13 + ["fp32"] * 4),
            (
                rope_triton.launch_options(128, 64, False) | {"qw_ptr": None, "kw_ptr": None},
                rope_triton.launch_options(256, 16, True),
            ),
        ),
        Aot(
            rope_triton.backward_kernel,
            " ".join(["*T"] * 10 + ["*fp32"] + ["i32"] * 17 + ["fp32"] * 4),
            (
                rope_triton.launch_options(128, 64, False)
                | dict.fromkeys(("qw_ptr", "kw_ptr", "q_ptr", "k_ptr", "dw_ptr")),
                rope_triton.launch_options(256, 128, False),
            ),
        ),
    ),
)
SPECS = (SPEC,)
