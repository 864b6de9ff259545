"""A conversation on the terminal, with one model or with the base and the tuned one side by side."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whet.decoding import TokenDecoder, make_decoder
from whet.direction import Lines
from whet.errors import InputError, WhetError, did_you_mean
from whet.generate import Sampling, stream
from whet.model import CausalLM
from whet.runs import write_text
from whet.trained import Loaded

COMMANDS = {
    "/reset": "forget the conversation",
    "/system": "TEXT: another system prompt, and a new conversation",
    "/save": "FILE: add the conversation to a file of rows that can be trained on",
    "/exit": "end",
}


def opening(loaded: Loaded, system: str | None) -> list[dict[str, str]]:
    """Return the start of a conversation: the system prompt, by default the one a run was trained with.

    Args:
        loaded: The model.
        system: Another system prompt, an empty one for none, or None for the run's.
    """
    prompt = loaded.config.data.system if system is None else system
    return [{"role": "system", "content": prompt}] if prompt else []


@dataclass
class Side:
    """One of the models that answer, with its own history.

    Args:
        name: What its answers are headed with; empty when it is the only one.
        entered: Gives the body the model, as it is to be.
        decoder: Of that model.
        turns: The conversation so far.
    """

    name: str
    entered: Callable[[], contextlib.AbstractContextManager[CausalLM]]
    decoder: TokenDecoder
    turns: list[dict[str, str]] = field(default_factory=list)

    def answer(self, loaded: Loaded, sampling: Sampling) -> Iterator[str]:
        """Yield the answer to the last turn piece by piece.

        Raises:
            InputError: The conversation has outgrown the model.
        """
        from whet.data.template import render_prompt

        prompt = render_prompt(loaded.tokenizer, self.turns)
        with self.entered() as model:
            yield from stream(model, loaded.tokenizer, prompt, sampling, self.decoder)


@contextlib.contextmanager
def sides(loaded: Loaded, compare: bool) -> Iterator[list[Side]]:
    """Make ready who answers.

    Args:
        loaded: The model.
        compare: Whether the base answers too.

    Raises:
        InputError: There is no base to compare with.
    """
    if compare and loaded.run is None:
        raise InputError("--compare needs a run: a plain model has no base beside it")
    made = []
    with contextlib.ExitStack() as stack:
        if compare:
            model = stack.enter_context(loaded.base())
            decoder = make_decoder(model, loaded.tokenizer)
            if model is loaded.model:  # with its adapter off, which is on again for the tuned one
                stack.close()
                made.append(Side("base", loaded.base, decoder))
            else:
                made.append(Side("base", lambda: contextlib.nullcontext(model), decoder))
        decoder = make_decoder(loaded.model, loaded.tokenizer)
        tuned = Side(
            "tuned" if compare else "", lambda: contextlib.nullcontext(loaded.model), decoder
        )
        yield [*made, tuned]


def talk(loaded: Loaded, sampling: Sampling, system: str | None, compare: bool = False) -> None:
    """Hold a conversation on the terminal until /exit or the end of the input.

    Args:
        loaded: The model.
        sampling: How tokens are chosen.
        system: As for `opening`.
        compare: Have the base answer beside the tuned model; each goes on from its own answers.
    """
    with sides(loaded, compare) as speakers:
        _restart(loaded, speakers, system)
        while True:
            try:
                text = input("> " if sys.stdin.isatty() else "").strip()
            except (EOFError, KeyboardInterrupt):
                sys.stdout.write("\n")
                return
            command, _, rest = text.partition(" ")
            if command in ("/exit", "/quit"):
                return
            if command in ("/reset", "/system"):
                system = rest if command == "/system" else system
                _restart(loaded, speakers, system)
            elif command == "/save":
                _save(speakers[-1].turns, rest.strip())
            elif is_command(command):
                guess = did_you_mean(command, COMMANDS)
                hint = f"; did you mean {guess}?" if guess else ": " + ", ".join(COMMANDS)
                sys.stderr.write(f"there is no command {command}{hint}\n")
            elif text:
                _exchange(loaded, speakers, sampling, text)


def is_command(word: str) -> bool:
    """Tell whether a line's first word is meant as a command, and not a path or a regular question."""
    return word.startswith("/") and word[1:].isalpha()


def _restart(loaded: Loaded, speakers: list[Side], system: str | None) -> None:
    for side in speakers:
        side.turns = opening(loaded, system)


def _exchange(loaded: Loaded, speakers: list[Side], sampling: Sampling, text: str) -> None:
    """Have everybody answer one line."""
    for side in speakers:
        side.turns.append({"role": "user", "content": text})
    beside = len(speakers) > 1 and sys.stdout.isatty()
    show = _in_columns if beside else _one_after_the_other
    pieces: dict[str, list[str]] = {side.name: [] for side in speakers}
    try:
        show(loaded, speakers, sampling, pieces)
    except InputError as error:  # the conversation has outgrown the model
        sys.stderr.write(f"{error}; /reset starts anew\n")
        for side in speakers:
            side.turns.pop()
        return
    for side in speakers:
        side.turns.append({"role": "assistant", "content": "".join(pieces[side.name]).strip()})


def _one_after_the_other(
    loaded: Loaded, speakers: list[Side], sampling: Sampling, pieces: dict[str, list[str]]
) -> None:
    for side in speakers:
        if side.name:
            sys.stdout.write(f"[{side.name}]\n")
        lines = Lines(isolates=sys.stdout.isatty())
        try:
            with contextlib.closing(side.answer(loaded, sampling)) as answer:  # type: ignore[type-var]
                for piece in answer:
                    pieces[side.name].append(piece)
                    sys.stdout.write(lines.push(piece))
                    sys.stdout.flush()
            sys.stdout.write(lines.close() + "\n")
        except KeyboardInterrupt:
            sys.stdout.write(lines.close() + " [stopped]\n")


def _in_columns(
    loaded: Loaded, speakers: list[Side], sampling: Sampling, pieces: dict[str, list[str]]
) -> None:
    from whet.terminal import answer_columns

    with answer_columns([side.name for side in speakers]) as show:
        for side in speakers:
            with contextlib.suppress(KeyboardInterrupt):
                with contextlib.closing(side.answer(loaded, sampling)) as answer:  # type: ignore[type-var]
                    for piece in answer:
                        pieces[side.name].append(piece)
                        show({name: "".join(parts) for name, parts in pieces.items()})


def _save(turns: list[dict[str, Any]], name: str) -> None:
    """Add a conversation to a file of rows, the format `whet train` reads."""
    if not name:
        sys.stderr.write("/save needs a file's name\n")
        return
    file = Path(name).expanduser()
    try:
        before = file.read_text(encoding="utf-8") if file.exists() else ""
        if before and not before.endswith("\n"):
            before += "\n"
        write_text(file, before + json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    except (OSError, UnicodeDecodeError, WhetError) as error:
        sys.stderr.write(f"not saved: {error}\n")
        return
    sys.stderr.write(f"saved to {file}\n")
