"""Run workloads in whet and in its peers.

python -m benchmarks.peers --peers hf,trl,unsloth --workloads alpaca-bf16,alpaca-nf4
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.peers import report
from benchmarks.peers.environments import ROOT, environment
from benchmarks.peers.examples import write_rows
from benchmarks.peers.job import Job, Workload
from benchmarks.peers.registry import PEERS
from benchmarks.peers.turns import Run, take_turns
from benchmarks.peers.workloads import WORKLOADS

MODELS = ROOT / "benchmarks" / ".models"
SAMPLES = ROOT.parent / "shared" / "data"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; whet runs beside whatever peers are named."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description="The same work in whet and in its peers."
    )
    add = parser.add_argument
    add("--peers", default="hf,trl,unsloth", help=f"of {', '.join(PEERS)}; whet always runs")
    add("--workloads", default="alpaca-bf16", help=f"of {', '.join(WORKLOADS)}")
    add("--variants", help="default, tuned, both, all, or a name")
    add("--rounds", type=int, help="timed steps, instead of the workload's own")
    add("--own", default="default", help="whet's variants: default, lean")
    add("--against", help="whet's own source at another commit, as one more peer")
    add("--at-once", type=int, help="processes that hold a model at a time")
    add("--threads", type=int, help="OpenMP threads of each process")
    add("--data", type=Path, help="folder with the sample files; else the quickstart's rows")
    add("--environments", type=Path, default=ROOT / "benchmarks" / ".environments")
    add("--here", action="store_true", help="run all peers in this environment; make none")
    add("--no-evaluation", action="store_true", help="leave out the float32 held-out loss")
    add("--out", type=Path, help="result files without their ending, such as results/DATE-NAME")
    add("--name", help="write results/DATE-MACHINE-NAME.{json,md,png} beside the benchmarks")
    arguments = parser.parse_args(words)
    arguments.peers = [name for name in arguments.peers.split(",") if name and name != "whet"]
    arguments.workloads = arguments.workloads.split(",")
    for name in arguments.peers:
        if name not in PEERS:
            parser.error(f"there is no peer '{name}'; use {', '.join(PEERS)}")
    for name in arguments.workloads:
        if name not in WORKLOADS:
            parser.error(f"there is no workload '{name}'; use {', '.join(WORKLOADS)}")
    if arguments.data is not None and not arguments.data.is_dir():
        parser.error(f"--data '{arguments.data}' is not a folder")
    if arguments.rounds is not None and arguments.rounds < 3:
        parser.error("--rounds needs 3 or more: a median of less says nothing")
    return arguments


def jobs_of(
    work: Workload, arguments: argparse.Namespace, device: str, model: str, rows: Path, base: Path
) -> tuple[list[Job], list[str]]:
    """Return the jobs of a workload, whet's first, and a line for each peer that is left out."""
    jobs, left_out = [], []
    wishes = [("whet", name) for name in arguments.own.split(",")]
    for name in arguments.peers:
        peer = PEERS[name]
        if peer.needs_cuda and device != "cuda":
            left_out.append(f"{peer.title}: needs a CUDA device")
        elif work.method not in peer.methods:
            left_out.append(f"{peer.title}: has no {work.method}")
        else:
            own = work.variants.get(name) if arguments.variants is None else None
            chosen = own or peer.chosen(arguments.variants or "both", device)
            wishes += [(name, variant) for variant in chosen]
    for name, variant in wishes:
        folder = base / f"{name}-{variant}"
        settings = dict(PEERS[name].variants[variant])
        jobs.append(Job(name, variant, settings, work, model, str(rows), str(folder), device))
    return jobs, left_out


