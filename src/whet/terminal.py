"""What a person sees of a run in the terminal: progress, notes, tables.

On a terminal there is one live line; in a pipe or a file, one plain line a log step.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from whet.doctor import Finding
    from whet.engine.verify import Verification
    from whet.evaluate import Sample
    from whet.plan.plan import Plan
    from whet.train.callbacks import Progress

BAR_WIDTH = 16
_COLOURS = {"ok": "green", "warn": "yellow", "fault": "red"}


def console(stderr: bool = False) -> Console:
    """Return a console that never cuts lines in a pipe.

    Args:
        stderr: Write there instead of to standard output.
    """
    made = Console(stderr=stderr, highlight=False, soft_wrap=True)
    if not made.is_terminal:
        made = Console(stderr=stderr, highlight=False, soft_wrap=True, width=100, no_color=True)
    return made


@contextmanager
def counter(what: str) -> Iterator[Callable[[int], None]]:
    """Show on a terminal how many of something are done, and how many a second.

    Args:
        what: What is counted.

    Yields:
        A function that is told how many are done.
    """
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    out = console(stderr=True)
    rate = TextColumn("{task.completed:,.0f} " + what + " ({task.speed:,.0f} a second)")
    with Progress(
        SpinnerColumn(), rate, TimeElapsedColumn(), console=out, transient=True,
        disable=not out.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=None)
        yield lambda done: bar.update(task, completed=done)


def quiet_libraries() -> None:
    """Keep other libraries' bars and advice off the terminal; their errors still come through."""
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.ERROR, format="  - %(message)s")
    logging.getLogger("whet").setLevel(logging.INFO)
    # bitsandbytes says at its import that an optional kernel package is not there.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    import transformers
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()  # it tells each of its retries twice; the last error says it all

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@dataclass
class Terminal:
    """Shows a run as it happens; it is the Listener of `whet train`."""

    out: Console = field(default_factory=console)
    _bar: Bar | None = None

    def stage(self, text: str) -> None:
        """Show what is being done now."""
        self.finish()
        self.out.print(f"[bold]{escape(text)}[/bold] ...")

    def note(self, text: str) -> None:
        """Show something a person should know."""
        self.out.print(f"  [dim]-[/dim] {escape(text)}")

    def progress(self, progress: Progress) -> None:
        """Show one log step: a moving bar on a terminal, a line elsewhere."""
        parts = list(_parts(progress))
        if not self.out.is_terminal:
            self.out.print(f"step {progress.step}/{progress.num_steps}  {'  '.join(parts)}")
            return
        # What is said first is worth most; the rest is left out where the terminal is narrow.
        room = (
            self.out.width
            - BAR_WIDTH
            - len(f"  step {progress.num_steps}/{progress.num_steps}")
            - 4
        )
        while len("  ".join(parts)) > room and len(parts) > 2:
            parts.pop()
        if self._bar is None:
            self._bar = _make_bar(self.out)
            self._bar.add_task("", total=progress.num_steps)
            self._bar.start()
        self._bar.update(
            self._bar.task_ids[0], completed=progress.step, description="  ".join(parts)
        )

    def finish(self) -> None:
        """Leave the last state of the bar on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _parts(progress: Progress) -> Iterator[str]:
    """Yield what is shown of a step, the most telling first; what was not measured is left out."""
    yield f"loss {progress.loss:.4f}"
    for word, value in progress.judged.items():
        yield f"{word} {value:.3f}"
    yield f"ETA {clock(progress.eta_seconds)}"
    yield f"{progress.tokens_per_second:,.0f} tokens/s"
    memory = f"{progress.memory_bytes / 2**30:.2f}"
    planned = f" of {progress.planned_bytes / 2**30:.2f}" if progress.planned_bytes else ""
    yield f"{memory}{planned} GiB"
    if progress.mfu:
        yield f"MFU {progress.mfu:.0%}"
    yield f"lr {progress.learning_rate:.1e}"
    if progress.labelled_per_second:
        yield f"{progress.labelled_per_second:,.0f} learned/s"


def _make_bar(out: Console) -> Bar:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(
        TextColumn("  step"), MofNCompleteColumn(), BarColumn(bar_width=BAR_WIDTH),
        TextColumn("{task.description}"), console=out,
    )  # fmt: skip


def clock(seconds: float) -> str:
    """Write a duration as 0:07, 12:30 or 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def score_table(
    base: dict[str, Any], tuned: dict[str, Any] | None, title: str = "Held-out rows"
) -> Table:
    """Return the table of held-out scores, base beside tuned.

    Args:
        base: The base model's scores, as in report.json.
        tuned: The tuned model's, or None for a plain model.
        title: What the rows are.
    """
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE)
    table.add_column("")
    table.add_column("base" if tuned else "model", justify="right")
    if tuned:
        table.add_column("tuned", justify="right", style="bold")
    rows = [("perplexity", "perplexity", "{:.3f}"), ("loss", "loss (nats per token)", "{:.4f}")]
    if base.get("exact_match") is not None:
        rows.append(("exact_match", f"exact match of {base['num_answers']} answers", "{:.1%}"))
    for key, name, pattern in rows:
        cells = [pattern.format(scores[key]) for scores in (base, tuned) if scores]
        table.add_row(name, *cells)
    return table


