"""Time each kernel against eager torch, torch.compile and Liger, on the CPU or on a GPU.

    python -m benchmarks.kernels [--quick] [--json FILE] [--kernel NAME]

The machine's own rates come first (a copy, and a matrix product in each dtype); a kernel is given as
a share of the time that the slower of its traffic and its arithmetic would take at those rates.
Candidates take turns, so that a machine that slows down slows all of them; medians, and the
half-width of the middle half of the measurements in percent. Without --json the figures go to
$RESULTS_DIR/kernels.json where that is set.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from rich.console import Console
from rich.table import Table

from whet.kernels.spec import Case, Spec, Tensors

MODULES = ("norm", "rope", "glu", "lora", "nf4", "nf4_quantize", "cross_entropy", "optim")
CANDIDATES = ("ours", "eager", "compile", "liger")
Call = Callable[[], object]


def main() -> None:
    """Measure, print one table, and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="under a minute; no torch.compile")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--kernel", action="append", help="only this one; may be repeated")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = describe_machine(device)
    console = Console(width=150 if not os.isatty(1) else None)
    console.print(", ".join(str(value) for value in machine.values()), highlight=False)
    ceilings = measure_ceilings(device, args.quick)
    console.print(
        "ceilings: " + ", ".join(f"{name} {value:.4g}" for name, value in ceilings.items()),
        highlight=False,
    )
    rows, notes = [], set()
    for spec in all_specs():
        if args.kernel and spec.name not in args.kernel:
            continue
        rows += measure_kernel(spec, device, args.quick, ceilings, notes)
    console.print(table_of(rows))
    for note in sorted(notes):
        console.print(note, highlight=False)
    folder = os.environ.get("RESULTS_DIR")
    path = args.json or (Path(folder) / "kernels.json" if folder else None)
    if path is not None:
        result = {"machine": machine, "ceilings": ceilings, "rows": rows, "notes": sorted(notes)}
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def all_specs() -> list[Spec]:
    """List what the kernel files enrol."""
    return [s for name in MODULES for s in importlib.import_module(f"whet.kernels.{name}").SPECS]


def describe_machine(device: str) -> dict[str, str]:
    """Say what the figures were measured on."""
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    threads = "" if device == "cuda" else f"{torch.get_num_threads()} thread(s)"
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    day = time.strftime("%Y-%m-%d")
    machine = {"device": name, "threads": threads, "versions": versions, "date": day}
    return {key: value for key, value in machine.items() if value}


