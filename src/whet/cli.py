"""The command line: `whet COMMAND`.

Commands read arguments, call the library and show what comes back. Everything heavy is imported
inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from whet import __version__
from whet.cli_data import data_app
from whet.cli_export import export_app
from whet.cli_machine import machine_app
from whet.cli_options import (
    AsJson,
    Assignments,
    Commands,
    ConfigPath,
    DataFile,
    RunOrModel,
    keys,
)
from whet.cli_setup import setup
from whet.cli_talk import talk_app
from whet.cli_train import train_app
from whet.config_file import load_config
from whet.data.sources import require_sources
from whet.errors import WhetError
from whet.sections import DataSection

if TYPE_CHECKING:
    from whet.trained import Loaded

app = typer.Typer(
    name="whet",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


app.add_typer(setup)
app.add_typer(data_app)
app.add_typer(train_app)
app.add_typer(talk_app)
app.add_typer(export_app)
app.add_typer(machine_app)


@app.callback(invoke_without_command=True, epilog="Add --debug to any command for a traceback.")
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Fine-tune Hugging Face language models on one GPU or a CPU, with the numbers proven."""
    if version:
        typer.echo(f"whet {__version__}")
        raise typer.Exit


@app.command(epilog=keys("train", "pack", "plan"))
def plan(
    config: ConfigPath,
    set_: Assignments = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or a card ('RTX 4090'); default: this machine.")
    ] = None,
    vram: Annotated[
        str | None, typer.Option("--vram", help="Memory of the card to plan for, such as 12GB.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes that share the run, one a GPU.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Machines they are on.")] = 1,
    strategy: Annotated[
        list[str] | None,
        typer.Option(help="Only this one: ddp, fsdp, zero2, zero3+offload, tp8, tp8xfsdp, ..."),
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="RAM of one machine; default: what is free in this one.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what the run will need, item by item, and how its steps are cut; loads no weights."""
    settings = load_config(config, set_ or [])
    _quiet_libraries()
    if ranks > 1:
        from whet.planning import plan_ranks
        from whet.ranks_view import show_ranks
        from whet.terminal import console

        planned = plan_ranks(settings, ranks, nodes, strategy or [], device, vram, host_memory)
        if as_json:
            typer.echo(json.dumps(planned.to_dict(), indent=2))
        else:
            show_ranks(console(), planned)
        if planned.simplest is None:
            raise typer.Exit(1)
        return
    from whet.planning import plan_config

    found = plan_config(settings, device, vram)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        from whet.terminal import console, show_plan

        show_plan(console(), found)
    if not found.fits:
        raise typer.Exit(1)


@app.command(name="eval", epilog=keys("eval"))
def evaluate(
    name: RunOrModel,
    data: DataFile = None,
    also: Annotated[
        str | None,
        typer.Option(help="A second set, measured beside: what did training make it forget?"),
    ] = None,
    set_: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity (and exact match) on held-out rows, the base beside the tuned model."""
    from whet.evaluate import compare
    from whet.terminal import Terminal, console, show_evaluation, show_second_set

    for file in (data, also):
        if file is not None:
            require_sources(DataSection(train=file))
    terminal = Terminal(console(stderr=as_json))
    terminal.stage(f"loading {name}")
    loaded = _load(name, set_)
    terminal.stage("measuring")
    found = asdict(compare(loaded, data, also))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    show_evaluation(terminal.out, {k: v for k, v in found.items() if v}, loaded.config.eval.samples)
    if also is not None:
        show_second_set(terminal.out, found["also"], also)


@app.command(epilog=keys("engine"))
def verify(
    name: RunOrModel,
    data: DataFile = None,
    set_: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Compare the engine with the model's original code, part by part; exit 1 when any part fails."""
    if data is not None:
        require_sources(DataSection(train=data))
    from whet.terminal import Terminal, console, show_verification
    from whet.verification import verify_loaded

    terminal = Terminal(console(stderr=as_json))
    terminal.stage(f"loading {name}")
    loaded = _load(name, set_)
    terminal.stage("comparing")
    verification = verify_loaded(loaded, data)
    if as_json:
        typer.echo(json.dumps(verification.to_dict(), indent=2))
    else:
        show_verification(terminal.out, verification)
    if not verification.passed:
        raise typer.Exit(1)


def _load(name: str, assignments: list[str] | None = None) -> Loaded:
    """Load a run or a model; assignments change its config, for this command only."""
    _quiet_libraries()
    from whet.trained import load_trained

    return load_trained(name, assignments)


def _quiet_libraries() -> None:
    from whet.terminal import quiet_libraries

    quiet_libraries()


def main() -> None:
    """Run the command line; exit 0 done, 1 the work failed, 2 the input was wrong, 130 stopped."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(arguments, prog_name="whet")
    except WhetError as error:
        if debug:
            raise
        typer.echo(f"whet: {error}", err=True)
        sys.exit(error.exit_code)
    except (RuntimeError, AssertionError, MemoryError, OSError, ImportError) as error:
        _explain_or_raise(error, debug)


def _explain_or_raise(error: Exception, debug: bool) -> None:
    """Say what an error of torch, CUDA or NCCL means, where it is one that is known."""
    from whet.doctor.explain import explain

    finding = None if debug else explain(error)
    if finding is None:
        raise error
    typer.echo(
        f"whet: {finding.text}: {finding.why}; {finding.fix}; `whet doctor` looks at this machine "
        "(--debug: the traceback)",
        err=True,
    )
    sys.exit(1)
