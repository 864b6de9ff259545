"""The command line: `whet COMMAND`.

Commands read arguments, call the library and show what comes back. Everything heavy is imported
inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from whet import __version__
from whet.cli_data import data_app
from whet.cli_options import (
    AsJson,
    Assignments,
    Commands,
    ConfigPath,
    DataFile,
    MaxNewTokens,
    MaxRestarts,
    NodeRank,
    NumNodes,
    NumProcesses,
    Rendezvous,
    RunOrModel,
    Seed,
    Strategy,
    System,
    Temperature,
    TopP,
    keys,
)
from whet.cli_setup import setup
from whet.config_file import (
    load_config,
    to_yaml,
)
from whet.data.sources import require_sources
from whet.errors import InputError, WhetError
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
    as_json: AsJson = False,
) -> None:
    """Show what the run will need, item by item, and how its steps are cut; loads no weights."""
    settings = load_config(config, set_ or [])
    _quiet_libraries()
    from whet.planning import plan_config

    found = plan_config(settings, device, vram)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        from whet.terminal import console, show_plan

        show_plan(console(), found)
    if not found.fits:
        raise typer.Exit(1)


@app.command(epilog=keys())
def train(
    config: ConfigPath,
    set_: Assignments = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of this run.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved config and stop.")
    ] = False,
    nproc: NumProcesses = None,
    nnodes: NumNodes = 1,
    node_rank: NodeRank = None,
    rdzv: Rendezvous = None,
    strategy: Strategy = None,
    max_restarts: MaxRestarts = 0,
) -> None:
    """Train as CONFIG says; measure the base and the tuned model on the held-out rows."""
    changes = [*(set_ or []), *([f"parallel.strategy={strategy}"] if strategy else [])]
    settings = load_config(config, changes)
    if print_config:
        typer.echo(to_yaml(settings), nl=False)
        return
    require_sources(settings.data)
    if any((nproc, nnodes > 1, "RANK" in os.environ, "ACCELERATE_MIXED_PRECISION" in os.environ)):
        from whet.train.launch import Launch, must_start, run_processes

        launch = Launch(nproc, nnodes, node_rank, rdzv, max_restarts)
        if must_start(launch):
            assigned = [part for change in changes for part in ("--set", change)]
            run_processes(["train", config, *assigned, *(["--resume"] if resume else [])], launch)
            return
    _quiet_libraries()
    from whet.terminal import Terminal, show_end, show_evaluation
    from whet.train.launch import as_one_of_several, is_first
    from whet.train.listen import QuietListener

    terminal = Terminal()
    if is_first():
        terminal.stage(f"whet {__version__}: {config}, starting")
    from whet.train.recipe import fit

    try:
        with as_one_of_several():
            run = fit(settings, resume, terminal if is_first() else QuietListener())
    finally:
        terminal.finish()
    if not is_first():
        return
    report = run.report
    if "tuned" in report.get("evaluation", {}):
        show_evaluation(terminal.out, report["evaluation"], settings.eval.samples)
    show_end(terminal.out, str(run.path), report["seconds"], report["peak_bytes"])


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


@app.command()
def generate(
    name: RunOrModel,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="Text; may be repeated.")],
    system: System = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="Show each token's log-probability.")
    ] = False,
    echo: Annotated[bool, typer.Option("--echo", help="Show the prompt too.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text; no chat template.")] = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Answer one or more prompts."""
    from whet.generate import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    from whet.chat import opening
    from whet.data.template import render_prompt
    from whet.generate import generate as complete

    loaded = _load(name)
    asked = [[*opening(loaded, system), {"role": "user", "content": text}] for text in prompt]
    texts = list(prompt) if raw else [render_prompt(loaded.tokenizer, turns) for turns in asked]
    answers = complete(
        loaded.model,
        loaded.tokenizer,
        texts,
        sampling,
        logprobs=logprobs,
        echo=echo,
    )
    if as_json:
        typer.echo(json.dumps([asdict(answer) for answer in answers], indent=2, ensure_ascii=False))
        return
    for answer in answers:
        typer.echo((answer.prompt if echo else "") + answer.text)
        for item in answer.logprobs:
            value = "      -" if item.logprob is None else f"{item.logprob:7.3f}"
            typer.echo(f"{value}  {item.token!r}")


@app.command()
def chat(
    name: RunOrModel,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
) -> None:
    """Talk to a model. /reset forgets the conversation, /system TEXT sets the system prompt."""
    from whet.generate import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    from whet.chat import talk

    loaded = _load(name)
    typer.echo(f"{name}. /reset, /system TEXT, /exit or Ctrl-D.", err=True)
    talk(loaded, sampling, system)


@app.command()
def export(
    name: Annotated[str, typer.Argument(metavar="RUN", help="Run folder.")],
    to: Annotated[Literal["merged", "adapter"], typer.Option(help="What to write.")] = "merged",
    out: Annotated[Path | None, typer.Option(help="Folder; default: RUN/export/KIND.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Type of merged weights; default: what the run computed in."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Load the export again and compare it.")
    ] = True,
) -> None:
    """Write the tuned model for other programs, load it again and compare it with the live one."""
    from whet.runs import RunFolder

    run = RunFolder.open(name)
    folder = out or run.path / "export" / to
    if to == "adapter" and dtype is not None:
        raise InputError("--dtype is for --to merged: an adapter is written as it was trained")
    if (
        folder.exists()
        and (not folder.is_dir() or not (folder / "README.md").is_file())
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        raise InputError(f"'{folder}' holds something else", fix="choose another folder with --out")
    _quiet_libraries()
    from whet.export.check import check_export
    from whet.export.weights import export_adapter, export_merged
    from whet.model.load import choose_dtype, load_tokenizer

    config = run.config
    if to == "merged":
        kind = export_merged(run, folder, dtype)
    else:
        export_adapter(run, folder)
        kind, _ = choose_dtype(config.model.dtype, full=False)
    typer.echo(f"wrote {folder}")
    if not check:
        return
    tokenizer = load_tokenizer(config.model, run.weights_dir)
    result = check_export(run, folder, to, kind, tokenizer)
    typer.echo(
        f"loaded it again: logits of {result.rows} texts differ by at most "
        f"{result.max_error:.2e} (bound {result.bound:.2e}); tokenizer and template "
        f"{'equal' if result.same_tokens else 'DIFFER'}"
    )
    if not result.passed:
        raise WhetError(f"the export in '{folder}' is not the model that was trained")
    what = "AutoModelForCausalLM" if to == "merged" else "PeftModel"
    typer.echo(f"passed; {what}.from_pretrained loads it")


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
