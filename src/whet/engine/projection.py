"""Linear layers as the layer functions see them, read from live modules.

A projection is a weight (dense, transposed as in GPT-2, or NF4), a bias and a LoRA adapter, each of
which may be absent, frozen or trained.

Shapes: K input width, N output width, R LoRA rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from whet.kernels.nf4 import NF4Weight, from_quant_state


class Unsupported(Exception):  # noqa: N818 - a reason, not a fault
    """Why a module keeps its own code, in words for the swap report."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter: y += scale * (x A^T) B^T."""

    a_RK: torch.Tensor
    b_NR: torch.Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear layer: y = x W^T + b (+ adapter).

    Args:
        weight: (N, K), or (K, N) when `transposed`; or NF4.
        bias_N: Or None.
        adapter: Or None.
        transposed: The weight is stored as (K, N) (GPT-2's Conv1D).
        compute_dtype: What an NF4 weight is multiplied in; None follows the hidden states.
    """

    weight: torch.Tensor | NF4Weight
    bias_N: torch.Tensor | None
    adapter: Adapter | None
    transposed: bool
    compute_dtype: torch.dtype | None = None

    @property
    def num_outputs(self) -> int:
        """N."""
        return self.weight.shape[1 if self.transposed else 0]

    @property
    def num_inputs(self) -> int:
        """K."""
        return self.weight.shape[0 if self.transposed else 1]

    @property
    def trained(self) -> list[torch.Tensor]:
        """The parameters that a gradient is made for, in a fixed order."""
        adapter = (self.adapter.a_RK, self.adapter.b_NR) if self.adapter else ()
        candidates = (self.weight, self.bias_N, *adapter)
        return [t for t in candidates if isinstance(t, torch.Tensor) and t.requires_grad]


def read_projection(module: nn.Module) -> Projection:
    """Read a live linear module, as peft, bitsandbytes and transformers make them.

    Args:
        module: nn.Linear, transformers' Conv1D, bitsandbytes' Linear4bit, or peft's LoRA around one.

    Raises:
        Unsupported: It computes something that a Projection does not say.
    """
    adapter = None
    if hasattr(module, "base_layer"):
        check_own_forward(module)
        adapter = _read_adapter(module)
        module = module.get_submodule("base_layer")
    check_own_forward(module)
    kind = type(module).__name__
    if kind == "Linear4bit":
        return _read_nf4(module, adapter)
    if kind == "Conv1D" and isinstance(getattr(module, "nf", None), int):
        return Projection(module.weight, module.bias, adapter, transposed=True)  # type: ignore[arg-type]
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return Projection(module.weight, module.bias, adapter, transposed=False)
    raise Unsupported(f"{kind} is not a linear layer the engine knows")


def has_hooks(module: nn.Module) -> bool:
    """Tell whether somebody wants to see what goes through a module."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return any((*hooks, module._backward_hooks, module._backward_pre_hooks))


def check_own_forward(module: nn.Module) -> None:
    """Refuse a module whose call does more than its class says."""
    if has_hooks(module):
        raise Unsupported(f"{type(module).__name__} has hooks")
    if "forward" in vars(module):
        raise Unsupported(f"{type(module).__name__} has a forward of its own")


def _read_nf4(module: Any, adapter: Adapter | None) -> Projection:
    state = getattr(module.weight, "quant_state", None)
    if state is None and isinstance(module.weight, nn.Parameter):
        state = getattr(module, "quant_state", None)  # FSDP2 has made the parameter anew
    if state is None:
        raise Unsupported("a 4-bit weight that is not quantised yet")
    if getattr(state, "packing_format_for_cpu", False):
        raise Unsupported("4-bit weights that bitsandbytes has repacked for CPU inference")
    if state.quant_type != "nf4":
        raise Unsupported(f"4-bit weights of kind {state.quant_type}")
    if module.weight.device.type == "cpu" and state.shape[-1] % state.blocksize:
        # bitsandbytes 0.50.2 reads the wrong scales there (off by 2.8 of 576 wide in blocks of 128).
        raise Unsupported(
            "4-bit rows that are not whole blocks, which bitsandbytes reads otherwise"
        )
    if len(state.shape) != 2:
        raise Unsupported("4-bit weights that are no matrix")
    packed = module.weight.data
    if packed.dtype != torch.uint8:  # bytes that are stored as numbers (bnb_4bit_quant_storage)
        packed = packed.view(torch.uint8).view(-1, 1)
    return Projection(
        from_quant_state(packed, state), module.bias, adapter, False,
        module.compute_dtype if module.compute_type_is_set else None,
    )  # fmt: skip


def _read_adapter(module: Any) -> Adapter | None:
    """Read the active LoRA adapter of a peft layer; None when there is none or it is merged."""
    if not hasattr(module, "lora_A"):
        raise Unsupported(f"{type(module).__name__} is not a LoRA layer")
    if module.disable_adapters or module.merged:
        return None
    active = [name for name in module.active_adapters if name in module.lora_A]
    if not active:
        return None
    if len(active) > 1:
        raise Unsupported(f"{len(active)} active adapters")
    name = active[0]
    if name in (getattr(module, "lora_variant", None) or {}):
        raise Unsupported(f"adapter variant {type(module.lora_variant[name]).__name__}")
    dropout = module.lora_dropout[name]
    if module.training and getattr(dropout, "p", 0.0):
        raise Unsupported(f"adapter dropout {dropout.p}")
    a, b = module.lora_A[name], module.lora_B[name]
    if a.bias is not None or b.bias is not None:
        raise Unsupported("an adapter with biases")
    return Adapter(a.weight, b.weight, float(module.scaling[name]))


def keep_4bit_weights(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights at the first evaluation on a CPU with AVX512-BF16.

    The repacked weights have other values (scales rounded to bfloat16), and a product with them has no
    gradient, so that training after an evaluation would go wrong in silence (bitsandbytes 0.50.2,
    `Linear4bit.forward`). This can go when training with repacked weights raises or works.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
