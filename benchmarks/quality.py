"""Whether whet and plain transformers end at the same held-out loss, within the noise of seeds.

    python -m benchmarks.quality --seeds 3 --steps 200 --out benchmarks/results/DATE-MACHINE-quality

SmolLM2-135M on short Alpaca rows through the adapters of `benchmarks.peers`: LoRA on bfloat16 weights,
LoRA on NF4 weights and all weights in float32. A seed is an order of the rows and a start of the
adapter, the same in both frameworks. What is compared is the held-out loss of the trained weights, in
float32 and by one and the same code. No times are claimed, so one framework runs at a time; each run is
written down when it is done, and the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import ROOT
from benchmarks.peers.examples import write_rows
from benchmarks.peers.job import Job, Workload
from benchmarks.peers.registry import PEERS
from benchmarks.peers.report import markdown_table
from benchmarks.peers.turns import take_turns

SAMPLES = ROOT.parent / "shared" / "data"
FRAMEWORKS = ("whet", "hf")
FIRST_SEED = 3407
SMOOTHED = 20  # steps of the running mean in the plot

_COMMON = Workload("", batch_size=2, accumulation=2, warm=0, heldout=48, device="cpu")
KINDS = {
    "lora": replace(_COMMON, name="lora"),
    "nf4": replace(_COMMON, name="nf4", load_in_4bit=True),
    "full": replace(_COMMON, name="full", dtype="float32", parameters="full", learning_rate=2e-5),
}
TITLES = {
    "lora": "LoRA on bfloat16 weights",
    "nf4": "LoRA on NF4 weights, products in bfloat16",
    "full": "all weights, float32",
}


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="orders of the rows and starts of the adapter")
    add("--steps", type=int, default=200, help="optimizer steps of a run")
    add("--accumulation", type=int, default=2, help="passes of two rows that make a step")
    add("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    add("--length", type=int, default=96, help="longest row in tokens; longer ones are left out")
    add("--heldout", type=int, default=_COMMON.heldout, help="rows of the held-out loss")
    add("--data", type=Path, help="folder with alpaca_en_demo.json; else the quickstart's rows")
    add("--out", type=Path, help="result files without their ending, such as results/DATE-NAME")
    add("--jobs-dir", type=Path, help="where the frameworks work; else a temporary folder")
    arguments = parser.parse_args(words)
    arguments.kinds = arguments.kinds.split(",")
    if wrong := [kind for kind in arguments.kinds if kind not in KINDS]:
        parser.error(f"there is no kind '{wrong[0]}'; use {', '.join(KINDS)}")
    if arguments.seeds < 2:
        parser.error("--seeds needs 2 or more: one alone has no noise to compare with")
    if arguments.length < 64:
        parser.error("--length needs 64 or more: there are too few shorter rows")
    if arguments.data is None and (SAMPLES / "alpaca_en_demo.json").exists():
        arguments.data = SAMPLES
    return arguments


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what must be the same in all runs of one result file."""
    return {
        "steps": arguments.steps,
        "longest_row": arguments.length,
        "rows_per_step": _COMMON.batch_size * arguments.accumulation,
        "heldout_rows": arguments.heldout,
        "data": "alpaca_en_demo.json" if arguments.data else "quickstart",
    }


def write_pool(arguments: argparse.Namespace, model: str, folder: Path) -> tuple[list[str], Path]:
    """Write the held-out rows, and return those to train on: each once, none of them held out.

    Args:
        arguments: The command line.
        model: Folder with the tokenizer.
        folder: Where the files go.
    """
    # The harness repeats its rows for ever; 1,000 is once through its sample and more.
    work = replace(
        _COMMON, name="pool", length=arguments.length, heldout=arguments.heldout, rounds=250
    )
    rows, heldout = write_rows(work, model, arguments.data, folder)
    kept_apart = set(heldout.read_text().splitlines())
    pool = [line for line in dict.fromkeys(rows.read_text().splitlines()) if line not in kept_apart]
    if not pool:
        raise SystemExit("no rows are left to train on: lower --heldout, or raise --length")
    return pool, heldout


