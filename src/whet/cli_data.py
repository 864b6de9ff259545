"""`whet data`: what of a file, or of a config's data, will be learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from whet.cli_options import AsJson, Assignments, keys
from whet.config import Config
from whet.config_file import load_config
from whet.config_text import parse_yaml
from whet.data.sources import require_sources
from whet.errors import InputError

data_app = typer.Typer()


@data_app.command(epilog=keys("model", "data"))
def data(
    source: Annotated[
        str, typer.Argument(metavar="CONFIG|DATA", help="Config, or a data file, folder or Hub id.")
    ],
    set_: Assignments = None,
    model: Annotated[
        str | None, typer.Option(help="Model whose tokenizer and template are used.")
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows to show.")] = 3,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report as a page, too.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Report what of the data will be learned, and what will not, without loading a model."""
    overrides = [*(set_ or []), *([f"model.name={model}"] if model else [])]
    settings = load_config(source if _is_config(source) else {"data": {"train": source}}, overrides)
    require_sources(settings.data)
    from whet.data.gates import check_gates, faults
    from whet.data.prepare import prepare
    from whet.data.template import set_chat_template
    from whet.data_view import choose_rows, print_report, to_html
    from whet.model.load import load_tokenizer, max_length
    from whet.terminal import console, counter, quiet_libraries

    quiet_libraries()
    limit = max_length(settings.model)
    tokenizer = load_tokenizer(settings.model)
    template = set_chat_template(tokenizer, settings.model.chat_template)
    with counter("examples") as tell:
        prepared = prepare(settings.data, tokenizer, limit, template, tell)
    report = prepared.report
    found = list(faults(report))
    stops = [sentence for name, sentence in found if name not in settings.data.allow]
    shown = choose_rows(prepared, tokenizer, rows)
    if html is not None:
        _write_page(html, to_html(report, shown, stops))
    if as_json:
        told: dict[str, Any] = {**report.to_dict(), "warnings": report.warnings()}
        told["faults"] = [
            {"name": name, "sentence": text, "allowed": name in settings.data.allow}
            for name, text in found
        ]
        told["rows"] = [
            {
                "title": row.title,
                "pieces": [p and {"text": p[0], "learned": p[1]} for p in row.pieces],
            }
            for row in shown
        ]
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        print_report(console(), report, shown, stops)
    check_gates(report, settings.data.allow)


def _is_config(source: str) -> bool:
    """Tell a config from data: YAML is one, and JSON that has a config's sections."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        return True
    if path.suffix != ".json" or not path.is_file():
        return False
    with path.open("rb") as file:
        if not file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            return False
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError):
        return False
    return isinstance(tree, dict) and bool(set(tree) & set(Config.model_fields))


def _write_page(file: Path, page: str) -> None:
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--html '{file}' cannot be written: {error.strerror}") from error