def measure(
    work: Workload, arguments: argparse.Namespace, device: str, base: Path
) -> tuple[dict[str, Any], list[str]]:
    """Run one workload, and return what was found with its lines for the terminal."""
    print(f"{work.name}:", flush=True)
    model = _folder_of(work, base)
    rows, heldout = write_rows(work, model, arguments.data, base)
    jobs, left_out = jobs_of(work, arguments, device, model, rows, base)
    if arguments.against:
        jobs.insert(1, _at_commit(jobs[0], arguments.against, base))
    for line in left_out:
        print(f"  {line}", flush=True)
    pythons = {
        job.peer: environment(
            None if arguments.here else PEERS[job.peer].requirements, arguments.environments
        )
        for job in jobs
    }
    runs: list[Run] = []
    whets: list[Run] = []
    size = max(2, arguments.at_once or work.at_once)
    for start in range(1, max(2, len(jobs)), size - 1):
        group = [jobs[0], *jobs[start : start + size - 1]]
        found = take_turns(group, [pythons[job.peer] for job in group], arguments.threads, _tell)
        runs += found if start == 1 else found[1:]
        whets += [found[0]] * (len(found) if start == 1 else len(found) - 1)
    losses: dict[str, float] = {}
    if not arguments.no_evaluation and work.method == "sft":
        where = pythons.get("hf") or Path(sys.executable)
        losses = _evaluate(work, model, heldout, runs, where)
    tokens, operations = _work_of_steps(work, model, rows)
    entries = report.enter(work, runs, whets, losses, tokens, operations, _flops(work, device))
    found = {**report.to_json(work, entries, runs), "left_out": left_out}
    found["heldout_before"] = losses.get("-")
    lines = [report.plain_table(*report.table(entries)), report.verdict(entries)]
    return found, lines


def _tell(line: str) -> None:
    print(line, flush=True)


def _folder_of(work: Workload, base: Path) -> str:
    """Return the folder of a workload's model; shapes are made from their config."""
    from benchmarks.shapes import SHAPES, make_model
    from whet.model.load import resolve

    if work.model in SHAPES:
        return str(make_model(work.model, MODELS, quantised=work.load_in_4bit))
    return resolve(work.model)


