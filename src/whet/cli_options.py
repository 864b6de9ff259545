"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from whet.config_file import help_text
from whet.errors import Interrupted


class Commands(TyperGroup):
    """Has Ctrl-C end any command with the shell's exit code, and not with typer's 1."""

    def invoke(self, ctx: typer.Context) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)  # pyright: ignore[reportArgumentType]
        except KeyboardInterrupt as error:
            raise Interrupted("stopped") from error


ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML or JSON file.")]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, such as lora.rank=8."),
]
RunOrModel = Annotated[
    str, typer.Argument(metavar="RUN|MODEL", help="Run folder, or any model name.")
]
DataFile = Annotated[
    str | None,
    typer.Option(help="Rows to use; default: the run's held-out rows (verify: a few sentences)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
System = Annotated[
    str | None, typer.Option(help="System prompt; a run's own is used when this is not given.")
]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy; higher is more varied.")]
TopP = Annotated[float, typer.Option(help="Sample within this probability mass.")]
TopK = Annotated[int, typer.Option(help="Sample among so many of the likeliest tokens; 0: all.")]
MinP = Annotated[
    float,
    typer.Option(help="Sample among tokens of this share of the likeliest one's probability."),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        help="Above 1, tokens that are there already get rarer; default: the model's own."
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="Text that ends an answer; may be repeated; \\n is a newline."),
]
NumProcesses = Annotated[
    int | None, typer.Option("--nproc", min=1, help="Processes on this machine, one a GPU.")
]
NumNodes = Annotated[int, typer.Option("--nnodes", min=1, help="Machines.")]
NodeRank = Annotated[
    int | None, typer.Option("--node-rank", min=0, help="Number of this machine, from 0.")
]
Rendezvous = Annotated[
    str | None, typer.Option("--rdzv", metavar="HOST:PORT", help="Where machines meet: machine 0.")
]
Strategy = Annotated[
    Literal["auto", "ddp", "fsdp", "deepspeed", "tp"] | None,
    typer.Option("--strategy", help="How processes share the work; as parallel.strategy."),
]
MaxRestarts = Annotated[
    int,
    typer.Option("--max-restarts", min=0, help="Times to go on by itself after a process failed."),
]
Seed = Annotated[int, typer.Option(help="Seed of the sampling.")]


def keys(*sections: str) -> str:
    """Format config keys for a command's help; the backspace keeps click from joining lines."""
    return f"\b\nConfig keys and their defaults:\n{help_text(*sections)}"
