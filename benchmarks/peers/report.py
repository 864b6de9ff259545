"""From runs to a table that can be trusted, its result files and its plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.job import Workload
from benchmarks.peers.registry import PEERS
from benchmarks.peers.turns import Run

EQUAL = 0.10  # a smaller difference in speed is called equal
LOSS_TOLERANCE = 0.01  # of the first step's loss, and of the held-out loss


@dataclass(frozen=True)
class Entry:
    """One line of the table; times in seconds, memory in bytes."""

    name: str
    title: str
    invalid: str = ""
    step_seconds: float = 0.0
    fastest: float = 0.0
    slowest: float = 0.0
    ratio: float = 0.0
    tokens_per_second: float = 0.0
    entered_per_second: float = 0.0
    mfu: float = 0.0
    first_step_seconds: float = 0.0
    all_steps_seconds: float = 0.0
    loaded_bytes: int = 0
    above_bytes: int = 0
    reserved_bytes: int = 0
    driver_bytes: int = 0
    pinned_bytes: int = 0
    first_loss: float = 0.0
    first_grad_norm: float = 0.0
    last_loss: float = 0.0
    heldout_loss: float | None = None


def enter(
    work: Workload,
    runs: Sequence[Run],
    whets: Sequence[Run],
    heldout: dict[str, float],
    step_tokens: Sequence[int],
    step_flops: Sequence[float],
    flops: float,
) -> list[Entry]:
    """Make the lines of a workload's table, whet's first and then by speed.

    Args:
        work: The workload.
        runs: All runs; the first is whet's.
        whets: For each run whet's run of the same turns.
        heldout: Held-out loss by the folder of the trained weights.
        step_tokens: Real tokens of each step.
        step_flops: Operations of each step that the mathematics needs.
        flops: Operations a second that the device was measured to do.
    """
    truth = next((r for r in runs if r.job.peer == "hf" and r.steps), None) or next(
        (r for r in runs if r.job.peer == "trl" and r.steps), None
    )
    entries = []
    for run, own in zip(runs, whets, strict=True):
        name = run.job.name
        title = f"{PEERS[run.job.peer].title} {run.job.variant}"
        if run.failure or len(run.steps) < work.steps:
            entries.append(Entry(name, title, run.failure or "did not finish"))
            continue
        timed = run.steps[work.warm :]
        seconds = [step["seconds"] for step in timed]
        tokens, operations = step_tokens[work.warm :], step_flops[work.warm :]
        ratios = [a / b["seconds"] for a, b in zip(seconds, own.steps[work.warm :], strict=False)]
        memory = run.steps[-1]["memory"]
        entries.append(
            Entry(
                name,
                title,
                _invalid(run, truth, heldout),
                statistics.median(seconds),
                min(seconds),
                max(seconds),
                statistics.median(ratios) if ratios else 0.0,
                statistics.median(t / s for t, s in zip(tokens, seconds, strict=True)),
                statistics.median(step["entered"] / step["seconds"] for step in timed),
                statistics.median(f / s for f, s in zip(operations, seconds, strict=True)) / flops,
                run.ready_seconds + run.steps[0]["seconds"],
                run.ready_seconds + sum(step["seconds"] for step in run.steps),
                memory["loaded"],
                max(step["memory"]["above"] for step in run.steps),
                memory.get("reserved", 0),
                memory.get("driver", 0),
                memory.get("pinned", 0),
                run.steps[0]["loss"],
                run.steps[0]["grad_norm"],
                run.steps[-1]["loss"],
                heldout.get(str(run.job.trained)),
            )
        )
    first, *others = entries
    return [first, *sorted(others, key=lambda e: (bool(e.invalid), e.ratio))]


def _invalid(run: Run, truth: Run | None, heldout: dict[str, float]) -> str:
    """Return why a run does not count, or nothing."""
    loss, norm = run.steps[0]["loss"], run.steps[0]["grad_norm"]
    if not norm > 0:
        return "gradient norm 0 at step 1"
    if truth is None or run is truth:
        return ""
    expected = truth.steps[0]["loss"]
    if not abs(loss - expected) <= LOSS_TOLERANCE * expected:
        return f"loss {loss:.4f} at step 1, {truth.job.name} has {expected:.4f}"
    mine, theirs = heldout.get(str(run.job.trained)), heldout.get(str(truth.job.trained))
    if mine is not None and theirs is not None and abs(mine - theirs) > LOSS_TOLERANCE * theirs:
        return f"held-out loss {mine:.4f}, {truth.job.name} has {theirs:.4f}"
    return ""


def verdict(entries: Sequence[Entry]) -> str:
    """Say how whet's best valid run stands to the fastest valid one of the others."""
    own = [e for e in entries if e.name.startswith("whet ") and not e.invalid]
    others = [e for e in entries if not e.name.startswith("whet") and not e.invalid]
    if own and not others and len(own) > 1:
        word = (
            "as fast as"
            if abs(own[1].ratio - 1) < EQUAL
            else f"{own[1].ratio:.2f} times as fast as"
        )
        return f"whet is {word} {own[1].title}, with {_share(own[0], own[1])} of its memory"
    if not own or not others:
        return "nothing to compare"
    mine, other = own[0], min(others, key=lambda e: e.ratio)
    if abs(other.ratio - 1) < EQUAL:
        speed = "as fast as"
    else:
        speed = f"{other.ratio:.2f} times as fast as"
    least = min(others, key=lambda e: e.above_bytes)
    words = f"whet is {speed} the fastest valid other ({other.title})"
    words += f", with {_share(mine, other)} of its memory above the model"
    if least is not other:
        words += f" ({_share(mine, least)} of the least, {least.title})"
    return words


