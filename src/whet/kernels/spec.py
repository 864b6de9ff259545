"""What each kernel file says about itself, once, for the tests, the benchmark and the docs table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One set of shapes and options; `case["T"]` reads an option.

    Args:
        name: What is special about it.
        options: Sizes and switches, as the file's own functions read them.
    """

    name: str
    options: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.options[key]

    def get(self, key: str, default: Any = None) -> Any:
        """Read an option that may be absent."""
        return self.options.get(key, default)


@dataclass(frozen=True)
class Aot:
    """One kernel compiled ahead of time for every architecture.

    Args:
        kernel: The jitted function.
        types: Types of the run-time arguments in order; "T" stands for the tensors' dtype.
        variants: Compile-time arguments (and optional tensors that are None), and `num_warps`, as
            the launch chooses them; one compilation each.
    """

    kernel: Any
    types: str
    variants: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Spec:
    """One operation: how to test it, time it and describe it.

    The truth is `original` in float64; the judge is the original in the tested dtype. Both are
    plain differentiable torch, written as the forward alone and differentiated by autograd.

    Args:
        name: The file's name.
        summary: One line for the docs table.
        traffic: What is moved, in words, for the docs table.
        cases: Small odd shapes, which the interpreter also runs.
        large: Shapes of real models, for a GPU.
        bench: The case timed on each device type.
        make_inputs: (case, dtype, device, generator) -> inputs by name.
        original: (case, inputs) -> outputs by name: what an eager user runs today.
        forward: (case, inputs) -> outputs by name, from our function; it may change its inputs.
        backward: (case, inputs, saved) -> gradients by the inputs' names; `saved` is what `forward`
            returned. None when there is no backward, or when `forward` returns gradients too.
        upstream: Output -> the input that holds its gradient.
        leaves: Inputs whose gradients are compared; those absent from a case's inputs are skipped.
        bytes_moved: (case, dtype) -> bytes read and written, of forward and of backward.
        flops: The same in floating-point operations, for a kernel bound by them.
        aot: Its kernels.
        exact: Equal to the last bit, nothing less.
        reference: Truth, where it is not `original`: in float64 without rounding to a code.
    """

    name: str
    summary: str
    traffic: str
    cases: tuple[Case, ...]
    large: tuple[Case, ...]
    bench: Mapping[str, Case]
    make_inputs: Callable[[Case, torch.dtype, str, torch.Generator], Tensors]
    original: Callable[[Case, Tensors], Tensors]
    forward: Callable[[Case, Tensors], Tensors] | None
    bytes_moved: Callable[[Case, torch.dtype], tuple[int, int]]
    backward: Callable[[Case, Tensors, Tensors], Tensors] | None = None
    upstream: Mapping[str, str] = field(default_factory=dict)
    leaves: tuple[str, ...] = ()
    flops: Callable[[Case], tuple[int, int]] | None = None
    aot: tuple[Aot, ...] = ()
    exact: bool = False
    reference: Callable[[Case, Tensors], Tensors] | None = None


def wide(x: torch.Tensor) -> torch.Tensor:
    """Return x in float32, as models do before a sum; float64, the truth, stays float64."""
    return x if x.dtype == torch.float64 else x.float()


def normal(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    generator: torch.Generator,
    *,
    pad: int = 0,
    mean: float = 0.0,
    std: float = 1.0,
) -> torch.Tensor:
    """Return random numbers whose last-but-one stride is `pad` wider than a row.

    Args:
        shape: Shape of the result.
        dtype: Its dtype.
        device: Its device.
        generator: Of the same device.
        pad: Elements between the rows that belong to nobody.
        mean: Their mean.
        std: Their standard deviation.
    """
    wide = (*shape[:-1], shape[-1] + pad)
    values = torch.randn(wide, generator=generator, device=device) * std + mean
    return values.to(dtype)[..., : shape[-1]]


def with_gradients(
    spec: Spec, case: Case, inputs: Tensors, function: Callable[[Case, Tensors], Tensors]
) -> Tensors:
    """Run a differentiable function and return its outputs and the gradients of the leaves.

    Args:
        spec: Names the leaves and the outputs' gradients.
        case: Passed on.
        inputs: Passed on; the leaves among them are detached and differentiated.
        function: `spec.original`, or one like it.
    """
    inputs = dict(inputs)
    leaves = [name for name in spec.leaves if name in inputs and name not in case.get("frozen", ())]
    for name in leaves:
        inputs[name] = inputs[name].detach().clone().requires_grad_(True)
    outputs = function(case, inputs)
    if not leaves:
        return outputs
    pairs = [(outputs[out], inputs[grad]) for out, grad in spec.upstream.items() if grad in inputs]
    gradients = torch.autograd.grad(
        [out for out, _ in pairs],
        [inputs[name] for name in leaves],
        [grad.to(out.dtype) for out, grad in pairs],
    )
    outputs = {name: value.detach() for name, value in outputs.items()}
    return outputs | {f"d{name}": grad for name, grad in zip(leaves, gradients, strict=True)}


def ours(spec: Spec, case: Case, inputs: Tensors) -> Tensors:
    """Run our functions, forward and backward.

    Args:
        spec: The operation.
        case: Passed on.
        inputs: Passed on; may be changed.
    """
    saved = spec.forward(case, inputs) if spec.forward is not None else {}
    outputs = dict(saved)
    if spec.backward is not None:
        outputs |= spec.backward(case, inputs, saved)
    return {name: value for name, value in outputs.items() if not name.startswith("_")}
