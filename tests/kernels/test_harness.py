"""Every kernel against float64: plain torch here, Triton's interpreter, and a real GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import DTYPES, SPECS, all_cases, compare, make

from whet.kernels.launch import triton
from whet.kernels.spec import ours


def label(item):
    name, number, dtype = item
    return f"{name}-{SPECS[name].cases[number].name}-{dtype}".replace(" ", "_")


def large_label(item):
    name, number, dtype = item
    return f"{name}-{SPECS[name].large[number].name}-{dtype}".replace(" ", "_")


@pytest.mark.parametrize("item", all_cases(), ids=label)
def test_torch_path_is_as_close_to_the_truth_as_the_original(item):
    name, number, dtype = item
    assert compare(SPECS[name], SPECS[name].cases[number], DTYPES[dtype]) == []


@pytest.fixture(scope="module")
def interpreted():
    """Verdicts of all cases in the interpreter, from one process."""
    if triton is None:
        pytest.skip("Triton is not installed")
    script = Path(__file__).with_name("interpreted.py")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return {(name, number, dtype): faults for name, number, dtype, faults in lines}


@pytest.mark.parametrize("item", [i for i in all_cases() if i[2] != "bf16"], ids=label)
def test_triton_kernel_in_the_interpreter(item, interpreted):
    assert interpreted[item] == []


@pytest.mark.gpu
@pytest.mark.parametrize("item", all_cases(), ids=label)
def test_triton_kernel_on_a_gpu(item):
    name, number, dtype = item
    assert compare(SPECS[name], SPECS[name].cases[number], DTYPES[dtype], "cuda") == []


@pytest.mark.gpu
@pytest.mark.parametrize("item", all_cases(large=True), ids=large_label)
def test_triton_kernel_on_a_gpu_at_real_sizes(item):
    name, number, dtype = item
    assert compare(SPECS[name], SPECS[name].large[number], DTYPES[dtype], "cuda") == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", SPECS)
def test_two_runs_on_a_gpu_are_equal_to_the_bit(name):
    spec, case = SPECS[name], SPECS[name].large[0]
    first, second = (ours(spec, case, make(spec, case, torch.bfloat16, "cuda")) for _ in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.gpu
def test_offsets_past_2_to_the_31():
    from whet.kernels.cross_entropy import cross_entropy_

    logits = torch.empty(16_500, 131_072, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.full((16_500,), 131_071, device="cuda")
    grad = torch.ones(16_500, device="cuda")
    last = logits[-3:].clone()
    loss, _ = cross_entropy_(logits, target, grad)
    expected, _ = cross_entropy_(last, target[-3:], grad[-3:])
    assert torch.equal(loss[-3:], expected) and torch.equal(logits[-3:], last)


# A GPU that is asked for zero rows would refuse the launch; torch returns empty tensors.
EMPTY = {
    "norm": {"T": 0, "D": 8, "centered": True, "bias": True},
    "rope": {"T": 0, "H": 2, "G": 1, "K": 8, "norm": True},
    "glu": {"T": 0, "F": 8, "activation": "silu"},
    "lora": {"T": 0, "N": 8, "R": 2},
    "cross_entropy": {"N": 0, "V": 8},
    "adamw": {"n": 0},
}


def no_rows(name, device):
    from whet.kernels.spec import Case

    spec, case = SPECS[name], Case("no rows", EMPTY[name])
    for key, value in ours(spec, case, make(spec, case, torch.float32, device)).items():
        assert value.numel() == 0 or not value.any(), key


@pytest.mark.parametrize("name", EMPTY)
def test_no_rows_is_no_fault(name):
    no_rows(name, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", EMPTY)
def test_no_rows_is_no_fault_on_a_gpu(name):
    no_rows(name, "cuda")
