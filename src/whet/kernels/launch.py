"""Triton where it is installed, and the rule that decides between a Triton kernel and plain torch.

Triton has no wheels for macOS and Windows; there, and on the CPU everywhere, the torch code runs. In
a process started with Triton's own TRITON_INTERPRET=1 the kernels run on CPU tensors, one program
after another: that is how they are tested without a GPU. Triton reads the variable where a kernel is
defined, so it must be set before this package is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

triton: Any
tl: Any
try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

if TYPE_CHECKING:
    constexpr: TypeAlias = Any  # a type checker may not find Triton
else:
    constexpr = Any if triton is None else tl.constexpr


def _unjitted(function: Callable) -> Any:
    """Leave a kernel that nobody can launch as it is."""
    return function


jit: Any = _unjitted if triton is None else triton.jit

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET", "0") == "1"


def uses_triton(tensor: torch.Tensor) -> bool:
    """Tell whether the Triton kernel takes this tensor: on CUDA, or anywhere in the interpreter."""
    return triton is not None and (tensor.is_cuda or INTERPRETED)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel on the device of its first tensor, which need not be the current one.

    Args:
        kernel: The jitted function.
        grid: Number of programs along each axis.
        args: Tensors and numbers; the first is a tensor.
        options: Constants, `num_warps`, `num_stages`.
    """
    # Triton 3.10 turns fused multiply-add off by default; the choice is ours, not the version's.
    options.setdefault("enable_fp_fusion", True)
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **options)


def power_of_2(number: int) -> int:
    """Return the smallest power of two that is not below the number."""
    return 1 << max(0, number - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """Divide and round up."""
    return -(-a // b)


@jit
def tanh(x):  # noqa: ANN001, ANN201
    """Compute tanh to float32's accuracy: (1 - e^-2|x|) / (1 + e^-2|x|), a series near 0.

    triton.language has none, and libdevice's does not run in the interpreter. The plain formula loses
    digits by cancellation below 0.3; there five terms of the series are exact to 5e-8 relative.
    """
    square = x * x
    series = x * (
        1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    )
    e = tl.exp(-2 * tl.abs(x))
    value = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0, -value, value))
