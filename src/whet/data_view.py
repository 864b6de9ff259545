"""What a person sees of the data: the supervision report in the terminal and as a page.

Learned tokens are set off by more than their colour (bold in the terminal, underlined on the page).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from whet.data.prepare import PreparedData
    from whet.data.report import DataReport, SplitReport
    from whet.data.tokenize import Tokens
    from whet.model import Tokenizer

SHOWN_TOKENS = 300  # of a row that is shown, from its start and from its end
_COUNTS = (
    ("rows read", "rows_read"),
    ("rows refused", "rows_refused"),
    ("rows with nothing to learn", "rows_without_labels"),
    ("of them, all learned tokens gone", "rows_masked"),
    ("rows cut at model.max_length", "rows_truncated"),
    ("rows without a learned end of turn", "rows_without_end"),
    ("rows with an empty answer", "empty_answers"),
    ("copies of an earlier row", "duplicates"),
    ("examples kept", "examples"),
    ("different answers", "distinct_answers"),
    ("tokens", "tokens"),
    ("tokens learned", "tokens_learned"),
    ("tokens not learned", "tokens_not_learned"),
    ("learned tokens lost to the cut", "tokens_lost"),
    ("longest example, tokens", "longest"),
)


@dataclass(frozen=True, slots=True)
class Shown:
    """A row as it is shown.

    Args:
        title: Its place, its tokens and how many of them are learned.
        pieces: Its text, in runs that are learned or not; None stands for a part that is left out.
    """

    title: str
    pieces: list[tuple[str, bool] | None]


def choose_rows(prepared: PreparedData, tokenizer: Tokenizer, num: int = 3) -> list[Shown]:
    """Take rows to show: the first, the longest, and others evenly between.

    Args:
        prepared: The prepared data.
        tokenizer: The model's tokenizer.
        num: How many.
    """
    rows = prepared.train
    if not len(rows) or num < 1:
        return []
    between = [round(i * (len(rows) - 1) / max(1, num - 2)) for i in range(num - 1)]
    numbers = sorted({*between, int(rows.lengths.argmax())})
    return [show_row(rows[number], tokenizer) for number in numbers]


def show_row(tokens: Tokens, tokenizer: Tokenizer) -> Shown:
    """Return one row's text in learned and other runs, shortened in the middle when it is long."""
    num = len(tokens.input_ids)
    kind = {8: ", chosen", 16: ", rejected", 32: ", desirable", 64: ", undesirable"}
    what = next((word for bit, word in kind.items() if tokens.flags & bit), "")
    title = f"{tokens.where}{what}: {num} tokens, {tokens.num_labels} learned"
    if num <= SHOWN_TOKENS:
        return Shown(title, [*_runs(tokens, 0, num, tokenizer)])
    half = SHOWN_TOKENS // 2
    start, end = _runs(tokens, 0, half, tokenizer), _runs(tokens, num - half, num, tokenizer)
    return Shown(f"{title} (the middle is left out)", [*start, None, *end])


