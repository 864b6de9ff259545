"""Commands that need no config and no model: `init` and `bench`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from whet.config_file import TEMPLATES, commented_yaml, load_config, to_json_schema
from whet.config_text import parse_yaml
from whet.errors import InputError, did_you_mean

setup = typer.Typer()


@setup.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write the config.")] = Path("whet.yaml"),
    template: Annotated[str, typer.Option(help=f"One of {', '.join(TEMPLATES)}.")] = "sft",
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Translate a config of Axolotl, LLaMA-Factory, Unsloth or trl instead.",
        ),
    ] = None,
    dialect: Annotated[
        str | None,
        typer.Option(
            help="Whose config --from is: axolotl, llama-factory, unsloth, trl; default: by its keys."
        ),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema for editors instead.")
    ] = False,
) -> None:
    """Write a config with every key, its default and its meaning; or translate one."""
    if schema:
        typer.echo(to_json_schema(), nl=False)
        return
    if from_ is not None or dialect is not None:
        _translate(path, from_, dialect)
        return
    if template not in TEMPLATES:
        guess = did_you_mean(template, TEMPLATES)
        raise InputError(
            f"there is no template '{template}'",
            fix=f"did you mean '{guess}'?" if guess else f"use one of {', '.join(TEMPLATES)}",
        )
    if path.exists():
        raise InputError(f"'{path}' exists already", fix="give another name, or remove it first")
    from whet.runs import make_folder, write_text

    make_folder(path.parent)
    text = commented_yaml(template, path.stem)
    load_config(parse_yaml(text))  # refuses a file name that cannot name a run
    write_text(path, text)
    typer.echo(f"wrote {path}; set data.train in it, then: whet data {path}; whet train {path}")


def _translate(path: Path, source: Path | None, dialect: str | None) -> None:
    """Write another trainer's config as one of ours, and tell what was not taken over."""
    if source is None:
        raise InputError("--dialect says whose config --from is", fix="give --from FILE, too")
    if path.exists():
        raise InputError(f"'{path}' exists already", fix="give another name, or remove it first")
    from whet.convert import convert
    from whet.runs import make_folder, write_text

    found = convert(source, dialect)
    make_folder(path.parent)
    write_text(path, found.to_yaml(source.name))
    typer.echo(f"wrote {path}, from {source} ({found.dialect})")
    for key, why in found.lost:
        typer.echo(f"  - {key} is not taken over: {why}")
    for text in found.unknown:
        typer.echo(f"  - {text} is a key that whet does not know")
    for key, why in found.moot:
        typer.echo(f"  - {key} is not needed: {why}")
    typer.echo(f"next: whet data {path}; whet plan {path}; whet train {path}")


@setup.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Further options go to the benchmark as they are: --own lean, --data DIR, --threads N, ... "
    "(python -m benchmarks.peers --help in a checkout).",
)
def bench(
    context: typer.Context,
    peers: Annotated[
        str, typer.Option(help="Frameworks beside whet: hf, trl, unsloth, liger.")
    ] = "hf,trl,unsloth",
    workloads: Annotated[
        str, typer.Option(help="Such as alpaca-bf16, alpaca-nf4, long-4k, pairs-bf16.")
    ] = "alpaca-bf16",
    variants: Annotated[
        str | None,
        typer.Option(help="default, tuned, both, all, or the name of one; a workload has its own."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Timed steps; each workload has its own number.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Result files, without their ending.")] = None,
) -> None:
    """Do the same work in whet and in its peers, step by step in turns, and print one table."""
    words = ["--peers", peers, "--workloads", workloads]
    words += [] if variants is None else ["--variants", variants]
    words += [] if rounds is None else ["--rounds", str(rounds)]
    words += [] if out is None else ["--out", str(out.resolve())]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", *words, *context.args], cwd=_checkout()
    )
    if done.returncode:
        raise typer.Exit(done.returncode)


def _checkout() -> Path:
    """Return the checkout that has the benchmarks: this package's own, or the working directory."""
    for folder in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (folder / "benchmarks" / "peers" / "__main__.py").is_file():
            return folder
    raise InputError(
        "the benchmarks are not part of the installed package",
        fix="run `whet bench` in a checkout of whet's repository",
    )
