import subprocess
import sys

from harness import NAMES

PROGRAM = """
import sys
sys.modules["triton"] = None  # importing it now fails as where it has no wheels
import torch
import importlib
for name in sys.argv[1:]:
    module = importlib.import_module(f"whet.kernels.{name}")
    for spec in module.SPECS:
        generator = torch.Generator().manual_seed(0)
        inputs = spec.make_inputs(spec.cases[0], torch.float32, "cpu", generator)
        from whet.kernels.spec import ours
        assert ours(spec, spec.cases[0], inputs)
"""


def test_kernels_work_where_triton_is_not_installed():
    result = subprocess.run([sys.executable, "-c", PROGRAM, *NAMES], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
