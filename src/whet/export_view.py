"""What was compared of an export, in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from whet.export.check import Gate


def show_gates(out: Console, gates: Sequence[Gate]) -> None:
    """Show what was compared of each exported file, and the answers side by side.

    Args:
        out: Where to.
        gates: What was compared.
    """
    table = Table(
        title="Loaded again, and compared with the live model",
        title_justify="left",
        title_style="bold",
        box=SIMPLE,
    )
    for column in ("", "compared", "measured", "allowed", ""):
        table.add_column(column)
    for gate in gates:
        for number, found in enumerate(gate.findings):
            verdict = {True: "[green]pass[/green]", False: "[red]FAIL[/red]", None: ""}[
                found.passed
            ]
            words = [escape(word) for word in (found.name, found.measured, found.allowed)]
            table.add_row(escape(gate.file) if number == 0 else "", *words, verdict)
        table.add_section()
    out.print(table)
    for gate in gates:
        for answer in gate.answers[:1]:
            out.print(f"  {gate.file}", markup=False)
            for who in ("live", "exported"):
                out.print(f"    {who:<9} {' '.join(answer[who].split())}", markup=False)