def _at_commit(job: Job, commit: str, base: Path) -> Job:
    """Return whet's job with the package's source as it was at a commit."""
    source = base / "source"
    subprocess.run(
        ["git", "worktree", "add", "--force", "--detach", str(source), commit],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    # The harness stays this checkout's: only the package is the other.
    path = f"{source / 'src'}:{ROOT}"
    folder = base / "whet-at-commit"
    return replace(
        job, variant=f"at {commit}", folder=str(folder), environment={"PYTHONPATH": path}
    )


def _evaluate(
    work: Workload, model: str, heldout: Path, runs: Sequence[Run], python: Path
) -> dict[str, float]:
    folders = [str(run.job.trained) for run in runs if run.job.trained.exists()]
    done = subprocess.run(
        [str(python), "-m", "benchmarks.peers.evaluate", str(heldout), model,
         str(work.load_in_4bit), "-", *folders],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    if done.returncode:
        print(f"  the float32 evaluation failed: {done.stderr.strip().splitlines()[-1:]}")
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["folder"]: line["loss"] for line in found}


def _work_of_steps(work: Workload, model: str, rows: Path) -> tuple[list[int], list[float]]:
    """Return real tokens and necessary operations of each step (PaLM, arXiv 2204.02311, appendix B).

    Frozen weights take two products for a token, trained ones three; the head only where a token is
    learned; attention over half a square. Padding and what is computed twice do not count.
    """
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(model)
    width, layers = config.hidden_size, config.num_hidden_layers
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    groups = getattr(config, "num_key_value_heads", heads)
    layer = 2 * width * heads * head + 2 * width * groups * head
    layer += 3 * width * config.intermediate_size
    factor = 6 if work.parameters == "full" else 4
    tokens, operations = [], []
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    if work.method == "dpo":
        return [0] * work.steps, [0.0] * work.steps
    per_step = work.batch_size * work.accumulation
    for step in range(work.steps):
        part = lines[step * per_step : (step + 1) * per_step]
        lengths = [len(row["input_ids"]) for row in part]
        learned = sum(label != -100 for row in part for label in row["labels"][1:])
        count = factor * sum(lengths) * layers * layer
        count += factor * learned * width * config.vocab_size
        count += 7 * layers * sum(n * n for n in lengths) * heads * head
        tokens.append(sum(lengths))
        operations.append(float(count))
    return tokens, operations


def _flops(work: Workload, device: str) -> float:
    import torch

    from whet.plan.speed import measure_speed

    return measure_speed(getattr(torch, work.dtype), torch.device(device)).flops


def _machine(device: str) -> str:
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return f"{name or platform.processor()}, {torch.get_num_threads()} cores"


def _slug(machine: str) -> str:
    """Return a machine's name for a file's: `amd-epyc-9655-2-cores`."""
    return "-".join(re.findall(r"[a-z0-9]+", machine.lower().replace("(r)", "")))


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print the tables and write the result files; 1 when no run of a workload is valid."""
    arguments = parse(words)
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.name:
        stem = f"{date.today()}-{_slug(_machine(device))}-{arguments.name}"
        arguments.out = ROOT / "benchmarks" / "results" / stem
    if arguments.data is None and (SAMPLES / "alpaca_en_demo.json").exists():
        arguments.data = SAMPLES
    found, printed = [], []
    with tempfile.TemporaryDirectory(prefix="whet-bench-") as scratch:
        for name in arguments.workloads:
            work = WORKLOADS[name]
            if work.device not in (None, device):
                print(f"{name}: is for a {work.device} device, left out")
                continue
            if arguments.rounds:
                work = replace(work, rounds=arguments.rounds)
            result, lines = measure(work, arguments, device, Path(scratch) / name)
            found.append(result)
            printed.append("\n".join([f"\n{name}", *lines]))
            if arguments.out:
                write_results(arguments, found, _machine(device))
    if arguments.against:
        subprocess.run(["git", "worktree", "prune"], cwd=ROOT, check=True)
    print("\n".join(printed))
    if arguments.against:
        return int(any(is_slower(result) for result in found))
    faults = sum(bool(e["invalid"]) for result in found for e in result["entries"])
    total = sum(len(result["entries"]) for result in found)
    print(f"\n{total - faults} of {total} runs are valid")
    return int(any(result["entries"][0]["invalid"] for result in found))


def _kept(arguments: argparse.Namespace, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the workloads of an earlier run with the same name: what ran again replaces its own."""
    file = Path(f"{arguments.out}.json")
    names = {result["workload"]["name"] for result in found} | set(arguments.workloads)
    earlier = json.loads(file.read_text())["workloads"] if file.exists() else []
    return [result for result in earlier if result["workload"]["name"] not in names]


def is_slower(found: dict[str, Any]) -> bool:
    """Tell whether the working tree is slower than the commit it was compared with."""
    ratio = found["entries"][1]["ratio"]
    return bool(found["entries"][0]["invalid"]) or 0 < ratio < 1 / (1 + report.EQUAL)


def write_results(arguments: argparse.Namespace, found: list[dict[str, Any]], machine: str) -> None:
    """Write OUT.json, OUT.md and OUT.png."""
    command = "python -m benchmarks.peers " + shlex.join(
        word for word in sys.argv[1:] if "/" not in word or word.startswith("benchmarks")
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    found = [*_kept(arguments, found), *found]
    head = {
        "date": date.today().isoformat(), "machine": machine, "commit": commit, "command": command,
    }  # fmt: skip
    out = arguments.out
    out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{out}.json").write_text(json.dumps({**head, "workloads": found}, indent=1) + "\n")
    report.plot(found, Path(f"{out}.png"))
    lines = [
        f"# {out.name}", "",
        f"{head['date']}, {machine}, whet at {commit}. `{command}`", "",
        "Each framework in a process and an environment of its own, on the same token ids in the same "
        "order from the same adapter, one step each in turns. Seconds are medians; `x whet` is the "
        "median of each step's seconds over whet's for that step, so that more is slower than whet; "
        "under 10% is equal. MFU counts real tokens only, over the rate of a large product measured "
        "after the runs. Memory is the peak above the loaded model. The held-out loss is that of the "
        "trained weights in float32, by one and the same code.", "",
        f"![plot]({out.name}.png)", "",
    ]  # fmt: skip
    for result in found:
        entries = [report.Entry(**e) for e in result["entries"]]
        lines += [
            f"## {result['workload']['name']}",
            "",
            report.markdown_table(*report.table(entries)),
        ]
        lines += ["", f"{report.verdict(entries)}."]
        lines += [f"{e.title} does not count: {e.invalid}." for e in entries if e.invalid]
        lines += [f"Left out: {line}." for line in result["left_out"]]
        if result["heldout_before"]:
            lines.append(f"Held-out loss before training: {result['heldout_before']:.5f}.")
        lines += ["", "Versions: " + "; ".join(
            f"{run['name']}: " + ", ".join(f"{k} {v}" for k, v in run["versions"].items())
            for run in result["runs"] if run["versions"]
        ) + ".", ""]  # fmt: skip
    Path(f"{out}.md").write_text("\n".join(lines))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (
        RuntimeError,
        ValueError,
    ) as error:  # an environment that pip cannot make, no row that fits
        sys.exit(f"benchmarks.peers: {error}")
