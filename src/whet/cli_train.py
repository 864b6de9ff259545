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
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whet import __version__
from whet.cli_options import AsJson, Assignments, keys
from whet.config import Config
from whet.config_file import load_config, load_json_config, to_yaml
from whet.data.sources import require_sources
from whet.errors import InputError, Interrupted, WhetError, first_line

if TYPE_CHECKING:
    from whet.runs import RunFolder

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
) -> None:
    """Train as CONFIG says; measure the base and the tuned model on the held-out rows."""
    if print_config:
        typer.echo(to_yaml(_settings(config, config_json, set_ or [])), nl=False)
        return
    if not as_json:
        _run(config, config_json, set_ or [], resume, apart=config_json is not None)
        return
    summary: dict[str, Any] = {}
    try:
        summary = _summary_of(_run(config, config_json, set_ or [], resume, apart=True))
    except KeyboardInterrupt:
        summary = _failure(Interrupted("stopped"))
        raise
    except Exception as error:  # whatever it is: a pipeline gets its one object, and then the error
        summary = _failure(error)
        raise
    finally:
        typer.echo(json.dumps(summary, indent=2, allow_nan=False))


def _settings(config: str | None, config_json: str | None, assignments: Sequence[str]) -> Config:
    if config is not None and config_json is None:
        return load_config(config, assignments)
    if config_json is not None and config is None:
        return load_json_config(config_json, assignments)
    got = "neither" if config is None else "both"
    raise InputError("train takes CONFIG or --config-json FILE", got, "`whet init` writes a config")


def _run(
    config: str | None,
    config_json: str | None,
    assignments: Sequence[str],
    resume: bool,
    apart: bool,
) -> RunFolder:
    """Train and show it.

    Args:
        config: As given on the command line.
        config_json: As given on the command line.
        assignments: Those of --set.
        resume: Whether the run goes on from its newest checkpoint.
        apart: Show it on standard error, with everything that any library prints.
    """
    settings = _settings(config, config_json, assignments)
    if config_json is not None:
        _close_input()
    require_sources(settings.data)
    from whet.terminal import Terminal, console, quiet_libraries, show_end, show_evaluation

    quiet_libraries()
    terminal = Terminal(console(stderr=apart))
    terminal.stage(f"whet {__version__}: {config or config_json}, starting")
    from whet.train.recipe import fit

    try:
        with redirect_stdout(sys.stderr if apart else sys.stdout):
            run = fit(settings, resume, terminal)
    finally:
        terminal.finish()
    report = run.report
    if "tuned" in report.get("evaluation", {}):
        show_evaluation(terminal.out, report["evaluation"], settings.eval.samples)
    show_end(terminal.out, str(run.path), report["seconds"], report["peak_bytes"])
    return run


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