def write_order(pool: Sequence[str], num: int, seed: int, file: Path) -> None:
    """Write the rows of a run: epochs of the pool, each in an order of its own.

    Args:
        pool: The rows, as lines.
        num: How many rows the run takes.
        seed: Of the order.
        file: Where to.
    """
    chosen, dice = [], random.Random(seed)
    while len(chosen) < num:
        chosen += dice.sample(pool, len(pool))
    file.write_text("".join(f"{line}\n" for line in chosen[:num]))


def heldout_losses(work: Workload, model: str, heldout: Path, folders: list[str]) -> list[float]:
    """Return the float32 held-out loss of trained folders; `-` is the model as it was."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers.evaluate", str(heldout), model,
         str(work.load_in_4bit), *folders],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"the float32 evaluation failed:\n{done.stderr[-2000:]}")
    return [json.loads(line)["loss"] for line in done.stdout.splitlines() if line.startswith("{")]


def measure(
    work: Workload, peer: str, seed: int, model: str, pool: Sequence[str], heldout: Path, base: Path
) -> dict[str, Any]:
    """Train once, and return the loss of each step and the held-out loss."""
    name = f"{work.name}-{peer}-{seed}"
    folder = base / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_order(pool, work.rows, seed, folder / "rows.jsonl")
    variables = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}  # this checkout's whet
    settings = dict(PEERS[peer].variants["default"])
    job = Job(
        peer, "default", settings, work, model, str(folder / "rows.jsonl"), str(folder), "cpu",
        seed, variables,
    )  # fmt: skip

    def tell(line: str) -> None:
        words = line.split()
        if words[0] != "step" or int(words[1]) % 20 == 0:
            print(f"  {name}: {line.strip()}", flush=True)

    (run,) = take_turns([job], [Path(sys.executable)], None, tell)
    if run.failure or len(run.steps) < work.steps:
        raise SystemExit(f"{name}: {run.failure or 'did not finish'}; see {folder}/log.txt")
    (loss,) = heldout_losses(work, model, heldout, [str(job.trained)])
    shutil.rmtree(job.trained)
    return {
        "kind": work.name, "framework": peer, "seed": seed, "heldout_loss": loss,
        "first_grad_norm": run.steps[0]["grad_norm"],
        "losses": [step["loss"] for step in run.steps], "versions": run.versions,
    }  # fmt: skip


def summarise(runs: Sequence[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    """Return a kind's means, deviations and difference, or None while a framework lacks seeds.

    The noise that a difference of means is held against is the standard deviation over the seeds of one
    run, pooled over the frameworks; the difference seed by seed is finer, since a seed is the same rows
    from the same start in both.
    """
    by = {
        peer: {
            run["seed"]: run["heldout_loss"]
            for run in runs
            if (run["kind"], run["framework"]) == (kind, peer)
        }
        for peer in FRAMEWORKS
    }
    own, other = (by[peer] for peer in FRAMEWORKS)
    if len(own) < 2 or set(own) != set(other):
        return None
    deviations = {peer: statistics.stdev(by[peer].values()) for peer in FRAMEWORKS}
    noise = (sum(value**2 for value in deviations.values()) / len(deviations)) ** 0.5
    apart = [own[seed] - other[seed] for seed in sorted(own)]
    return {
        "means": {peer: statistics.mean(by[peer].values()) for peer in FRAMEWORKS},
        "deviations": deviations,
        "noise": noise,
        "difference": statistics.mean(apart),
        "seed_differences": apart,
        "within_noise": abs(statistics.mean(apart)) <= noise,
    }


def sentence(kind: str, found: dict[str, Any]) -> str:
    """Say what a kind's summary comes to."""
    verdict = "within" if found["within_noise"] else "OUTSIDE"
    apart = ", ".join(f"{value:+.5f}" for value in found["seed_differences"])
    return (
        f"{TITLES[kind]}: whet's mean minus transformers' is {found['difference']:+.5f}, the standard "
        f"deviation over seeds is {found['noise']:.5f}: {verdict} seed noise. Seed by seed: {apart}."
    )