def cpu_name() -> str:
    """Return the processor's name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def time_call(call: Call, device: str, repeats: int) -> float:
    """Return the mean seconds of some calls in a row."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def interleave(calls: dict[str, Call], device: str, quick: bool) -> dict[str, list[float]]:
    """Time the calls in turn; return each one's seconds, one figure a round."""
    rounds, slice_s = (7, 0.02) if quick else (15, 0.08)
    repeats = {}
    for name, call in calls.items():
        call()  # compiles, allocates, warms the caches
        repeats[name] = max(1, int(slice_s / max(1e-6, time_call(call, device, 1))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(time_call(call, device, repeats[name]))
    return times


def measure_ceilings(device: str, quick: bool) -> dict[str, float]:
    """Measure the rate of a copy in GB/s and of a matrix product in TFLOP/s for each dtype."""
    count = (1 << 28) if device == "cuda" else (1 << 24)
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {"copy GB/s": lambda: target.copy_(source)}
    size = 8192 if device == "cuda" else 768
    dtypes = [torch.float32, torch.bfloat16] + ([torch.float16] if device == "cuda" else [])
    for dtype in dtypes:
        a = torch.randn(size, size, device=device).to(dtype)
        calls[f"{dtype} TFLOP/s".removeprefix("torch.")] = lambda a=a: a @ a
    work = {name: 2 * size**3 / 1e12 for name in calls} | {"copy GB/s": 8 * count / 1e9}
    times = interleave(calls, device, quick)
    return {name: work[name] / statistics.median(times[name]) for name in calls}


def measure_kernel(
    spec: Spec, device: str, quick: bool, ceilings: dict[str, float], notes: set[str]
) -> list[dict[str, Any]]:
    """Time one kernel's passes with every candidate there is."""
    case = spec.bench[device]
    # The optimizers' baseline keeps its moments in the parameters' dtype: float32 for equal work.
    half = device == "cuda" and not spec.name.startswith("adamw")
    dtype = torch.bfloat16 if half else torch.float32
    passes = our_passes(spec, case, fresh_inputs(spec, case, dtype, device))
    others = {"eager": own_baseline(spec, case, fresh_inputs(spec, case, dtype, device), notes)}
    if spec.name not in OWN_BASELINES:
        others["eager"] = autograd_passes(spec, case, dtype, device, spec.original)
        if quick:
            notes.add("compile: left out by --quick.")
        elif device == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            notes.add("compile: left out, no C++ compiler.")
        else:
            torch._dynamo.reset()
            compiled = torch.compile(spec.original, dynamic=False)
            others["compile"] = autograd_passes(spec, case, dtype, device, compiled)
        others["liger"] = liger_passes(spec, case, dtype, device, notes)
    rows = []
    for index, (label, call) in enumerate(passes.items()):
        calls = {"ours": call}
        calls |= {name: found[label] for name, found in others.items() if label in found}
        # A backward's graph is kept and used again, which buffers given away would forbid.
        with torch._functorch.config.patch(donated_buffer=False):
            times = interleave(calls, device, quick)
        part = index if len(passes) > 1 else (0 if spec.forward is not None else 1)
        rows.append(row_of(spec, case, dtype, label, part, times, ceilings))
    return rows


def fresh_inputs(spec: Spec, case: Case, dtype: torch.dtype, device: str) -> Tensors:
    """Make a case's inputs; the same each time."""
    return spec.make_inputs(case, dtype, device, torch.Generator(device).manual_seed(0))


def our_passes(spec: Spec, case: Case, inputs: Tensors) -> dict[str, Call]:
    """Return our forward and backward as calls."""
    forward, backward = spec.forward, spec.backward
    if forward is None:
        assert backward is not None
        return {"backward": lambda: backward(case, inputs, {})}
    if backward is None:
        label = "both" if spec.leaves else "forward"
        return {label: lambda: forward(case, inputs)}
    saved = forward(case, inputs)
    return {
        "forward": lambda: forward(case, inputs),
        "backward": lambda: backward(case, inputs, saved),
    }


def autograd_passes(
    spec: Spec, case: Case, dtype: torch.dtype, device: str, function: Callable
) -> dict[str, Call]:
    """Return the passes of a differentiable function, its backward through autograd."""
    inputs = fresh_inputs(spec, case, dtype, device)
    plain = dict(inputs)

    def forward() -> Tensors:
        with torch.no_grad():
            return function(case, plain)

    names = [n for n in spec.leaves if n in inputs and n not in case.get("frozen", ())]
    if not names:
        return {"forward": forward}
    leaves = [inputs[name].detach().clone().requires_grad_(True) for name in names]
    inputs |= dict(zip(names, leaves, strict=True))
    wanted = [(out, grad) for out, grad in spec.upstream.items() if grad in inputs]

    def graph() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        outputs = function(case, inputs)
        outs = [outputs[out] for out, _ in wanted]
        return outs, [inputs[g].to(o.dtype) for o, (_, g) in zip(outs, wanted, strict=True)]

    def both() -> object:
        outs, grads = graph()
        return torch.autograd.grad(outs, leaves, grads)

    if spec.backward is None:
        return {"both": both}
    with torch._functorch.config.patch(donated_buffer=False):
        outs, grads = graph()
    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(outs, leaves, grads, retain_graph=True),
    }


def _adamw(case: Case, inputs: Tensors) -> Call:
    parameter = torch.nn.Parameter(inputs["param"])
    parameter.grad = inputs["grad"]
    return torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.1).step


def _adamw_8bit(case: Case, inputs: Tensors) -> Call:
    import bitsandbytes

    parameter = torch.nn.Parameter(inputs["param"])
    parameter.grad = inputs["grad"]
    return bitsandbytes.optim.AdamW8bit([parameter], lr=1e-2, weight_decay=0.1).step


def _nf4(case: Case, inputs: Tensors) -> Call:
    import bitsandbytes.functional as bnb

    weight = torch.randn(case["N"], case["K"], device=inputs["out"].device).to(inputs["out"].dtype)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=case["block"], quant_type="nf4", compress_statistics=case["double"]
    )
    return lambda: bnb.dequantize_4bit(packed, state)


def _nf4_quantize(case: Case, inputs: Tensors) -> Call:
    import bitsandbytes.functional as bnb

    return lambda: bnb.quantize_4bit(inputs["w"], blocksize=case["block"], quant_type="nf4")


