"""`whet top`: a run and its machine, live in the terminal.

It reads the run's folder and the machine, and nothing of the process that trains: it may be started and
ended at any time, on another terminal or by another user.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from whet.runs import RunFolder
from whet.sensors import Sensors
from whet.terminal import clock

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console
    from rich.table import Table

GIB = 2**30
BAR_WIDTH = 20
_SPARKS = "▁▂▃▄▅▆▇█"


class MetricsTail:
    """The lines of a run's metrics.jsonl, read as they are added.

    Args:
        run: The run's folder.
    """

    def __init__(self, run: RunFolder) -> None:
        self.rows: list[dict[str, Any]] = []
        self._file, self._place, self._number = run.metrics_file, 0, 0

    def read(self) -> list[dict[str, Any]]:
        """Return the lines that are new; a file that a resumed run wrote anew is read from its start."""
        try:
            with open(self._file, "rb") as file:
                number = _number_of(file.fileno())
                if number != self._number or file.seek(0, 2) < self._place:
                    self.rows, self._place, self._number = [], 0, number
                file.seek(self._place)
                whole, end, _torn = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._place += len(whole) + len(end)
        fresh = []
        for line in whole.splitlines():
            try:
                fresh.append(json.loads(line))
            except ValueError:  # a line that a kill cut short, and another was written behind it
                continue
        self.rows += fresh
        return fresh


def _number_of(descriptor: int) -> int:
    return os.fstat(descriptor).st_ino


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run and its machine at one moment; what is not known yet is None.

    Args:
        run: The folder.
        state: training, ended or stopped.
        process: The number of the process that trains, while it does.
        step: Optimizer steps done.
        num_steps: Optimizer steps in all, as planned.
        loss: Of the last log step.
        losses: Of the last log steps, the oldest first.
        heldout_loss: The last that was measured.
        tokens_per_second: Of the last log step.
        learning_rate: Of the next step.
        grad_norm: Before clipping.
        memory_bytes: Peak of the run.
        planned_bytes: As planned.
        step_seconds: Time of a step, over the last log steps.
        shares: Share of a step's time in each of its phases.
        eta_seconds: Until the last step, at that pace.
        machine: Figures of CPU, RAM and GPUs now (see sensors.py).
    """

    run: str
    state: str
    process: int | None = None
    step: int = 0
    num_steps: int | None = None
    loss: float | None = None
    losses: list[float] = field(default_factory=list)
    heldout_loss: float | None = None
    tokens_per_second: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    memory_bytes: int | None = None
    planned_bytes: int | None = None
    step_seconds: float | None = None
    shares: dict[str, float] = field(default_factory=dict)
    eta_seconds: float | None = None
    machine: dict[str, Any] = field(default_factory=dict)


def take_snapshot(run: RunFolder, tail: MetricsTail, sensors: Sensors) -> Snapshot:
    """Return a run as it is now.

    Args:
        run: Its folder.
        tail: Its metrics, which are read on.
        sensors: The machine's.
    """
    process = run.holder
    state = "training" if process else ("ended" if run.weights_dir else "stopped")
    tail.read()
    steps = [row for row in tail.rows if "loss" in row]
    last = steps[-1] if steps else {}
    heldout = [row["heldout_loss"] for row in tail.rows if "heldout_loss" in row]
    report = run.report
    num_steps = report.get("plan", {}).get("num_steps")
    num_steps = report.get("training", {}).get("steps", num_steps)
    seconds = _step_seconds(steps)
    left = None if num_steps is None else num_steps - last.get("step", 0)
    inside = last.get("seconds_in", {})
    return Snapshot(
        run=str(run.path),
        state=state,
        process=process,
        step=last.get("step", 0),
        num_steps=num_steps,
        loss=last.get("loss"),
        losses=[row["loss"] for row in steps[-40:]],
        heldout_loss=heldout[-1] if heldout else None,
        tokens_per_second=last.get("tokens_per_second"),
        learning_rate=last.get("learning_rate"),
        grad_norm=last.get("grad_norm"),
        memory_bytes=last.get("memory_bytes"),
        planned_bytes=last.get("planned_bytes"),
        step_seconds=seconds,
        shares={name: part / sum(inside.values()) for name, part in inside.items() if part},
        eta_seconds=None if seconds is None or left is None or not process else seconds * left,
        machine=sensors.read(),
    )


def _step_seconds(steps: list[dict[str, Any]]) -> float | None:
    """Return the time of a step over the last ten log steps of one start of the run."""
    recent = [row for row in steps[-10:] if "seconds" in row]
    for first in recent[:-1]:  # a resumed run's clock begins anew
        seconds = recent[-1]["seconds"] - first["seconds"]
        if seconds > 0:
            return seconds / (recent[-1]["step"] - first["step"])
    return recent[-1]["seconds"] / recent[-1]["step"] if len(recent) == 1 else None


def plain_line(snapshot: Snapshot) -> str:
    """Return a snapshot as one line of text, for pipes and files."""
    parts = [snapshot.state, _steps(snapshot)]
    if snapshot.loss is not None:
        parts.append(f"loss {snapshot.loss:.4f}")
    if snapshot.tokens_per_second is not None:
        parts.append(f"{snapshot.tokens_per_second:,.0f} tokens/s")
    if snapshot.eta_seconds is not None:
        parts.append(f"ETA {clock(snapshot.eta_seconds)}")
    for gpu in snapshot.machine.get("gpus", []):
        parts.append(f"GPU {gpu['index']} {_gpu_words(gpu)}")
    return "  ".join([*parts, *_host_words(snapshot.machine)])


