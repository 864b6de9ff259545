"""Commands that have a model speak: generate, chat, serve."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whet.cli_options import (
    AsJson,
    Assignments,
    MaxNewTokens,
    MinP,
    RepetitionPenalty,
    RunOrModel,
    Seed,
    Stop,
    System,
    Temperature,
    TopK,
    TopP,
)
from whet.errors import InputError

if TYPE_CHECKING:
    from whet.generate import Completion
    from whet.trained import Loaded

talk_app = typer.Typer(rich_markup_mode=None)


@talk_app.command()
def generate(
    name: RunOrModel,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Text; may be repeated.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="File of prompts: .txt, one a line; .jsonl, a string, or an object with `prompt` or "
            "`messages`, a line.",
        ),
    ] = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = None,
    stop: Stop = None,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered together.")] = 16,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="Show each token's log-probability.")
    ] = False,
    top_logprobs: Annotated[
        int, typer.Option(min=0, max=20, help="With --logprobs: also so many of the likeliest tokens.")
    ] = 0,
    echo: Annotated[bool, typer.Option("--echo", help="Show the prompt too.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text; no chat template.")] = False,
    set_: Assignments = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Answer one or more prompts."""
    from whet.sampling import Sampling

    sampling = Sampling(
        max_new_tokens, temperature, top_p, seed, top_k, min_p, repetition_penalty,
        tuple(_unescaped(text) for text in stop or []),
    )  # fmt: skip
    from whet.prompts import read_prompts

    asked = [*(prompt or []), *(read_prompts(prompts) if prompts else [])]
    if not asked:
        raise InputError("there is no prompt", fix="give a text with -p, or a file with --prompts")
    from whet.generate import generate as complete

    loaded = _load(name, set_)
    answers = complete(
        loaded.model, loaded.tokenizer, [_render(loaded, one, system, raw) for one in asked], sampling,
        batch_size, (top_logprobs or True) if logprobs else False, echo,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps([asdict(answer) for answer in answers], indent=2, ensure_ascii=False))
        return
    for answer in answers:
        _show(answer, echo)


@talk_app.command()
def chat(
    name: RunOrModel,
    system: System = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Have the base answer beside the tuned model.")
    ] = False,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = None,
    stop: Stop = None,
    seed: Seed = 0,
    set_: Assignments = None,
) -> None:  # fmt: skip
    """Talk to a model; /reset, /system TEXT, /save FILE and /exit are for whet."""
    from whet.sampling import Sampling

    sampling = Sampling(
        max_new_tokens, temperature, top_p, seed, top_k, min_p, repetition_penalty,
        tuple(_unescaped(text) for text in stop or []),
    )  # fmt: skip
    from whet.chat import talk

    loaded = _load(name, set_)
    typer.echo(f"{name}. /reset, /system TEXT, /save FILE, /exit or Ctrl-D.", err=True)
    talk(loaded, sampling, system, compare)


@talk_app.command()
def serve(
    name: RunOrModel,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(help="What clients must show; better in the variable WHET_API_KEY."),
    ] = None,
    as_name: Annotated[
        str | None, typer.Option("--name", help="What clients call the model; default: its name.")
    ] = None,
    slots: Annotated[int, typer.Option(help="Answers at work together.")] = 16,
    queue: Annotated[int, typer.Option(help="Requests that may wait; more get 429.")] = 256,
    max_body: Annotated[int, typer.Option(help="Longest body in bytes; more get 413.")] = 1_000_000,
    max_prompt: Annotated[
        int | None, typer.Option(help="Longest prompt in tokens; default: what the model takes.")
    ] = None,
    drain: Annotated[
        int, typer.Option(min=0, help="Seconds that answers may take to end after SIGTERM.")
    ] = 60,
    set_: Assignments = None,
) -> None:  # fmt: skip
    """Serve a model over HTTP, as OpenAI's clients expect it (/v1/chat/completions, /v1/completions)."""
    from whet.serving.limits import KEY_VARIABLE, Address, Limits

    key = os.environ.get(KEY_VARIABLE) if api_key is None else api_key
    address = Address(host, port, key)
    limits = Limits(max_body, max_prompt, slots, queue)
    from whet.serving.serve import build_app, listen, require_server, serve

    require_server()
    place = listen(address)
    with place:
        loaded = _load(name, set_)
        known = as_name or (loaded.run.path.resolve().name if loaded.run else name)
        app = build_app(loaded, known, limits, address)
        shown = f"[{host}]" if ":" in host else host
        typer.echo(f"{known} is served at http://{shown}:{place.getsockname()[1]}/v1", err=True)
        serve(app, place, drain)


def _load(name: str, assignments: list[str] | None) -> Loaded:
    from whet.terminal import quiet_libraries

    quiet_libraries()
    from whet.trained import load_trained

    return load_trained(name, assignments)


def _render(
    loaded: Loaded, asked: str | list[dict[str, Any]], system: str | None, raw: bool
) -> str:
    """Return a prompt as the model reads it."""
    from whet.chat import opening
    from whet.data.template import render_prompt

    if isinstance(asked, str):
        if raw:
            return asked
        asked = [{"role": "user", "content": asked}]
    elif raw:
        raise InputError("--raw continues a text, and `messages` are turns", fix="give `prompt`")
    start = [] if asked[0]["role"] == "system" else opening(loaded, system)
    return render_prompt(loaded.tokenizer, [*start, *asked])


def _show(answer: Completion, echo: bool) -> None:
    import sys

    from whet.direction import Lines

    lines = Lines(isolates=sys.stdout.isatty())
    text = (answer.prompt if echo else "") + answer.text
    typer.echo(lines.push(text) + lines.close())
    for item in answer.logprobs:
        value = "      -" if item.logprob is None else f"{item.logprob:7.3f}"
        others = "  ".join(f"{token!r} {logprob:.3f}" for token, logprob in item.top)
        typer.echo(f"{value}  {item.token!r}" + (f"  | {others}" if others else ""))


def _unescaped(text: str) -> str:
    r"""Return a stop text with `\n` and `\t`, which a shell does not write easily, as what they mean."""
    return text.replace("\\n", "\n").replace("\\t", "\t")