# What an eager user runs where that is a library's own code, not a few lines of torch.
OWN_BASELINES = {
    "adamw": (_adamw, "torch.optim.AdamW"),
    "adamw_8bit": (_adamw_8bit, "bitsandbytes' AdamW8bit"),
    "nf4": (_nf4, "bitsandbytes' dequantize_4bit"),
    "nf4_quantize": (_nf4_quantize, "bitsandbytes' quantize_4bit"),
}


def own_baseline(spec: Spec, case: Case, inputs: Tensors, notes: set[str]) -> dict[str, Call]:
    """Return the library's own call for the kernels that have one."""
    if spec.name not in OWN_BASELINES:
        return {}
    make, name = OWN_BASELINES[spec.name]
    notes.add(f"eager of {spec.name}: {name}.")
    return {"forward": make(case, inputs)}


def _liger_rope(functional: Any, inputs: Tensors) -> Tensors:
    cos, sin = (torch.cat((inputs[n], inputs[n]), -1)[None] for n in ("cos", "sin"))
    q, k = (inputs[n].transpose(0, 1)[None] for n in ("q", "k"))
    q, k = functional.liger_rope(q, k, cos, sin)
    return {"q_out": q[0].transpose(0, 1), "k_out": k[0].transpose(0, 1)}


LIGER: dict[str, Callable[[Any, Tensors], Tensors]] = {
    "norm": lambda f, i: {"y": f.liger_rms_norm(i["x"], i["weight"], 1e-5, in_place=False)},
    "rope": _liger_rope,
    "glu": lambda f, i: {"a": f.liger_swiglu(i["gate"], i["up"])},
    "cross_entropy": lambda f, i: {
        "loss": f.liger_cross_entropy(i["logits"], i["target"], reduction="none")
    },
}


def liger_passes(
    spec: Spec, case: Case, dtype: torch.dtype, device: str, notes: set[str]
) -> dict[str, Call]:
    """Return Liger's passes where it has the kernel, is installed and can run."""
    if spec.name not in LIGER:
        return {}
    if device == "cpu":
        notes.add("liger: n/a on the CPU.")
        return {}
    try:
        functional = importlib.import_module("liger_kernel.transformers.functional")
    except ImportError:
        notes.add("liger: not installed.")
        return {}
    return autograd_passes(
        spec, case, dtype, device, lambda _, inputs: LIGER[spec.name](functional, inputs)
    )


def row_of(
    spec: Spec,
    case: Case,
    dtype: torch.dtype,
    label: str,
    part: int,
    times: dict[str, list[float]],
    ceilings: dict[str, float],
) -> dict[str, Any]:
    """Return one line of figures; times in milliseconds."""
    row: dict[str, Any] = {
        "kernel": spec.name, "pass": label, "case": case.name, "dtype": str(dtype).split(".")[1],
    }  # fmt: skip
    for name, seconds in times.items():
        low, middle, high = statistics.quantiles(seconds, n=4)
        row[f"{name}_ms"] = 1e3 * middle
        row[f"{name}_spread_percent"] = 50 * (high - low) / middle
    ours = statistics.median(times["ours"])
    gigabytes = spec.bytes_moved(case, dtype)[part] / 1e9
    teraflop = spec.flops(case)[part] / 1e12 if spec.flops else 0.0
    by_traffic = gigabytes / ceilings["copy GB/s"]
    by_arithmetic = teraflop / ceilings[f"{row['dtype']} TFLOP/s"]
    row["rate"] = teraflop / ours if by_arithmetic > by_traffic else gigabytes / ours
    row["unit"] = "TFLOP/s" if by_arithmetic > by_traffic else "GB/s"
    row["percent_of_ceiling"] = 100 * max(by_traffic, by_arithmetic) / ours
    if "eager" in times:
        row["ours_over_eager"] = ours / statistics.median(times["eager"])
    return row


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Lay the figures out for a person."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("kernel", "pass", "case", "dtype"):
        table.add_column(name, no_wrap=True)
    for name in (*(f"{c} ms" for c in CANDIDATES), "rate", "% ceiling", "ours/eager"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [row["kernel"], row["pass"], row["case"], row["dtype"]]
        for name in CANDIDATES:
            if f"{name}_ms" in row:
                cells.append(f"{row[f'{name}_ms']:.3f} ±{row[f'{name}_spread_percent']:.0f}%")
            else:
                cells.append("-")
        cells.append(f"{row['rate']:.3g} {row['unit']}")
        cells.append(f"{row['percent_of_ceiling']:.0f}")
        cells.append(f"{row['ours_over_eager']:.2f}" if "ours_over_eager" in row else "-")
        table.add_row(*cells)
    return table


if __name__ == "__main__":
    main()