def show_samples(out: Console, base: Sequence[Sample], tuned: Sequence[Sample], most: int) -> None:
    """Print held-out rows with the reference and the answers.

    Args:
        out: Where to.
        base: The base model's answers.
        tuned: The tuned model's answers to the same rows, or nothing.
        most: How many rows.
    """
    for index, before in enumerate(base[:most]):
        out.print()
        out.print(Text(before.question.strip(), style="italic"))
        answers = [("reference", before.reference), ("base", before.answer)]
        if tuned:
            answers.append(("tuned", tuned[index].answer))
        for name, text in answers:
            mark = ""
            if name != "reference":
                mark = " ok" if text.strip() == before.reference.strip() else " --"
            out.print(Text.assemble((f"  {name:<9}{mark:<4}", "dim"), " ".join(text.split())))


def show_evaluation(out: Console, evaluation: dict[str, Any], num_samples: int) -> None:
    """Print the scores and the first answers of a run's evaluation.

    Args:
        out: Where to.
        evaluation: As in report.json.
        num_samples: How many answers.
    """
    from whet.evaluate import Sample

    out.print()
    out.print(score_table(evaluation["base"], evaluation.get("tuned")))
    base = [Sample(**sample) for sample in evaluation["base_samples"]]
    tuned = [Sample(**sample) for sample in evaluation.get("tuned_samples", [])]
    show_samples(out, base, tuned, num_samples)


def show_second_set(out: Console, found: dict[str, Any], name: str) -> None:
    """Print the scores of the set that tells what was forgotten.

    Args:
        out: Where to.
        found: Scores of the base and of the tuned model, as in report.json.
        name: Of the set.
    """
    base, tuned = found["base"], found["tuned"]
    out.print(score_table(base, tuned, f"Second set: {name}"))
    if tuned:
        more = tuned["loss"] - base["loss"]
        word = "forgotten" if more > 0 else "gained"
        out.print(f"  {word}: {abs(more):.4f} nats per token", markup=False)


def show_verification(out: Console, verification: Verification) -> None:
    """Show a parity report as a table, and what it comes to in one line.

    Args:
        out: Where to.
        verification: The report.
    """
    table = Table(
        title="Largest error against the truth",
        title_justify="left",
        title_style="bold",
        box=SIMPLE,
    )
    table.add_column("part")
    for title in ("original", "engine", "allowed"):
        table.add_column(title, justify="right")
    table.add_column("")
    for part in verification.parts:
        errors = (part.original_error, part.error, part.bound)
        numbers = ["" if n is None else f"{n:.2e}" for n in errors]
        colour = {"pass": "green", "fail": "red", "kept": "yellow"}[part.verdict]
        table.add_row(part.name, *numbers, f"[{colour}]{part.verdict}[/{colour}]")
    out.print(table)
    for part in verification.parts:
        if part.verdict != "pass":
            out.print(f"  {part.verdict}: {part.name}: {part.reason}", markup=False)
    fused = f"{verification.layers_fused} of {verification.layers_total} layers fused"
    failed = sum(part.verdict == "fail" for part in verification.parts)
    verdict = (
        "all parts pass" if not failed else f"{failed} of {len(verification.parts)} parts fail"
    )
    out.print(f"{fused}, {verdict}")


