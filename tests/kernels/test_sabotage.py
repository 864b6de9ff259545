"""The harness itself: what is wrong must be found, for every kernel and every output."""

import pytest
import torch
from harness import SPECS, compare, make

from whet.kernels import norm, rope
from whet.kernels.spec import ours


def zeros(value):
    return torch.zeros_like(value)


def wrong_sign(value):
    # Codes have no sign; their complement is as wrong as can be.
    return -value if value.is_floating_point() else 255 - value


def dropped_last_row(value):
    value = value.clone()
    # One value of a flat buffer may be as small as the error of an 8-bit code.
    rows = 1 if value.dim() > 1 else 1 + len(value) // 8
    value[-rows:] = 0
    return value


def not_a_number(value):
    return value * float("nan") if value.is_floating_point() else value + 1


SABOTAGES = (zeros, wrong_sign, dropped_last_row, not_a_number)
OUTPUTS = [
    (name, output)
    for name, spec in SPECS.items()
    for output in ours(spec, spec.cases[0], make(spec, spec.cases[0], torch.float32))
]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("sabotage", SABOTAGES)
@pytest.mark.parametrize(("name", "output"), OUTPUTS)
def test_a_sabotaged_output_is_found(name, output, sabotage, dtype):
    def run(spec, case, inputs):
        outputs = ours(spec, case, inputs)
        outputs[output] = sabotage(outputs[output])
        return outputs

    spec = SPECS[name]
    faults = compare(spec, spec.cases[0], dtype, run=run)
    assert [line.split(":")[0] for line in faults] == [output]


def faulty_outputs(name, case_name="", dtype=torch.bfloat16):
    spec = SPECS[name]
    case = next(case for case in spec.cases if case.name.startswith(case_name))
    return {line.split(":")[0] for line in compare(spec, case, dtype)}


def test_rope_shifted_by_a_token_is_found(monkeypatch):
    forward, backward = rope.rope_forward, rope.rope_backward

    def shift(function):
        def shifted(a, b, cos, sin, **options):
            return function(a, b, cos.roll(1, 0), sin.roll(1, 0), **options)

        return shifted

    monkeypatch.setattr(rope, "rope_forward", shift(forward))
    monkeypatch.setattr(rope, "rope_backward", shift(backward))
    assert faulty_outputs("rope", "half") == {"q_out", "k_out", "dq", "dk"}


def test_rope_with_the_other_layout_is_found(monkeypatch):
    rotate = rope._rotate
    monkeypatch.setattr(
        rope, "_rotate", lambda x, cos, sin, interleaved, out: rotate(x, cos, sin, True, out)
    )
    assert faulty_outputs("rope", "half") == {"q_out", "k_out", "dq", "dk"}


def test_rope_turned_forward_in_the_backward_is_found(monkeypatch):
    backward = rope.rope_backward
    monkeypatch.setattr(
        rope, "rope_backward",
        lambda dq, dk, cos, sin, **options: backward(dq, dk, cos, -sin, **options),
    )  # fmt: skip
    assert faulty_outputs("rope", "half") == {"dq", "dk"}


def test_a_forgotten_unit_offset_is_found(monkeypatch):
    monkeypatch.setattr(norm, "_scale", lambda weight, unit_offset: weight.float())
    assert faulty_outputs("norm", "gemma") == {"y", "dx"}


def test_a_norm_backward_without_its_projection_is_found(monkeypatch):
    monkeypatch.setattr(
        norm.torch.linalg, "vecdot", lambda a, b: torch.zeros(a.shape[:-1], dtype=a.dtype)
    )
    assert faulty_outputs("norm", "rms") == {"dx"}