def describe_machine() -> str:
    """Return the processor's name and the threads that torch takes."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    threads = torch.get_num_threads()
    return f"{name or platform.machine()}, {threads} thread{'s' * (threads > 1)}"


def head_of(module: str) -> dict[str, str]:
    """Return date, machine, commit and command of a result file, without paths of this machine.

    Args:
        module: The benchmark's module.
    """
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    words: list[str] = []
    for word in sys.argv[1:]:
        if "/" not in word or word.startswith("benchmarks"):
            words.append(word)
        elif words and words[-1].startswith("--"):
            words.pop()  # the option goes with the path
    return {
        "date": date.today().isoformat(), "machine": describe_machine(), "commit": commit,
        "command": shlex.join(["python", "-m", module, *words]),
    }  # fmt: skip


def table_of(results: dict[str, Any], kinds: Sequence[str]) -> str:
    """Return the table of held-out losses."""
    runs = results["runs"]
    seeds = sorted({run["seed"] for run in runs})
    rows = []
    for kind in kinds:
        found = summarise(runs, kind)
        for peer in FRAMEWORKS:
            by = {
                run["seed"]: f"{run['heldout_loss']:.5f}"
                for run in runs
                if (run["kind"], run["framework"]) == (kind, peer)
            }
            cells = [kind, PEERS[peer].title, f"{results['before'].get(kind, 0):.5f}"]
            cells += [by.get(seed, "") for seed in seeds]
            cells += [""] * 3
            if found:
                cells[-3:] = [f"{found['means'][peer]:.5f}", f"{found['deviations'][peer]:.5f}", ""]
                if peer == FRAMEWORKS[0]:
                    cells[-1] = f"{found['difference']:+.5f} ({found['noise']:.5f})"
            rows.append(cells)
    head = ["kind", "framework", "before training", *(f"seed {seed}" for seed in seeds)]
    head += ["mean", "standard deviation", "difference of means (seed deviation)"]
    return markdown_table(head, rows)


def plot(runs: Sequence[dict[str, Any]], kinds: Sequence[str], file: Path) -> None:
    """Draw each kind's training loss: the mean over seeds, and its running mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(kinds), figsize=(4.8 * len(kinds), 3.8), squeeze=False, layout="constrained"
    )
    for axis, kind in zip(axes[0], kinds, strict=True):
        for peer, colour, style in zip(
            FRAMEWORKS, ("#c2410c", "#334155"), ("-", "--"), strict=True
        ):
            curves = [
                run["losses"] for run in runs if (run["kind"], run["framework"]) == (kind, peer)
            ]
            if not curves:
                continue
            mean = [statistics.mean(at) for at in zip(*curves, strict=True)]
            size = min(SMOOTHED, len(mean))
            smooth = [statistics.mean(mean[i - size : i]) for i in range(size, len(mean) + 1)]
            axis.plot(range(1, len(mean) + 1), mean, color=colour, alpha=0.25, linewidth=0.8)
            label = f"{PEERS[peer].title}, mean of {len(curves)} seeds"
            axis.plot(range(size, len(mean) + 1), smooth, style, color=colour, label=label)
        axis.set_title(TITLES[kind], fontsize=9)
        axis.set_xlabel(f"step (line: mean of the last {SMOOTHED})")
        axis.set_ylabel("training loss")
        axis.legend(fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def write_results(out: Path, results: dict[str, Any]) -> None:
    """Write OUT.json, OUT.md and OUT.png; the first of them whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    runs = results["runs"]
    kinds = [kind for kind in KINDS if any(run["kind"] == kind for run in runs)]
    summaries = {kind: found for kind in kinds if (found := summarise(runs, kind))}
    results = {**results, "summaries": summaries}
    unfinished = Path(f"{out}.json.part")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.replace(f"{out}.json")
    if not runs:
        return
    plot(runs, kinds, Path(f"{out}.png"))
    head, settings = results["head"], results["settings"]
    versions = {
        f"{PEERS[run['framework']].title}: "
        + ", ".join(f"{name} {number}" for name, number in run["versions"].items())
        for run in runs
    }
    lines = [
        f"# {out.name}", "",
        f"{head['date']}, {head['machine']}, whet at {head['commit']}. `{head['command']}`", "",
        f"SmolLM2-135M, {settings['steps']} optimizer steps of {settings['rows_per_step']} rows of at "
        f"most {settings['longest_row']} tokens ({settings['data']}; {results['pool_rows']} rows, in "
        f"epochs), AdamW at a constant {KINDS['lora'].learning_rate:g} (LoRA, NF4) or "
        f"{KINDS['full'].learning_rate:g} (full). A seed is an order of the rows and a start of the "
        f"adapter, the same in both frameworks. Losses are those of {settings['heldout_rows']} other "
        "rows under the trained weights in float32, by one and the same code. `transformers` is Trainer "
        "with peft and bitsandbytes; for NF4 it follows peft's recipe, which computes norms and the head "
        "in float32, so there the two differ in rounding by design.", "",
        f"![plot]({out.name}.png)", "", table_of(results, kinds), "",
        *(f"- {sentence(kind, found)}" for kind, found in summaries.items()), "",
        "Versions: " + "; ".join(sorted(versions)) + ".", "",
    ]  # fmt: skip
    Path(f"{out}.md").write_text("\n".join(lines))


def read_results(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what an interrupted benchmark has found, or an empty result."""
    settings = settings_of(arguments)
    file = Path(f"{arguments.out}.json")
    if arguments.out and file.exists():
        results = json.loads(file.read_text())
        if results["settings"] != settings:
            raise SystemExit(
                f"{file} was made with {results['settings']}, not {settings}; choose another --out"
            )
        return results
    head = head_of("benchmarks.quality")
    return {"head": head, "settings": settings, "pool_rows": 0, "before": {}, "runs": []}


def main(words: Sequence[str] | None = None) -> int:
    """Train what is not there yet, and print what it comes to; 1 when a kind is outside the noise."""
    arguments = parse(words)
    from whet.model.load import resolve

    model, results = resolve("smollm2-135m"), read_results(arguments)
    done = [(run["kind"], run["framework"], run["seed"]) for run in results["runs"]]
    with tempfile.TemporaryDirectory(prefix="whet-quality-") as scratch:
        base = (arguments.jobs_dir or Path(scratch)).resolve()
        pool, heldout = write_pool(arguments, model, base)
        results["pool_rows"] = len(pool)
        # Seed by seed, so that what an interruption leaves can be compared.
        wishes = [
            (kind, peer, FIRST_SEED + number)
            for number in range(arguments.seeds)
            for kind in arguments.kinds
            for peer in FRAMEWORKS
        ]
        for kind, peer, seed in wishes:
            if (kind, peer, seed) in done:
                continue
            work = replace(
                KINDS[kind], length=arguments.length, rounds=arguments.steps,
                accumulation=arguments.accumulation,
            )  # fmt: skip
            if kind not in results["before"]:
                (results["before"][kind],) = heldout_losses(work, model, heldout, ["-"])
            found = measure(work, peer, seed, model, pool, heldout, base)
            results["runs"].append(found)
            print(f"{kind} {peer} {seed}: held-out loss {found['heldout_loss']:.5f}", flush=True)
            if arguments.out:
                write_results(arguments.out, results)
    if arguments.out:  # a page is written anew also where nothing was left to train
        write_results(arguments.out, results)
    summaries = {kind: summarise(results["runs"], kind) for kind in arguments.kinds}
    print("\n".join(sentence(kind, found) for kind, found in summaries.items() if found))
    return int(any(found and not found["within_noise"] for found in summaries.values()))


if __name__ == "__main__":
    sys.exit(main())