def show_plan(out: Console, plan: Plan) -> None:
    """Show a plan: the memory item by item, how a step is run, and what would change it.

    Args:
        out: Where to.
        plan: The plan.
    """
    found = plan.to_dict()
    places = {"device": "", "host": "host memory", "disk": "disk"}
    table = Table(
        title=f"Memory, {found['target']}", title_justify="left", title_style="bold", box=SIMPLE
    )
    table.add_column("")
    table.add_column("GiB", justify="right")
    table.add_column("")
    for item in found["items"]:
        table.add_row(item["name"], f"{item['bytes'] / 2**30:.3f}", places[item["where"]])
    table.add_section()
    table.add_row("peak", f"{found['peak_bytes'] / 2**30:.3f}", "", style="bold")
    table.add_row("may be used", f"{found['budget_bytes'] / 2**30:.3f}", "")
    out.print(table)
    names = {
        "hidden": "layer inputs", "qkv": "queries, keys, values", "attention": "attention outputs",
        "gate_up": "MLP inputs",
    }  # fmt: skip
    rows = [(f"{names[kind]} ({kind})", way) for kind, way in found["policy"].items()]
    rows += [
        ("longest example", f"{found['longest_example']:,} tokens"),
        ("tokens a pass, at most", f"{found['tokens_per_pass']:,}"),
        ("passes a step", f"{found['passes_per_step']:.3g}"),
        ("operations a step", f"{found['step_flops'] / 1e12:.3g} TFLOP"),
        ("a step, estimated", duration(found["step_seconds"])),
        (f"{found['num_steps']:,} steps, estimated", duration(found["seconds"])),
    ]  # fmt: skip
    steps = Table(title="Step", title_justify="left", title_style="bold", box=SIMPLE)
    steps.add_column("")
    steps.add_column("")
    for row in rows:
        steps.add_row(*row)
    out.print(steps)
    for note in found["notes"]:
        out.print(f"  [dim]-[/dim] {escape(note)}")
    if not plan.fits:
        out.print(f"[red]Does not fit.[/red] {escape(found['changes'][0])}")
        return
    for change in found["changes"]:
        out.print(f"  [dim]-[/dim] {escape(change)}")


def duration(seconds: float) -> str:
    """Write a duration as 0.52 s, 14 s, 12:30 or 1:02:03."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return clock(seconds)


def show_end(out: Console, path: str, seconds: float, peak_bytes: int) -> None:
    """Say what a run took, where its results are, and what can be done with them.

    Args:
        out: Where to.
        path: The run's folder.
        seconds: How long it took.
        peak_bytes: Its peak memory.
    """
    out.print(
        f"\nDone in {clock(seconds)}, peak memory {peak_bytes / 2**30:.2f} GiB. "
        f"Everything is in {path}/ (report.json, samples.md, loss.png)."
    )
    out.print("Next:", markup=False)
    # The command as it was typed, so that the next one can be typed the same way.
    typed = Path(sys.argv[0])
    program = "python -m whet" if typed.name == "__main__.py" else str(typed)
    for command in (f"chat {path}", f"eval {path}", f"export {path} --to merged"):
        out.print(f"  {program} {command}", markup=False)


def finding_lines(findings: Sequence[Finding]) -> list[Text]:
    """Return the doctor's lines, each fault with what it means and its fix below it."""
    lines = []
    for finding in findings:
        colour = _COLOURS[finding.status]
        lines.append(
            Text.assemble((f"{finding.status:>5}", colour), f"  {finding.name}: {finding.text}")
        )
        if finding.why and finding.status != "ok":
            lines.append(Text(f"         {finding.why}", style="dim"))
        if finding.fix:
            lines.append(Text(f"         -> {finding.fix}", style="dim"))
    return lines


@contextmanager
def answer_columns(names: Sequence[str]) -> Iterator[Callable[[dict[str, str]], None]]:
    """Show answers side by side while they grow.

    Args:
        names: Of the columns.

    Yields:
        A function that is told each column's text so far.
    """
    from rich.live import Live

    from whet.direction import isolated

    def table(texts: dict[str, str]) -> Table:
        made = Table(*names, box=SIMPLE, expand=True)
        for column in made.columns:
            column.ratio, column.overflow = 1, "fold"
        made.add_row(*(Text(isolated(texts.get(name, ""))) for name in names))
        return made

    out = console()
    with Live(table({}), console=out, refresh_per_second=8, vertical_overflow="visible") as live:
        yield lambda texts: live.update(table(texts))
