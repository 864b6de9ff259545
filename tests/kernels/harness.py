"""The one harness for every kernel: our outputs and gradients, judged by the original's own error."""

import importlib

import torch

from whet.kernels.spec import ours, with_gradients

NAMES = ("norm", "rope", "glu", "lora", "nf4", "nf4_quantize", "cross_entropy", "optim")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SPECS = {}
for _name in NAMES:
    for _spec in importlib.import_module(f"whet.kernels.{_name}").SPECS:
        SPECS[_spec.name] = _spec


def make(spec, case, dtype, device="cpu"):
    """Make a case's inputs; the same each time."""
    generator = torch.Generator(device).manual_seed(7)
    return spec.make_inputs(case, dtype, device, generator)


def to_double(inputs):
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def compare(spec, case, dtype, device="cpu", run=ours):
    """Return a line for each output that is out of bounds; nothing when all is well.

    The bound: max|ours - truth| <= 2 max|original - truth| + 1e-5 rms(truth), truth in float64.
    """
    result = run(spec, case, make(spec, case, dtype, device))
    if spec.exact:
        expected = spec.original(case, make(spec, case, dtype, device))
        return [
            f"{name}: {(result[name] != value).sum().item()} of {value.numel()} differ"
            for name, value in expected.items()
            if not torch.equal(result[name], value)
        ]
    reference = spec.reference or spec.original
    truth = with_gradients(spec, case, to_double(make(spec, case, dtype, device)), reference)
    original = with_gradients(spec, case, make(spec, case, dtype, device), spec.original)
    expected = {name for name in truth if not name.startswith("_")}
    assert set(result) == expected, (set(result), expected)
    faults = []
    for name in sorted(expected):
        exact = truth[name]
        assert result[name].shape == exact.shape, (name, result[name].shape, exact.shape)
        error = (result[name].double() - exact).abs().max().item()
        judge = (original[name].double() - exact).abs().max().item()
        bound = 2 * judge + 1e-5 * exact.square().mean().sqrt().item()
        if not error <= bound:  # so that a NaN is a fault
            faults.append(f"{name}: error {error:.3g}, bound {bound:.3g}")
    return faults


def all_cases(large=False):
    """List (spec name, case number, dtype name), readable as test ids."""
    found = []
    for name, spec in SPECS.items():
        for number, _ in enumerate(spec.large if large else spec.cases):
            found += [(name, number, dtype) for dtype in DTYPES]
    return found
