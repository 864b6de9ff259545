"""A conversation on the terminal."""

from __future__ import annotations

import sys

from whet.errors import InputError
from whet.generate import Sampling
from whet.trained import Loaded


def opening(loaded: Loaded, system: str | None) -> list[dict[str, str]]:
    """Return the start of a conversation: the system prompt, by default the one a run was trained with.

    Args:
        loaded: The model.
        system: Another system prompt, an empty one for none, or None for the run's.
    """
    prompt = loaded.config.data.system if system is None else system
    return [{"role": "system", "content": prompt}] if prompt else []


def talk(loaded: Loaded, sampling: Sampling, system: str | None) -> None:
    """Hold a conversation on the terminal until /exit or the end of the input.

    Args:
        loaded: The model.
        sampling: How tokens are chosen.
        system: As for `opening`.
    """
    from whet.data.template import render_prompt
    from whet.generate import stream

    turns = opening(loaded, system)
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
            turns = opening(loaded, system)
            continue
        if not text:
            continue
        turns.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            prompt = render_prompt(loaded.tokenizer, turns)
            for piece in stream(loaded.model, loaded.tokenizer, prompt, sampling):
                pieces.append(piece)
                sys.stdout.write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            sys.stdout.write(" [stopped]")
        except InputError as error:  # the conversation has outgrown the model
            sys.stderr.write(f"{error}; /reset starts anew\n")
            turns.pop()
            continue
        sys.stdout.write("\n")
        turns.append({"role": "assistant", "content": "".join(pieces).strip()})
