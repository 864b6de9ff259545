"""The site builds without a warning, loads nothing from elsewhere, and says what the code does."""

import ast
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest

from whet.doctor.advice import ADVICE
from whet.doctor.explain import _SIGNS, explain

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site as `make docs` does, in a process of its own."""
    folder = tmp_path_factory.mktemp("site")
    told = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == 0 and "WARNING  -" not in told.stderr, told.stderr
    return folder


def test_every_key_and_command_is_in_the_references(site):
    import typer

    from whet.cli import app
    from whet.config_file import known_keys

    page = (site / "reference" / "config.html").read_text()
    assert [key for key in known_keys() if f"<code>{key}</code>" not in page] == []
    page = (site / "reference" / "cli.html").read_text()
    names = typer.main.get_command(app).commands
    assert len(names) > 9 and [name for name in names if f"Usage: whet {name}" not in page] == []


def test_pages_load_nothing_from_another_host(site):
    loading = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\ssrc=\"?(?:https?:)?//[^\s>]+"
        r"|<link\b[^>]*rel=\"?(?:stylesheet|preload|preconnect|icon)\"?[^>]*href=\"?(?:https?:)?//[^\s>]+"
        r"|@import[^;]*//|url\([\"']?(?:https?:)?//[^)]+"
    )
    pages = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(pages) > 25
    assert {m[0] for page in pages for m in loading.finditer(page.read_text())} == set()
    # A script of the theme's would fetch these: diagrams by Mermaid, the search of the offline plugin.
    assert not [
        p for p in pages if re.search('class="mermaid"|unpkg|jsdelivr|cdnjs', p.read_text())
    ]


def test_every_link_of_the_site_leads_to_a_page_and_a_place_on_it(site):
    link = re.compile(r"""<[a-z]+\b[^>]*?\s(?:href|src)=(?:"([^"]*)"|([^\s>"]+))""")
    place = re.compile(r"""\s(?:id|name)=(?:"([^"]*)"|([^\s>"]+))""")
    pages = {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    places = {page: {a or b for a, b in place.findall(text)} for page, text in pages.items()}
    broken = set()
    for page, text in pages.items():
        if page.name == "404.html":  # its links begin at a server's root
            continue
        for target in {a or b for a, b in link.findall(text)}:
            path, _, mark = unquote(unescape(target)).partition("#")
            if re.match(r"[a-z]+:", path):
                continue
            to = (page.parent / path).resolve() if path else page
            if not to.exists() or (mark and to in places and mark not in places[to]):
                broken.add(f"{page.relative_to(site)}: {target}")
    assert broken == set()


def test_links_of_the_front_pages_lead_to_files():
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        links = [
            t.partition("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in t
        ]
        assert [t for t in links if t and not (ROOT / page).parent.joinpath(t).exists()] == [], page


def test_the_arabic_page_runs_from_right_to_left(site):
    page = (site / "ar" / "index.html").read_text()
    assert '<html lang="ar"' in page and '<body dir="rtl"' in page
    assert "جدول المحتويات" in page, "the theme's own words, too"
    page = (site / "index.html").read_text()
    assert '<html lang="en"' in page and '<body dir="ltr"' in page


def test_diagrams_are_in_their_page_with_its_colours(site):
    page = (site / "how-it-works.html").read_text()
    assert page.count('class="drawing"') == len(list((DOCS / "diagrams").glob("*.svg"))) == 4
    assert 'src="diagrams/' not in page and '"#ffffff"' not in page
    names = re.findall(r'id="((?:batch|layer|planner|parity)-[tda])"', page)
    assert len(names) == len(set(names)) == 12, "names of one drawing are not another's"
    styles = (DOCS / "extra.css").read_text()
    assert all(f"--drawing-{name}:" in styles for name in re.findall(r"var\(--drawing-(\w+)", page))


def test_every_page_is_in_the_menu(site):
    menu = (site / "index.html").read_text()
    assert [p.name for p in DOCS.glob("*.md") if f'href="{p.stem}.html"' not in menu] == []


def test_links_out_of_docs_lead_to_copies(site):
    assert (site / "examples" / "dpo.yaml").read_bytes() == (
        ROOT / "examples" / "dpo.yaml"
    ).read_bytes()
    assert "../examples/dpo.yaml" in (site / "guides" / "index.html").read_text()
    assert list((site / "benchmarks" / "results").glob("*.html"))


def test_the_guides_have_every_example_and_a_page_in_the_menu_each():
    page = (DOCS / "guides" / "index.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\(\.\./\.\./examples/([^)]+)\)", page))
    examples = ROOT / "examples"
    configs = [*examples.glob("*.yaml"), *(examples / "convert").glob("*.y*ml")]
    assert {file.relative_to(examples).as_posix() for file in configs} <= linked
    assert all((examples / name).is_file() for name in linked)
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(f"guides/{file.name}" in menu for file in (DOCS / "guides").glob("*.md"))


# --- troubleshooting -----------------------------------------------------------------------------


def rows(page, heading):
    """Return the cells of the table below a heading."""
    part = (DOCS / page).read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


@pytest.fixture(scope="module")
def sentences():
    """Every string that the source holds; those in parts are joined, with a mark for each value."""
    found = []
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                found.append("".join(map(str, parts)))
    return found


@pytest.mark.parametrize("heading", ["Before the run", "During the run"])
def test_messages_that_the_page_explains_are_messages_of_the_code(heading, sentences):
    table = rows("troubleshooting.md", heading)
    assert len(table) >= 4
    for message, _ in table:
        for quoted in re.findall("`([^`]+)`", message):
            pieces = [piece.strip(" '`,") for piece in quoted.split("…")]
            there = any(
                re.search(".*".join(map(re.escape, pieces)), text, re.DOTALL) for text in sentences
            )
            assert there, quoted


def test_messages_of_libraries_lead_to_the_fault_that_the_page_names():
    table = rows("troubleshooting.md", "Of torch, CUDA, NCCL and Triton")
    for message, fault in table:
        found = explain(RuntimeError(message.strip("`")))
        assert found is not None and found.fix == ADVICE[fault].fix, message
    assert {fault for _, fault in table} == {key for _, key, _ in _SIGNS}
