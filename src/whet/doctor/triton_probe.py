"""The smallest Triton kernel, to find out whether Triton compiles and runs here.

Apart from the checks, because Triton reads a kernel's source where it is defined.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _double(x_ptr: Any, y_ptr: Any, num: Any, BLOCK: tl.constexpr) -> None:  # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < num) * 2, mask=at < num)


def doubles(device: str) -> bool:
    """Double 1,000 numbers on a device, and tell whether they came out right."""
    x = torch.arange(1000, dtype=torch.float32, device=device)
    y = torch.zeros_like(x)
    kernel: Any = _double
    kernel[(8,)](x, y, 1000, BLOCK=128)
    return bool(torch.equal(y, x * 2))
