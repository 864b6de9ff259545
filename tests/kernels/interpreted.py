"""Run every case through Triton's interpreter and print a JSON line for each.

A program of its own: Triton reads TRITON_INTERPRET where a kernel is defined, and in the tests'
process the kernels are defined already. bfloat16 is left out because the interpreter cuts off where a
GPU rounds.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

torch.set_num_threads(1)

from harness import DTYPES, SPECS, all_cases, compare  # noqa: E402

from whet.kernels.launch import INTERPRETED  # noqa: E402

assert INTERPRETED
for name, number, dtype in all_cases():
    if dtype == "bf16":
        continue
    faults = compare(SPECS[name], SPECS[name].cases[number], DTYPES[dtype])
    print(json.dumps([name, number, dtype, faults]), flush=True)
