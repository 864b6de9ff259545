"""Products of frozen weights, made ready once and used for every token that is decoded.

A live linear layer costs more than its weight: an adapter is three more products, 4-bit weights are
unpacked anew, q, k and v are three calls, and on a CPU a product of one row reads the matrix at half the
rate of the memory. A ready product holds one matrix of its own: everything merged, side by side, and on
a CPU in oneDNN's blocks. Where there is no room for that copy, the live modules are called.

Shapes: T tokens, K input width, N outputs of all layers together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from whet.engine.projection import Projection, Unsupported, read_projection
from whet.kernels.nf4 import NF4Weight, nf4_dequantize


@dataclass(frozen=True, slots=True)
class Product:
    """y = x W^T + b of linear layers that share their input, their outputs side by side.

    Args:
        modules: The live layers.
        weight: (N, K) of all, adapters merged, in blocks when `packed`; None calls the modules.
        bias_N: Of all, or None.
        packed: Whether the weight is in oneDNN's blocks.
    """

    modules: tuple[nn.Module, ...]
    weight: torch.Tensor | None = None
    bias_N: torch.Tensor | None = None
    packed: bool = False

    def __call__(self, x_TK: torch.Tensor, add_TN: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply, and add the residual where there is one.

        Args:
            x_TK: Input, contiguous.
            add_TN: Added to the result, or None.
        """
        if self.weight is None:
            parts = [module(x_TK) for module in self.modules]
            y_TN = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        elif self.packed:
            multiply = torch.ops.mkldnn._linear_pointwise
            if add_TN is not None:
                return multiply.binary(x_TK, add_TN, self.weight, self.bias_N, "add")
            return multiply(x_TK, self.weight, self.bias_N, "none", [], "")
        else:
            y_TN = nn.functional.linear(x_TK, self.weight, self.bias_N)
        return y_TN if add_TN is None else y_TN.add_(add_TN)


def live_product(modules: Sequence[nn.Module]) -> Product:
    """Return a product that calls the live modules."""
    return Product(tuple(modules))


def ready_product(modules: Sequence[nn.Module], dtype: torch.dtype) -> Product:
    """Merge live linear layers into one matrix; those that cannot be read stay live.

    Args:
        modules: Linear layers of the same input, as `read_projection` takes them.
        dtype: Type of the hidden states.
    """
    try:
        parts = [read_projection(module) for module in modules]
    except Unsupported:
        return live_product(modules)
    if any(_computes_in(part) not in (None, dtype) for part in parts):
        return live_product(modules)
    plain = len(parts) == 1 and parts[0].adapter is None and not parts[0].transposed
    weight_NK = torch.cat([merged(part, dtype) for part in parts])
    biases = [part.bias_N for part in parts]
    bias_N = None
    if any(bias is not None for bias in biases):
        bias_N = torch.cat([
            torch.zeros(part.num_outputs, dtype=dtype, device=weight_NK.device)
            if part.bias_N is None else part.bias_N.detach().to(dtype)
            for part in parts
        ])  # fmt: skip
    packed = packed_weight(weight_NK)
    if packed is not None:
        return Product(tuple(modules), packed, bias_N, packed=True)
    if plain and isinstance(parts[0].weight, torch.Tensor):
        return Product(tuple(modules), parts[0].weight.detach(), bias_N)  # no copy for nothing
    return Product(tuple(modules), weight_NK, bias_N)


def merged(projection: Projection, dtype: torch.dtype) -> torch.Tensor:
    """Return W + scale B A as (N, K), summed in float32 and rounded once.

    Args:
        projection: A linear layer.
        dtype: Of the result.
    """
    weight = projection.weight
    if isinstance(weight, NF4Weight):
        device = weight.packed.device
        weight = nf4_dequantize(weight, torch.empty(weight.shape, dtype=dtype, device=device))
    weight = weight.detach().t() if projection.transposed else weight.detach()
    adapter = projection.adapter
    if adapter is None:
        return weight.to(dtype)
    update = adapter.b_NR.detach().float(), adapter.a_RK.detach().float()
    return torch.addmm(weight.float(), *update, alpha=adapter.scale).to(dtype)


def packed_weight(weight_NK: torch.Tensor) -> torch.Tensor | None:
    """Return a weight in oneDNN's blocks, or None where torch has no product with them.

    One row times a packed bfloat16 matrix (3072 x 576) takes 0.26 ms, times the plain one 0.43; four
    rows 0.23 and 0.48 (EPYC Zen 5, one thread, torch 2.13). The two operators are those that torch's
    own compiler uses on frozen weights; they have no public name.
    """
    operators: Any = torch.ops.mkldnn
    asks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if weight_NK.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    if not (
        hasattr(operators, "_reorder_linear_weight") and hasattr(operators, "_linear_pointwise")
    ):
        return None
    if weight_NK.dtype in asks and not getattr(operators, asks[weight_NK.dtype])():
        return None
    if weight_NK.dtype not in (torch.float32, *asks):
        return None
    return operators._reorder_linear_weight(weight_NK.contiguous(), 1)


def num_bytes(modules: Sequence[nn.Module], dtype: torch.dtype) -> int:
    """Return the bytes of a ready product's own copy."""
    try:
        parts = [read_projection(module) for module in modules]
    except Unsupported:
        return 0
    return sum(part.num_outputs * part.num_inputs * dtype.itemsize for part in parts)


def _computes_in(projection: Projection) -> torch.dtype | None:
    weight = projection.weight
    return projection.compute_dtype if isinstance(weight, NF4Weight) else weight.dtype
