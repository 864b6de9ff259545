"""What a folder of results says, in a short table: `python -m benchmarks.summary FOLDER`.

Reads what `benchmarks/gpu.sh` leaves: the tests' log, and the figures of kernels, peers and contexts. A
file that is not there, or not whole, is left out.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.contexts import Found, table


def tests_lines(folder: Path) -> list[str]:
    """Return pytest's last line."""
    log = folder / "tests.log"
    lines = log.read_text().splitlines() if log.exists() else []
    last = next((line for line in reversed(lines) if " in " in line and "=" not in line), None)
    return [f"tests: {last}"] if last else []


def kernel_lines(found: dict[str, Any]) -> list[str]:
    """Return a line for each pass of a kernel, and the middle of all."""
    lines = []
    for row in found["rows"]:
        others = [
            f"{name} {row[f'{name}_ms'] / row['ours_ms']:.2f}x"
            for name in ("eager", "compile", "liger")
            if f"{name}_ms" in row
        ]
        name = f"{row['kernel']} {row['pass']}"
        share = f"{row['percent_of_ceiling']:4.0f}% of the ceiling"
        lines.append(f"  {name:24} {row['ours_ms']:9.3f} ms  {share}  {', '.join(others)}")
    shares = [row["percent_of_ceiling"] for row in found["rows"]]
    if shares:
        lines.append(f"  middle of all: {statistics.median(shares):.0f}% of the ceiling")
    return lines


def peer_lines(found: dict[str, Any]) -> list[str]:
    """Return a line for each run of each workload."""
    lines = []
    for result in found["workloads"]:
        lines.append(f"  {result['workload']['name']}")
        for entry in result["entries"]:
            if not entry["step_seconds"]:
                lines.append(f"    {entry['title']:24} {entry['invalid']}")
                continue
            loss = entry["heldout_loss"]
            words = [
                f"{entry['step_seconds']:7.3f} s", f"{entry['ratio']:5.2f} x whet",
                f"{entry['tokens_per_second']:8,.0f} tokens/s", f"MFU {entry['mfu']:.0%}",
                f"{entry['above_bytes'] / 2**30:6.2f} GiB above",
                "" if loss is None else f"held-out {loss:.4f}", entry["invalid"],
            ]  # fmt: skip
            lines.append(f"    {entry['title']:24} " + "  ".join(filter(None, words)))
        lines += [f"    left out: {line}" for line in result["left_out"]]
    return lines


def context_lines(found: dict[str, Any]) -> list[str]:
    """Return the table of longest contexts."""
    names = list(Found.__dataclass_fields__)
    all_found = [Found(**{name: each[name] for name in names}) for each in found["found"]]
    return [f"  {line}" for line in table(all_found).splitlines()]


KINDS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "rows": kernel_lines,
    "workloads": peer_lines,
    "found": context_lines,
}


def summarise(folder: Path) -> list[str]:
    """Return the lines about a folder.

    Args:
        folder: With the result files.
    """
    lines = tests_lines(folder)
    for file in sorted(folder.glob("*.json")):
        try:
            found = json.loads(file.read_text())
        except ValueError:
            lines.append(f"{file.name}: not whole")
            continue
        kind = next((key for key in KINDS if key in found), None)
        if kind:
            lines += [f"{file.stem}:", *KINDS[kind](found)]
    done = sorted(file.stem for file in folder.glob("*.done"))
    return [*lines, f"done: {', '.join(done) or 'nothing'}"]


if __name__ == "__main__":
    print("\n".join(summarise(Path(sys.argv[1]))))
