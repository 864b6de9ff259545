"""Linear layers as the layer functions see them: read from live modules, multiplied in groups.

A projection is a weight (dense, transposed as in GPT-2, or NF4), a bias and a LoRA adapter, each of
which may be absent, frozen or trained. Projections of one input (q, k and v; gate and up) form a
group: one product with the adapters' stacked A, one buffer for all outputs, one gradient of the input.

Shapes: T tokens, K input width, N output width, R LoRA rank (of the whole group where stacked).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from whet.engine.memory import workspace
from whet.kernels.lora import lora_backward, sum_product
from whet.kernels.nf4 import NF4Weight, from_quant_state, nf4_dequantize


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
    if state is None:
        raise Unsupported("a 4-bit weight that is not quantised yet")
    if getattr(state, "packing_format_for_cpu", False):
        raise Unsupported("4-bit weights that bitsandbytes has repacked for CPU inference")
    if state.quant_type != "nf4":
        raise Unsupported(f"4-bit weights of kind {state.quant_type}")
    if len(state.shape) != 2:
        raise Unsupported("4-bit weights that are no matrix")
    return Projection(
        from_quant_state(module.weight.data, state), module.bias, adapter, False,
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


class Group:
    """Projections of one input, made ready for one pass through a half.

    Args:
        projections: They share their input; their outputs stand side by side.
        name: Role of the group, which names its buffers.
        dtype: Type of the products. Adapters in float32 are split once a pass into two numbers of it,
            high + low: a rounded A or B would be off the same way for every token, and its gradient too.
            Activations are never cast.
        device: Where.
    """

    def __init__(
        self, projections: Sequence[Projection], name: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.projections, self.name, self.dtype, self.device = projections, name, dtype, device
        self.num_outputs = sum(p.num_outputs for p in projections)
        self.weights = [self._matrix(i, p) for i, p in enumerate(projections)]
        adapters = [p.adapter for p in projections if p.adapter]
        self.a_RK = self.a_low_RK = None
        if adapters:
            stacked = torch.cat([a.a_RK.detach() for a in adapters])
            self.a_RK, self.a_low_RK = self._split("a", stacked)
        split = [
            self._split(f"b{i}", p.adapter.b_NR.detach()) if p.adapter else (None, None)
            for i, p in enumerate(projections)
        ]
        self.b = [high for high, _ in split]
        self.b_low = [low for _, low in split]

    def _buffer(self, role: str, shape: tuple[int, ...]) -> torch.Tensor:
        return workspace(f"{self.name}.{role}", shape, self.dtype, self.device)

    def _split(self, role: str, exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return an adapter's matrix as high + low in the dtype of the products; low None when 0."""
        shape = tuple(exact.shape)
        high = self._buffer(role, shape).copy_(exact)
        if exact.dtype == self.dtype:
            return high, None
        return high, self._buffer(f"{role}.low", shape).copy_(exact - high)

    def _matrix(self, index: int, projection: Projection) -> torch.Tensor:
        """Return the weight as (N, K) in the dtype of the products."""
        weight = projection.weight
        if isinstance(weight, NF4Weight):
            return nf4_dequantize(weight, self._buffer(f"w{index}", weight.shape))
        weight = weight.detach()
        weight = weight.t() if projection.transposed else weight
        if weight.dtype == self.dtype:
            return weight
        return self._buffer(f"w{index}", tuple(weight.shape)).copy_(weight)

    @property
    def trained(self) -> list[torch.Tensor]:
        """All parameters that a gradient is made for."""
        return [parameter for p in self.projections for parameter in p.trained]

    @property
    def needs_input(self) -> bool:
        """Whether the backward pass to the parameters needs the group's input."""
        return bool(self.trained)

    @property
    def rank(self) -> int:
        """Rank of all adapters of the group together."""
        return 0 if self.a_RK is None else self.a_RK.shape[0]

    def forward(
        self, x_TK: torch.Tensor, out_TN: torch.Tensor, u_TR: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute all outputs into one buffer.

        Args:
            x_TK: Input.
            out_TN: Where to write, N the outputs of the whole group; any row stride.
            u_TR: Where to write U = x A^T of all adapters, for the backward pass; None forgets it.
        """
        u_TR = self.project_down(x_TK, u_TR)
        column = rank = 0
        for projection, weight, b_NR in zip(self.projections, self.weights, self.b, strict=True):
            part = out_TN[:, column : column + projection.num_outputs]
            column += projection.num_outputs
            torch.mm(x_TK, weight.t(), out=part)
            if projection.bias_N is not None:
                part.add_(projection.bias_N)
            if b_NR is not None:
                assert u_TR is not None and projection.adapter is not None
                r = b_NR.shape[1]
                part.addmm_(u_TR[:, rank : rank + r], b_NR.t(), alpha=projection.adapter.scale)
                rank += r
        return out_TN

    def project_down(
        self, x_TK: torch.Tensor, u_TR: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Return U = x A^T of all adapters, or None when there are none."""
        if self.a_RK is None:
            return None
        if u_TR is None:
            u_TR = torch.empty((len(x_TK), self.rank), dtype=self.dtype, device=self.device)
        torch.mm(x_TK, self.a_RK.t(), out=u_TR)
        if self.a_low_RK is not None:
            u_TR.addmm_(x_TK, self.a_low_RK.t())
        return u_TR

    def backward(
        self,
        dy_TN: torch.Tensor,
        x_TK: torch.Tensor,
        gradients: Gradients,
        dx_TK: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Add the parameters' gradients to their sums, and return the input's gradient.

        Args:
            dy_TN: Gradient of the outputs.
            x_TK: The forward's input.
            gradients: Sums over token blocks.
            dx_TK: Where to write the gradient of x; None when nobody needs it.
        """
        p_TR = self.backward_input(dy_TN, self.project_down(x_TK), gradients, dx_TK)
        self.backward_weights(dy_TN, x_TK, p_TR, gradients)
        return dx_TK

    def backward_input(
        self,
        dy_TN: torch.Tensor,
        u_TR: torch.Tensor | None,
        gradients: Gradients,
        dx_TK: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Write the input's gradient, add that of every B to its sum, and return P = s dY B.

        The first part of `backward`, for a caller that has U but not yet the input.
        """
        p_TR = None if u_TR is None else torch.empty_like(u_TR)
        column = rank = 0
        for index, (projection, b_NR) in enumerate(zip(self.projections, self.b, strict=True)):
            dy = dy_TN[:, column : column + projection.num_outputs]
            column += projection.num_outputs
            if dx_TK is not None and index == 0:
                torch.mm(dy, self.weights[0], out=dx_TK)
            elif dx_TK is not None:
                dx_TK.addmm_(dy, self.weights[index])
            if b_NR is not None:
                assert u_TR is not None and p_TR is not None and projection.adapter is not None
                part = slice(rank, rank + b_NR.shape[1])
                rank = part.stop
                adapter = projection.adapter
                lora_backward(
                    dy, b_NR, u_TR[:, part], adapter.scale, p_TR=p_TR[:, part],
                    db_NR=gradients.sum_of(adapter.b_NR),
                )  # fmt: skip
                low = self.b_low[index]
                if low is not None:
                    p_TR[:, part].addmm_(dy, low, alpha=adapter.scale)
        if p_TR is not None and dx_TK is not None:
            assert self.a_RK is not None
            dx_TK.addmm_(p_TR, self.a_RK)
        return p_TR

    def backward_weights(
        self,
        dy_TN: torch.Tensor,
        x_TK: torch.Tensor,
        p_TR: torch.Tensor | None,
        gradients: Gradients,
    ) -> None:
        """Add the gradients of weights, biases and every A to their sums: the rest of `backward`."""
        column = 0
        for projection in self.projections:
            dy = dy_TN[:, column : column + projection.num_outputs]
            column += projection.num_outputs
            weight, bias = projection.weight, projection.bias_N
            if isinstance(weight, torch.Tensor) and weight.requires_grad:
                left, right = (x_TK, dy) if projection.transposed else (dy, x_TK)
                gradients.add_product(weight, left, right)
            if bias is not None and bias.requires_grad:
                gradients.add(bias, dy.sum(0, dtype=torch.float32))
        if p_TR is not None:
            self._stacked_gradient(p_TR, x_TK, gradients)

    def _stacked_gradient(
        self, p_TR: torch.Tensor, x_TK: torch.Tensor, gradients: Gradients
    ) -> None:
        """Add P^T X to the gradients of all A at once."""
        adapters = [p.adapter for p in self.projections if p.adapter]
        if not any(a.a_RK.requires_grad for a in adapters):
            return
        # In float32 (SmolLM2-135M, rank 16, 256 tokens, EPYC Zen 5: 0.1 ms where bfloat16 takes 0.06).
        stacked = sum_product(p_TR, x_TK)
        ranks = [a.a_RK.shape[0] for a in adapters]
        for adapter, part in zip(adapters, stacked.split(ranks), strict=True):
            gradients.add(adapter.a_RK, part)


class Gradients:
    """Float32 sums, over token blocks, of the gradients of one half's parameters.

    Args:
        parameters: Those that take part, in the order autograd was given them.
        num_blocks: Token blocks to come. With one, a product is its own sum, rounded once.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], num_blocks: int) -> None:
        self.parameters, self.num_blocks = parameters, num_blocks
        self._sums: dict[int, torch.Tensor] = {}

    def sum_of(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """Return the sum to add to, zeros at first; None for a parameter that is not trained."""
        if not parameter.requires_grad:
            return None
        if id(parameter) not in self._sums:
            self._sums[id(parameter)] = torch.zeros(
                parameter.shape, dtype=torch.promote_types(parameter.dtype, torch.float32),
                device=parameter.device,
            )  # fmt: skip
        return self._sums[id(parameter)]

    def add(self, parameter: torch.Tensor, part: torch.Tensor) -> None:
        """Add a block's part."""
        total = self.sum_of(parameter)
        if total is not None:
            total.add_(part)

    def add_product(
        self, parameter: torch.Tensor, left_TN: torch.Tensor, right_TK: torch.Tensor
    ) -> None:
        """Add left^T right, a block's part of a weight's gradient."""
        total = self._sums.get(id(parameter))
        if total is None:
            product = torch.mm(left_TN.t(), right_TK)
            self._sums[id(parameter)] = product if self.num_blocks == 1 else product.float()
        elif total.dtype == left_TN.dtype:
            total.addmm_(left_TN.t(), right_TK)
        else:
            total.add_(torch.mm(left_TN.t(), right_TK))

    def take(self) -> list[torch.Tensor | None]:
        """Return the gradients in the parameters' dtypes and order."""
        taken = []
        for parameter in self.parameters:
            total = self._sums.get(id(parameter))
            taken.append(None if total is None else total.to(parameter.dtype))
        return taken


def keep_4bit_weights(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights at the first evaluation on a CPU with AVX512-BF16.

    The repacked weights have other values (scales rounded to bfloat16), and a product with them has no
    gradient, so that training after an evaluation would go wrong in silence (bitsandbytes 0.50.2,
    `Linear4bit.forward`). This can go when training with repacked weights raises or works.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