def _runs(tokens: Tokens, start: int, stop: int, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """Decode a part of a row in runs.

    Each run's text is what it adds to the text before it, since some tokenizers write a token otherwise
    at the start of a text than within.
    """
    ids = tokens.input_ids[start:stop]
    learned = [label != -100 for label in tokens.labels[start:stop]]
    found, text, first = [], "", 0
    for place in range(1, len(ids) + 1):
        if place == len(ids) or learned[place] != learned[first]:
            longer = str(tokenizer.decode(ids[:place]))
            found.append((longer[len(text) :], learned[first]))
            text, first = longer, place
    return found


def columns_of(report: DataReport) -> list[tuple[str, list[str]]]:
    """Return the counts, each with its numbers for the training and the held-out rows."""
    splits: list[SplitReport] = [report.train, *([report.heldout] if report.heldout else [])]
    return [
        (
            name,
            [
                f"{s.tokens - s.tokens_learned if key == 'tokens_not_learned' else getattr(s, key):,}"
                for s in splits
            ],
        )
        for name, key in _COUNTS
    ]


def data_table(report: DataReport) -> Table:
    """Return the counts as a table, training beside held-out rows."""
    table = Table(box=SIMPLE, show_header=report.heldout is not None)
    table.add_column("")
    for name in ("training", "held out")[: 2 if report.heldout else 1]:
        table.add_column(name, justify="right")
    for name, values in columns_of(report):
        table.add_row(name, *values)
    return table


def length_bars(split: SplitReport) -> list[str]:
    """Return a histogram of the examples' lengths, a line a bin."""
    most = max(split.lengths.values(), default=1)
    return [
        f"  {name + ' tokens':>18}  {'#' * max(1, round(40 * count / most))} {count:,}"
        for name, count in split.lengths.items()
    ]


def head_lines(report: DataReport) -> list[str]:
    """Return what was read and how: sources, formats, template, longest row allowed."""
    formats = ", ".join(report.train.formats) or "no rows"
    kept = " (from the cache)" if report.cached else ""
    return [
        f"{', '.join(report.train.files)}: {formats}{kept}",
        f"chat template: {report.chat_template}; longest row {report.max_length:,} tokens",
    ]


def print_report(
    out: Console, report: DataReport, rows: Sequence[Shown], stops: Sequence[str]
) -> None:
    """Print the whole report.

    Args:
        out: Where to.
        report: The report.
        rows: Rows to show.
        stops: Faults that keep a run from starting.
    """
    for line in head_lines(report):
        out.print(line, markup=False)
    out.print(data_table(report))
    out.print("\n".join(length_bars(report.train)), markup=False)
    if rows:
        out.print("\n[bold]Rows as the model reads them[/bold] (learned tokens are green and bold)")
    for row in rows:
        out.print(f"\n  {row.title}", style="cyan", markup=False)
        text = Text()
        for piece in row.pieces:
            if piece is None:
                text.append("\n    [...]\n    ", style="dim")
            else:
                style = "bold green" if piece[1] else "dim"
                text.append(piece[0].replace("\n", "\n    "), style=style)
        out.print(Text("    ") + text)
    if warnings := report.warnings():
        out.print("\n[bold]To look at[/bold]")
    for warning in warnings:
        out.print(Text.assemble(("  - ", "yellow"), warning))
    if not stops:
        out.print("\n[green]Nothing here keeps a run from starting.[/green]")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
:root {{ color-scheme: light dark; --soft: #8884; --learned: #0a7d33; --bar: #3b82c4; --warn: #b35900; }}
@media (prefers-color-scheme: dark) {{ :root {{ --learned: #5fd38a; --warn: #ffb35c; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .15rem .8rem .15rem 0; border-bottom: 1px solid var(--soft); text-align: left; }}
td.n, th.n {{ text-align: right; font-variant-numeric: tabular-nums; }}
.bar {{ background: var(--bar); height: .8rem; border-radius: 2px; }}
.row {{ white-space: pre-wrap; unicode-bidi: plaintext; overflow-wrap: anywhere;
  border: 1px solid var(--soft); border-radius: 6px; padding: .8rem;
  font-family: ui-monospace, monospace; font-size: .85rem; }}
.row span {{ opacity: .65; }}
.row mark {{ background: none; color: var(--learned); font-weight: 600; text-decoration: underline;
  text-decoration-thickness: 1px; text-underline-offset: 3px; }}
.stop {{ color: var(--warn); font-weight: 600; }}
</style></head><body>
<h1>{title}</h1>
{head}
<table>{counts}</table>
<h2>Examples by length</h2><table>{bars}</table>
<h2>Rows as the model reads them</h2><p><mark style="background:none;color:var(--learned)"><u>Learned
tokens</u></mark> are green and underlined; the rest is only read.</p>
{rows}
<h2>To look at</h2>{warnings}
</body></html>
"""


def to_html(report: DataReport, rows: Sequence[Shown], stops: Sequence[str]) -> str:
    """Return the report as one page without anything from elsewhere.

    Args:
        report: The report.
        rows: Rows to show.
        stops: Faults that keep a run from starting.
    """
    names = ["", "training", *(["held out"] if report.heldout else [])]
    counts = "".join(f"<th class=n>{name}</th>" for name in names)
    for name, values in columns_of(report):
        cells = "".join(f"<td class=n>{value}</td>" for value in values)
        counts += f"<tr><td>{name}</td>{cells}</tr>"
    most = max(report.train.lengths.values(), default=1)
    bars = "".join(
        f"<tr><td class=n>{name} tokens</td><td style='width:24rem'>"
        f"<div class=bar style='width:{100 * count / most:.1f}%'></div></td>"
        f"<td class=n>{count:,}</td></tr>"
        for name, count in report.train.lengths.items()
    )
    shown = "".join(
        f"<p>{escape(row.title)}</p><div class=row dir=auto>"
        + "".join(_html_piece(piece) for piece in row.pieces)
        + "</div>"
        for row in rows
    )
    found = [f"<li class=stop>{escape(text)}</li>" for text in stops]
    found += [f"<li>{escape(text)}</li>" for text in report.warnings()]
    return _PAGE.format(
        title=escape(f"What {', '.join(report.train.files)} teaches"),
        head="".join(f"<p>{escape(line)}</p>" for line in head_lines(report)),
        counts=counts,
        bars=bars,
        rows=shown or "<p>None.</p>",
        warnings=f"<ul>{''.join(found)}</ul>" if found else "<p>Nothing.</p>",
    )


def _html_piece(piece: tuple[str, bool] | None) -> str:
    if piece is None:
        return "\n<span>[...]</span>\n"
    tag = "mark" if piece[1] else "span"
    return f"<{tag}>{escape(piece[0])}</{tag}>"
