"""Export for Ollama: GGUF files, and a Modelfile with template, stop tokens and parameters."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.errors import WhetError
from whet.export.card import base_licence
from whet.export.check import Finding, Gate
from whet.export.exports import export_gguf, usage_of
from whet.export.exports import store as store_card
from whet.export.go_template import from_chat_template, render
from whet.export.live import held_out
from whet.export.weights import source_folder
from whet.generate import end_token_ids
from whet.model.load import load_model_config, load_tokenizer
from whet.runs import RunFolder, write_text

if TYPE_CHECKING:
    from whet.model import Tokenizer

logger = logging.getLogger(__name__)

INSTRUCTIONS = (
    "FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE", "REQUIRES",
)  # fmt: skip
# Parameters of Ollama's Modelfile reference, and what their values are.
PARAMETERS: dict[str, type] = {
    "num_ctx": int, "repeat_last_n": int, "repeat_penalty": float, "temperature": float, "seed": int,
    "stop": str, "num_predict": int, "top_k": int, "top_p": float, "min_p": float,
}  # fmt: skip
_MOST_CONTEXT = 8192
_FROM_GENERATION = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}  # fmt: skip


def export_ollama(
    run: RunFolder,
    folder: Path,
    kinds: Sequence[str],
    base: str = "original",
    checked: bool = True,
    tell: Callable[[str], None] = logger.info,
) -> tuple[list[Path], list[Gate]]:
    """Write GGUF files and a Modelfile for the first of them.

    Args:
        run: A finished run.
        folder: Where to.
        kinds: GGUF types.
        base: What a QLoRA run is merged into: `original` or `dequantised`.
        checked: Load the files again and compare.
        tell: Called with what is being done.

    Returns:
        The files, and what was compared.
    """
    files, gates = export_gguf(run, folder, kinds, base, checked, tell)
    tokenizer = load_tokenizer(run.config.model, run.weights_dir)
    text, template = modelfile(run, tokenizer, files[0].name)
    parse_modelfile(text)
    write_text(folder / "Modelfile", text)
    if checked:
        gates.append(_check(run, tokenizer, text, template))
    store_card(run, folder, "ollama", gates, usage_of("ollama", files[0]))
    return [*files, folder / "Modelfile"], gates


def modelfile(run: RunFolder, tokenizer: Tokenizer, file: str) -> tuple[str, str | None]:
    """Return a Modelfile's text, and the Go template in it.

    Args:
        run: The run.
        tokenizer: With its chat template.
        file: Name of the GGUF file beside it.
    """
    config = run.config
    template = (
        from_chat_template(tokenizer, _adds_bos(tokenizer)) if tokenizer.chat_template else None
    )
    if template is not None and '"""' in template:
        template = None
    lines = [f"# {run.path.name}: {config.model.name}, fine-tuned with whet", f"FROM ./{file}"]
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    else:
        sentence = (
            "its chat template is not of turns with fixed words around them, so that it has no Go "
            "template here; Ollama goes by the one inside the GGUF file, or the prompt is sent raw"
        )
        lines.append(f"# {sentence}")
        logger.warning("%s", sentence)
    if config.data.system and '"""' not in config.data.system:
        lines.append(f'SYSTEM """{config.data.system}"""')
    for name, value in _parameters(run, tokenizer):
        lines.append(f"PARAMETER {name} {json.dumps(value, ensure_ascii=False)}")
    if licence := base_licence(config.model.name):
        lines.append(f'LICENSE """{licence}"""')
    return "\n".join(lines) + "\n", template


def _adds_bos(tokenizer: Tokenizer) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]


