"""What mkdocs calls while it builds the site (`hooks` in mkdocs.yml).

It writes the pages that only repeat the code (the config and command line references), takes files
of the repository that pages link to into the site, puts diagrams into their pages so that they follow
the page's colours, and turns Arabic pages right to left. Left out on purpose: tables that are also
read in the repository are committed, and tests hold them to the code.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils.templates import TemplateContext
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# A link to a file, without the part behind `#`.
_LINK = re.compile(r"(?<=\]\()(\.\.?/[^)#\s]+)")
_DIAGRAM = re.compile(r'<img [^>]*src="((?:\.\./)*diagrams/[^"]+\.svg)"[^>]*>')
# The colours of the diagrams, and what docs/extra.css calls them; on paper and in the repository the
# files show as they are.
COLOURS = {
    "#ffffff": "box", "#f7f9fa": "ground", "#1f2933": "ink", "#52606d": "line", "#0b7285": "accent",
    "#e3f2f4": "soft", "#eef4f5": "soft",
}  # fmt: skip


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put pages that the menu of mkdocs.yml does not name behind the guides, by their own titles."""
    menu = config.nav or []
    named = set(_pages(menu))
    guides = next(item["How to"] for item in menu if "How to" in item)
    for file in sorted(DOCS.glob("*.md")):
        if file.name not in named:
            title = file.read_text(encoding="utf-8").split("\n", 1)[0]
            guides.append({title.removeprefix("# "): file.name})
    return config


def _pages(item: Any) -> Iterator[str]:
    """Yield the pages of a menu or a part of one."""
    if isinstance(item, str):
        yield item
    for part in item.values() if isinstance(item, dict) else item if isinstance(item, list) else ():
        yield from _pages(part)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and what pages link to outside of docs/."""
    for name, content in (("config", config_reference()), ("cli", cli_reference())):
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    pages = [DOCS / file.src_uri for file in files.documentation_pages() if not file.generated_by]
    wanted = {outside for page in pages for _, outside in _links_out(page)}
    # A result page shows a picture that lies beside it.
    for page in [path for path in wanted if path.suffix == ".md"]:
        wanted |= {
            page.parent / name for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text())
        }
    for path in sorted(wanted):
        uri = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links that leave docs/ to the copies inside the site."""
    source = DOCS / page.file.src_uri
    for written, outside in _links_out(source) if source.exists() else ():
        inside = os.path.relpath(DOCS / outside.relative_to(ROOT), source.parent)
        markdown = markdown.replace(f"]({written}", f"]({inside}")
    return markdown


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Put a page's diagrams into it: as pictures of their own they would not see its colours."""

    def inline(found: re.Match[str]) -> str:
        file = (DOCS / page.file.src_uri).parent / found[1]
        drawing = file.read_text(encoding="utf-8")
        for colour, name in COLOURS.items():
            drawing = drawing.replace(f'"{colour}"', f'"var(--drawing-{name}, {colour})"')
        for mark in ("t", "d", "a"):  # several drawings on a page need names of their own
            drawing = drawing.replace(f'id="{mark}"', f'id="{file.stem}-{mark}"')
        drawing = drawing.replace("url(#a)", f"url(#{file.stem}-a)")
        drawing = drawing.replace('"t d"', f'"{file.stem}-t {file.stem}-d"')
        return f'<span class="drawing">{drawing}</span>'

    return _DIAGRAM.sub(inline, html)


def on_page_context(context: TemplateContext, page: Page, config: MkDocsConfig, **_: Any) -> None:
    """Give Arabic pages their language, and so their direction; the theme has one for all pages."""
    config.theme["language"] = "ar" if page.file.src_uri.startswith("ar/") else "en"


def _links_out(page: Path) -> Iterator[tuple[str, Path]]:
    """Yield each link of a page to an existing file of the repository outside of docs/."""
    for written in _LINK.findall(page.read_text(encoding="utf-8")):
        path = Path(os.path.normpath(page.parent / written))
        if path.is_file() and path.is_relative_to(ROOT) and not path.is_relative_to(DOCS):
            yield written, path


# --- the config ----------------------------------------------------------------------------------


def config_reference() -> str:
    """Return the page of every key with its type, default and meaning, from the schema."""
    from whet.config import Config
    from whet.config_file import sections

    parts = sections()
    lines = [
        "# Config",
        "",
        "Every key of a config file: YAML or JSON, and `--set section.key=value` on the command line.",
        "`whet init` writes all of them with their defaults; unknown keys are errors that name the key",
        "that was meant. Editors complete them with [config.schema.json](../config.schema.json).",
        "This page is made from the schema.",
        "",
        "## Top level",
        "",
    ]
    for name, field in Config.model_fields.items():
        if name not in parts:
            lines += _key(name, field)
    for name, part in parts.items():
        lines += [f"## {name}", "", _sentence(Config.model_fields[name].description), ""]
        for key, field in part.model_fields.items():
            lines += _key(f"{name}.{key}", field)
    return "\n".join(lines)


def _key(path: str, field: FieldInfo) -> list[str]:
    default = json.dumps(field.get_default(call_default_factory=True), ensure_ascii=False)
    heading = f"### `{path}` {{ #{path.replace('.', '-')} }}"
    return [
        heading,
        "",
        f"{_type(field)}; default `{default}`",
        "",
        _sentence(field.description),
        "",
    ]


def _sentence(text: str | None) -> str:
    """Return a field's docstring on one line, with what Markdown would read as marks escaped."""
    parts = " ".join((text or "").split()).split("`")
    parts[::2] = [re.sub(r"([\[\]*_])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def _type(field: FieldInfo) -> str:
    """Say in words what a field takes, with its bounds."""
    from pydantic import TypeAdapter

    schema = TypeAdapter(field.annotation).json_schema()
    words = _words(schema)
    signs = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    for bound in field.metadata:
        for sign, word in signs.items():
            if (value := getattr(bound, sign, None)) is not None:
                words += f", {word} {value:g}"
    return words


def _words(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " \\| ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "anyOf" in schema:
        return " or ".join(_words(one) for one in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {_words(schema['items'])}"
    if schema.get("type") == "object":
        return f"mapping to {_words(schema['additionalProperties'])}"
    names = {"string": "text", "integer": "whole number", "boolean": "true or false"}
    return names.get(schema["type"], schema["type"])


# --- the command line ----------------------------------------------------------------------------


def cli_reference() -> str:
    """Return the page of every command's `--help`."""
    import typer
    from typer.testing import CliRunner

    from whet.cli import app

    lines = [
        "# Command line",
        "",
        "`whet COMMAND --help` as it prints itself. Exit codes: 0 done, 1 the work failed, 2 the input",
        "was wrong, 130 stopped with Ctrl-C. `--debug` behind any command gives a traceback.",
        "",
    ]
    for name in sorted(typer.main.get_command(app).commands):
        told = CliRunner().invoke(app, [name, "--help"], prog_name="whet", terminal_width=86).output
        # The config's keys have a page of their own.
        told, keys, _ = told.partition("Config keys and their defaults:")
        lines += [f"## whet {name}", "", "```text", told.strip(), "```", ""]
        if keys:
            lines += ["Takes the keys of a [config](config.md).", ""]
    return "\n".join(lines)
