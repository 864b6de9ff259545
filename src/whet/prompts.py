"""Prompts from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from whet.errors import InputError


def read_prompts(file: Path) -> list[str | list[dict[str, Any]]]:
    """Read a file of prompts.

    Args:
        file: `.txt`, one prompt a line (empty lines are left out), or `.jsonl`, where a line is a string,
            or an object with `prompt` or with `messages`, of which a last answer is left out.

    Returns:
        Texts, or conversations.

    Raises:
        InputError: It cannot be read, or lines are something else; all are told.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the prompts in '{file}' cannot be read: {error}") from error
    if file.suffix not in (".jsonl", ".json"):
        return [line for line in lines if line.strip()]
    found: list[str | list[dict[str, Any]]] = []
    wrong = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            wrong.append(f"line {number}: {error.msg}")
            continue
        prompt = _prompt_of(value)
        if prompt is None:
            wrong.append(
                f"line {number}: neither a string nor an object with `prompt` or `messages`"
            )
        else:
            found.append(prompt)
    if wrong:
        raise InputError.listing(f"'{file}':", wrong)
    return found


def _prompt_of(value: Any) -> str | list[dict[str, Any]] | None:
    if isinstance(value, dict):
        value = value.get("prompt", value.get("messages"))
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        return None
    keys = {"role", "content"}
    if not all(isinstance(turn, dict) and keys <= turn.keys() for turn in value):
        return None
    turns = value[:-1] if value[-1]["role"] == "assistant" else value
    return turns or None
