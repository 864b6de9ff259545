"""The model card: what a model was made of, how it scored, under which licence, and its check."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from whet.config_file import to_yaml
from whet.export.check import Gate
from whet.model.load import resolve
from whet.runs import RunFolder
from whet.sections import RunSection

_LIBRARIES = {"adapter": "peft", "merged": "transformers"}


def model_card(run: RunFolder, kind: str, gates: Sequence[Gate] = (), usage: str = "") -> str:
    """Return a README.md with the run's data, settings and scores.

    Args:
        run: A finished run.
        kind: `adapter`, `merged`, `gguf`, `ollama` or `llama2c`.
        gates: What was compared when the export was loaded again.
        usage: How it is used, in Markdown.
    """
    config, report = run.config, run.report
    data, scores = report.get("data", {}).get("train", {}), report.get("evaluation", {})
    licence = base_licence(config.model.name)
    lines = [
        "---", f"base_model: {config.model.name}", "pipeline_tag: text-generation",
        f"library_name: {_LIBRARIES.get(kind, kind)}", "tags: [whet]",
        *([f"license: {licence}"] if licence else []), "---", "",
        f"# {run.path.name}", "",
        f"{config.model.name}, fine-tuned with whet {report.get('versions', {}).get('whet', '')} "
        f"on {data.get('examples', '?')} examples ({data.get('tokens_learned', '?')} learned tokens).",
        "",
    ]  # fmt: skip
    lines += ["## Data", "", *(f"- `{_name(source)}`" for source in _sources(config)), ""]
    if "base" in scores and "tuned" in scores:
        lines += ["| held out | base | tuned |", "|---|---:|---:|"]
        for key in ("perplexity", "exact_match"):
            if scores["base"].get(key) is not None:
                lines.append(f"| {key} | {scores['base'][key]:.4g} | {scores['tuned'][key]:.4g} |")
        lines.append("")
    lines += ["## Licence", "", _licence_words(config.model.name, licence), ""]
    if usage:
        lines += ["## Use", "", usage, ""]
    lines += gate_lines(gates)
    # Where the run lies on this machine is nobody else's to know.
    settings = config.model_copy(update={"run": RunSection(name=config.run.name)})
    lines += ["## Settings", "", "```yaml", to_yaml(settings).rstrip(), "```", ""]
    lines += [
        "## Versions",
        "",
        "```json",
        json.dumps(report.get("versions", {}), indent=2),
        "```",
        "",
    ]
    return "\n".join(lines)


def gate_lines(gates: Sequence[Gate]) -> list[str]:
    """Return the table of what was compared, in Markdown, or nothing."""
    if not gates:
        return []
    lines = ["## Checked against the live model", ""]
    if not all(gate.passed for gate in gates):
        lines += ["**The check failed: this is not the model that was trained.**", ""]
    lines += ["| file | compared | measured | allowed | |", "|---|---|---|---|---|"]
    for gate in gates:
        for found in gate.findings:
            verdict = {True: "pass", False: "FAIL", None: ""}[found.passed]
            lines.append(
                f"| {gate.file} | {found.name} | {found.measured} | {found.allowed} | {verdict} |"
            )
    return [*lines, ""]


def base_licence(name: str) -> str | None:
    """Return the licence that a base model's own card or GGUF file states, or None.

    Args:
        name: The model's name, as in a config.
    """
    source = Path(resolve(name))
    card = source / "README.md"
    if card.is_file():
        head = card.read_text(encoding="utf-8").split("---")
        for line in head[1].splitlines() if len(head) > 2 else ():
            if line.startswith("license:"):
                return line.partition(":")[2].strip() or None
    return None


def _licence_words(name: str, licence: str | None) -> str:
    if licence is None:
        return (
            f"As the base model, {name}; its licence was not found beside its weights. Look it up."
        )
    return f"As the base model, {name}: {licence}."


def _sources(config: Any) -> list[str]:
    named = config.data.train
    return [named] if isinstance(named, str) else list(named or [])


def _name(source: str) -> str:
    """Return a file's name without the folders of the machine it lay on; a Hub id as it is."""
    return Path(source).name if Path(source).is_absolute() else source