def _parameters(run: RunFolder, tokenizer: Tokenizer) -> list[tuple[str, Any]]:
    """Return the stop tokens, the context and what the base model's own settings say of sampling."""
    from types import SimpleNamespace

    from transformers import GenerationConfig

    source = source_folder(run)
    known = (source / "generation_config.json").is_file()
    settings = GenerationConfig.from_pretrained(str(source)) if known else GenerationConfig()
    ends = end_token_ids(SimpleNamespace(generation_config=settings), tokenizer)
    found: list[tuple[str, Any]] = [("stop", tokenizer.decode([token])) for token in ends]
    limit = getattr(
        load_model_config(run.config.model).get_text_config(),
        "max_position_embeddings",
        _MOST_CONTEXT,
    )
    found.append(("num_ctx", min(limit, _MOST_CONTEXT)))
    given = settings.to_diff_dict()
    for name, theirs in _FROM_GENERATION.items():
        if isinstance(given.get(name), int | float):
            found.append((theirs, given[name]))
    return found


def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """Read a Modelfile by Ollama's documented grammar: INSTRUCTION arguments, comments with #.

    Args:
        text: The file.

    Returns:
        Instructions with their arguments, quotes taken off.

    Raises:
        WhetError: It is no Modelfile that Ollama takes.
    """
    found: list[tuple[str, str]] = []
    place = 0
    line = re.compile(
        r'[ \t]*(?:#[^\n]*|([A-Za-z]+)[ \t]+("""(.*?)"""|[^\n]*))?[ \t]*(?:\n|\Z)', re.DOTALL
    )
    while place < len(text):
        match = line.match(text, place)
        if match is None:
            raise WhetError(
                f"the Modelfile has a line that is none: {text[place:].splitlines()[0]!r}"
            )
        place = match.end()
        if match[1] is None:
            continue
        name = match[1].upper()
        if name not in INSTRUCTIONS:
            raise WhetError(f"a Modelfile has no instruction '{match[1]}'")
        found.append((name, match[3] if match[3] is not None else match[2].strip()))
        if name == "PARAMETER":
            _check_parameter(found[-1][1])
    if [name for name, _ in found].count("FROM") != 1:
        raise WhetError("a Modelfile needs one FROM")
    return found


def _check_parameter(argument: str) -> None:
    name, _, value = argument.partition(" ")
    if name not in PARAMETERS:
        raise WhetError(f"a Modelfile has no parameter '{name}'")
    try:
        made = json.loads(value) if value.startswith('"') else PARAMETERS[name](value)
    except ValueError as error:
        raise WhetError(f"the Modelfile's parameter {name} is not a value: {value}") from error
    if not isinstance(made, PARAMETERS[name]):
        raise WhetError(f"the Modelfile's parameter {name} is not of its type: {value}")


def _check(run: RunFolder, tokenizer: Tokenizer, text: str, template: str | None) -> Gate:
    """Compare the Go template's renders with the chat template's, and count the stop tokens."""
    from whet.data.template import render_prompt

    gate = Gate("Modelfile", "ollama")
    gate.findings.append(Finding("grammar", f"{len(parse_modelfile(text))} instructions", "", True))
    if template is None:
        words = "none: the chat template cannot be written as one"
        gate.findings.append(Finding("Go template", words, "", None))
        return gate
    bos = tokenizer.bos_token if _adds_bos(tokenizer) else None
    talks = [_asked(e.messages) for e in held_out(run) if e.messages and not e.tools]
    talks += [
        [{"role": "user", "content": "Hello 🙂"}],
        [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"},
         {"role": "user", "content": "日本語"}],
    ]  # fmt: skip
    wrong = 0
    for turns in talks:
        theirs = render_prompt(tokenizer, turns)
        wrong += render(template, turns) != (theirs.removeprefix(bos) if bos else theirs)
    gate.findings.append(Finding(
        "Go template", f"{len(talks) - wrong} of {len(talks)} conversations equal", "all", not wrong,
        "the Go template renders conversations otherwise" if wrong else "",
    ))  # fmt: skip
    return gate


def _asked(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Return a conversation's turns up to the last question."""
    turns = [dict(message) for message in messages]
    return turns[:-1] if turns[-1]["role"] == "assistant" else turns