def _share(mine: Entry, other: Entry) -> str:
    return f"{mine.above_bytes / max(1, other.above_bytes):.2f}"


def table(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Return the head of the table and its cells; what no run has is left out.

    Args:
        entries: The lines, whet's first.
    """
    columns: dict[str, Callable[[Entry], str]] = {
        "s / step": lambda e: f"{e.step_seconds:.2f}",
        "spread": lambda e: f"{e.fastest:.2f} to {e.slowest:.2f}",
        "x whet": lambda e: "1" if e is entries[0] else f"{e.ratio:.2f}",
        "tokens/s": lambda e: _count(e.tokens_per_second),
        "entered/s": lambda e: _count(e.entered_per_second),
        "MFU": lambda e: f"{e.mfu:.0%}" if e.mfu else "",
        "1st step s": lambda e: f"{e.first_step_seconds:.1f}",
        "all s": lambda e: f"{e.all_steps_seconds:.1f}",
        "above GiB": lambda e: f"{e.above_bytes / 2**30:.2f}",
        "allocated GiB": lambda e: _gib(e.loaded_bytes + e.above_bytes if e.driver_bytes else 0),
        "reserved GiB": lambda e: _gib(e.reserved_bytes),
        "device GiB": lambda e: _gib(e.driver_bytes),
        "pinned GiB": lambda e: _gib(e.pinned_bytes),
        "loss 1": lambda e: f"{e.first_loss:.4f}",
        "norm 1": lambda e: f"{e.first_grad_norm:.3f}",
        "last loss": lambda e: f"{e.last_loss:.4f}",
        "held-out fp32": lambda e: "" if e.heldout_loss is None else f"{e.heldout_loss:.5f}",
    }
    ran = [entry for entry in entries if entry.step_seconds]
    kept = {name: cell for name, cell in columns.items() if any(cell(entry) for entry in ran)}
    rows = []
    for entry in entries:
        if entry.step_seconds:
            mark = " (invalid)" if entry.invalid else ""
            rows.append([entry.title + mark, *(cell(entry) for cell in kept.values())])
        else:
            rows.append([entry.title, entry.invalid, *[""] * (len(kept) - 1)])
    return ["framework", *kept], rows


def _count(value: float) -> str:
    return f"{value:,.0f}" if value else ""


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f}" if num_bytes else ""


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay cells out for a terminal."""
    lines = [list(head), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in rows:
        if line[1] and not any(line[2:]):  # a failure is as long as it is
            widths[1] = max((len(x[1]) for x in lines if any(x[2:])), default=8)
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay cells out for a page."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def to_json(work: Workload, entries: Sequence[Entry], runs: Sequence[Run]) -> dict[str, Any]:
    """Return everything that was found, for the result file."""
    return {
        "workload": asdict(work),
        "verdict": verdict(entries),
        "entries": [asdict(entry) for entry in entries],
        "runs": [
            {
                "name": run.job.name,
                "settings": run.job.settings,
                "versions": run.versions,
                "failure": run.failure,
                "ready_seconds": run.ready_seconds,
                "steps": run.steps,
            }
            for run in runs
        ],
    }


def plot(found: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw a row for each workload: seconds a step, memory above the model, and the losses."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(found), 3, figsize=(14, 1.2 + 2.9 * len(found)), squeeze=False, layout="constrained"
    )
    for line, result in zip(axes, found, strict=True):
        entries = [Entry(**e) for e in result["entries"] if e["step_seconds"]]
        names = [e.title + (" (invalid)" if e.invalid else "") for e in entries]
        own = [e.name.startswith("whet") for e in entries]
        colours = ["#c2410c" if mine else "#94a3b8" for mine in own]
        spread = [
            [e.step_seconds - e.fastest for e in entries],
            [e.slowest - e.step_seconds for e in entries],
        ]
        line[0].barh(
            names, [e.step_seconds for e in entries], xerr=spread, color=colours, capsize=2
        )
        line[0].set_xlabel("seconds a step: median, fastest, slowest")
        line[1].barh(names, [e.above_bytes / 2**30 for e in entries], color=colours)
        line[1].set_xlabel("peak memory above the loaded model, GiB")
        for axis in line[:2]:
            axis.invert_yaxis()
            axis.spines[["top", "right"]].set_visible(False)
        line[1].set_yticklabels([])
        for run in result["runs"]:
            if run["steps"]:
                mine = run["name"].startswith("whet")
                losses = [step["loss"] for step in run["steps"]]
                line[2].plot(
                    range(1, len(losses) + 1), losses, label=run["name"], marker=".",
                    color="#c2410c" if mine else None, zorder=3 if mine else 2,
                    linewidth=2 if mine else 1,
                )  # fmt: skip
        line[2].set_xlabel("step")
        line[2].set_ylabel("loss")
        line[2].legend(fontsize=7)
        line[2].spines[["top", "right"]].set_visible(False)
        line[0].set_title(result["workload"]["name"], loc="left", fontweight="bold")
    figure.savefig(file, dpi=110)
    plt.close(figure)
