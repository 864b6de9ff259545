"""The command `train`, for a person at a terminal and for a pipeline that nobody watches.

With `--config-json` nothing asks anything: standard input is closed before the work begins. With
it or with `--json`, what a person would read goes to standard error, and standard output holds the
summary or nothing.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from whet import __version__
from whet.cli_options import (
    AsJson,
    Assignments,
    MaxRestarts,
    NodeRank,
    NumNodes,
    NumProcesses,
    Rendezvous,
    Strategy,
    keys,
)
from whet.config import Config
from whet.config_file import load_config, load_json_config, to_yaml
from whet.data.sources import require_sources
from whet.errors import InputError, Interrupted, WhetError, first_line
from whet.runs import RunFolder
from whet.train.launch import Launch, as_one_of_several, is_first, must_start, run_processes

train_app = typer.Typer()


@train_app.command(epilog=keys())
def train(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="YAML or JSON file.")
    ] = None,
    config_json: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="JSON config of an unattended run, or - for standard input; nothing is asked, "
            "messages go to standard error.",
        ),
    ] = None,
    set_: Assignments = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of this run.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved config and stop.")
    ] = False,
    as_json: AsJson = False,
    nproc: NumProcesses = None,
    nnodes: NumNodes = 1,
    node_rank: NodeRank = None,
    rdzv: Rendezvous = None,
    strategy: Strategy = None,
    max_restarts: MaxRestarts = 0,
) -> None:
    """Train as CONFIG says; measure the base and the tuned model on the held-out rows."""
    changes = [*(set_ or []), *([f"parallel.strategy={strategy}"] if strategy else [])]
    launch = Launch(nproc, nnodes, node_rank, rdzv, max_restarts)
    task = _Task(config, config_json, changes, resume, launch, as_json or config_json is not None)
    if print_config:
        typer.echo(to_yaml(task.settings()), nl=False)
        return
    with as_one_of_several(_say):
        if as_json:
            _tell_in_json(task)
        else:
            _run(task)


@dataclass(frozen=True, slots=True)
class _Task:
    """What was asked for.

    Args:
        config: As given on the command line.
        config_json: As given on the command line.
        changes: Assignments to the config's keys.
        resume: Whether the run goes on from its newest checkpoint.
        launch: Processes to start.
        apart: Show it on standard error, with everything that any library prints.
    """

    config: str | None
    config_json: str | None
    changes: Sequence[str]
    resume: bool
    launch: Launch
    apart: bool

    def settings(self) -> Config:
        """Read the config."""
        if self.config is not None and self.config_json is None:
            return load_config(self.config, self.changes)
        if self.config_json is not None and self.config is None:
            return load_json_config(self.config_json, self.changes)
        got = "neither" if self.config is None else "both"
        raise InputError(
            "train takes CONFIG or --config-json FILE", got, "`whet init` writes a config"
        )


def _tell_in_json(task: _Task) -> None:
    summary: dict[str, Any] = {}
    try:
        summary = _summary_of(_run(task)) if is_first() else _run(task) and {}
    except KeyboardInterrupt:
        summary = _failure(Interrupted("stopped"))
        raise
    except Exception as error:  # whatever it is: a pipeline gets its one object, and then the error
        summary = _failure(error)
        raise
    finally:
        if is_first():
            typer.echo(json.dumps(summary, indent=2, allow_nan=False))


def _run(task: _Task) -> RunFolder:
    """Train and show it, here or in processes that are started for it."""
    settings = task.settings()
    if task.config_json is not None:
        _close_input()
    require_sources(settings.data)
    if must_start(task.launch):
        return _run_several(task, settings)
    from whet.terminal import Terminal, console, quiet_libraries, show_end, show_evaluation
    from whet.train.listen import QuietListener

    quiet_libraries()
    terminal = Terminal(console(stderr=task.apart))
    if is_first():
        terminal.stage(f"whet {__version__}: {task.config or task.config_json}, starting")
    from whet.train.recipe import fit

    try:
        with redirect_stdout(sys.stderr if task.apart else sys.stdout):
            run = fit(settings, task.resume, terminal if is_first() else QuietListener())
    finally:
        terminal.finish()
    if not is_first():
        return run
    report = run.report
    if "tuned" in report.get("evaluation", {}):
        show_evaluation(terminal.out, report["evaluation"], settings.eval.samples)
    show_end(terminal.out, str(run.path), report["seconds"], report["peak_bytes"])
    return run


def _run_several(task: _Task, settings: Config) -> RunFolder:
    """Start processes that do the work; a config from standard input has been read already."""
    with ExitStack() as stack:
        arguments = ["train", *(["--resume"] if task.resume else [])]
        if task.config is not None:
            assigned = [part for change in task.changes for part in ("--set", change)]
            arguments += [task.config, *assigned]
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="whet-config-")))
            file = folder / "config.json"
            file.write_text(settings.model_dump_json(), encoding="utf-8")
            arguments += ["--config-json", str(file)]
        stack.enter_context(_output_on_stderr() if task.apart else nullcontext())
        run_processes(arguments, task.launch, _say)
    return RunFolder(Path(settings.run.dir) / settings.run.name)


def _say(text: str) -> None:
    typer.echo(text, err=True)


@contextmanager
def _output_on_stderr() -> Iterator[None]:
    """Have processes that are started meanwhile write to standard error what they would print."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _close_input() -> None:
    """Have every question find the end of its input: a log-in, a licence, code of a model's own."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  (open for as long as the process lives)


def _summary_of(run: RunFolder) -> dict[str, Any]:
    """Return what a pipeline goes on with: where the results are, and how good they are."""
    report, weights = run.report, run.weights_dir
    scores = {
        name: {key: _number(value) for key, value in found.items()}
        for name, found in report.get("evaluation", {}).items()
        if name in ("base", "tuned")
    }
    losses = [line["loss"] for line in run.metrics() if "loss" in line]
    return {
        "status": "done",
        "exit_code": 0,
        "run": str(run.path.resolve()),
        "weights": str(weights.resolve()) if weights else None,
        "steps": report["training"]["steps"],
        "loss": _number(losses[-1]) if losses else None,
        "seconds": report["seconds"],
        "peak_bytes": report["peak_bytes"],
        "evaluation": scores,
    }


def _number(value: Any) -> Any:
    """Return the value as JSON can say it: what is no finite number is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _failure(error: Exception) -> dict[str, Any]:
    code = error.exit_code if isinstance(error, WhetError) else 1
    text = str(error) if isinstance(error, WhetError) else first_line(error)
    status = {2: "wrong input", 130: "stopped"}.get(code, "failed")
    return {"status": status, "exit_code": code, "error": text}