def _steps(snapshot: Snapshot) -> str:
    total = f"/{snapshot.num_steps}" if snapshot.num_steps else ""
    return f"step {snapshot.step}{total}"


def _gpu_words(gpu: dict[str, Any]) -> str:
    words = []
    if "utilization" in gpu:
        words.append(f"{gpu['utilization']:.0%}")
    if "used_bytes" in gpu and "total_bytes" in gpu:
        words.append(f"{gpu['used_bytes'] / GIB:.1f} of {gpu['total_bytes'] / GIB:.1f} GiB")
    if "temperature_c" in gpu:
        words.append(f"{gpu['temperature_c']:.0f} °C")
    if "power_watts" in gpu:
        limit = f" of {gpu['power_limit_watts']:.0f}" if "power_limit_watts" in gpu else ""
        words.append(f"{gpu['power_watts']:.0f}{limit} W")
    return ", ".join(words)


def _host_words(machine: dict[str, Any]) -> list[str]:
    used, total = machine["ram_used_bytes"] / GIB, machine["ram_total_bytes"] / GIB
    return [f"CPU {machine['cpu_utilization']:.0%}", f"RAM {used:.1f} of {total:.1f} GiB"]


def render(snapshot: Snapshot) -> Table:
    """Return a snapshot as a table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for style in ("bold", "", ""):
        table.add_column(style=style)
    who = f", process {snapshot.process}" if snapshot.process else ""
    table.add_row("run", Text(snapshot.state), Text(snapshot.run + who))
    done = snapshot.step / snapshot.num_steps if snapshot.num_steps else None
    eta = "" if snapshot.eta_seconds is None else f"ETA {clock(snapshot.eta_seconds)}"
    table.add_row("steps", _bar(done), f"{_steps(snapshot)}  {eta}")
    if snapshot.loss is not None:
        heldout = snapshot.heldout_loss
        beside = "" if heldout is None else f"  held out {heldout:.4f}"
        table.add_row("loss", sparkline(snapshot.losses), f"{snapshot.loss:.4f}{beside}")
        table.add_row("speed", _rate(snapshot), _phases(snapshot))
    if snapshot.memory_bytes is not None:
        planned = snapshot.planned_bytes
        share = snapshot.memory_bytes / planned if planned else None
        of = f" of {planned / GIB:.2f} planned" if planned else ""
        table.add_row("run's peak", _bar(share), f"{snapshot.memory_bytes / GIB:.2f}{of} GiB")
    for gpu in snapshot.machine.get("gpus", []):
        name = f"GPU {gpu['index']}"
        words = f"{_gpu_words(gpu)}  {gpu.get('name', '')}"
        table.add_row(name, _bar(gpu.get("utilization")), Text(words))
    machine = snapshot.machine
    cpu, ram = _host_words(machine)
    table.add_row("CPU", _bar(machine["cpu_utilization"]), cpu.removeprefix("CPU "))
    share = machine["ram_used_bytes"] / machine["ram_total_bytes"]
    table.add_row("RAM", _bar(share), ram.removeprefix("RAM "))
    return table


def _rate(snapshot: Snapshot) -> str:
    rate = snapshot.tokens_per_second
    return "" if rate is None else f"{rate:,.0f} tokens/s"


def _phases(snapshot: Snapshot) -> str:
    seconds = snapshot.step_seconds
    words = [] if seconds is None else [f"{seconds:.3g} s a step"]
    return "  ".join([*words, *(f"{name} {part:.0%}" for name, part in snapshot.shares.items())])


def _bar(share: float | None) -> str:
    """Draw a share of 0 to 1 (more is drawn as 1); nothing where it is not known."""
    if share is None:
        return ""
    full = round(BAR_WIDTH * min(1.0, max(0.0, share)))
    return "━" * full + "·" * (BAR_WIDTH - full)


def sparkline(values: list[float], width: int = BAR_WIDTH) -> str:
    """Draw the last values as a line of blocks, from the lowest to the highest of them."""
    finite = [value for value in values if value == value and abs(value) != float("inf")][-width:]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    top = len(_SPARKS) - 1
    return "".join(_SPARKS[round(top * (v - low) / span) if span else 0] for v in finite)


def follow(
    run: RunFolder,
    out: Console,
    interval: float,
    as_json: bool = False,
    once: bool = False,
    write: Callable[[str], None] = print,
) -> None:
    """Show a run until it is no longer trained; one that is not being trained is shown once.

    On a terminal there is one view that moves; elsewhere there is a line each time that metrics.jsonl has
    new log steps.

    Args:
        run: Its folder.
        out: Where to.
        interval: Seconds between two looks.
        as_json: Write each snapshot as one line of JSON.
        once: Show one snapshot and end.
        write: Writes a line.
    """
    tail, sensors = MetricsTail(run), Sensors(patient=True)
    time.sleep(min(interval, 0.2))  # the CPU's share is counted between two looks
    now = take_snapshot(run, tail, sensors)
    if as_json or once or not out.is_terminal:
        tell = (lambda one: json.dumps(asdict(one))) if as_json else plain_line
        write(tell(now))
        while now.state == "training" and not once:
            time.sleep(interval)
            seen = len(tail.rows), now.state
            now = take_snapshot(run, tail, sensors)
            if (len(tail.rows), now.state) != seen:
                write(tell(now))
        return
    from rich.live import Live

    with Live(render(now), console=out, auto_refresh=False) as live:
        while now.state == "training":
            time.sleep(interval)
            now = take_snapshot(run, tail, sensors)
            live.update(render(now), refresh=True)
