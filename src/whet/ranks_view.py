"""What `whet plan --ranks` shows: a table of strategies, and the simplest that fits item by item."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from whet.plan.parallel import RankPlan
from whet.plan.plan import gib
from whet.planning import RanksPlan
from whet.terminal import duration


def show_ranks(out: Console, found: RanksPlan) -> None:
    """Show what a rank needs under each strategy.

    Args:
        out: Where to.
        found: The plans.
    """
    cluster, first = found.cluster, found.plans[0]
    table = Table(
        title=f"{cluster.num_ranks} ranks on {cluster.num_nodes} "
        f"node{'s' * (cluster.num_nodes > 1)}, each: {first.target.name}",
        title_justify="left", title_style="bold", box=SIMPLE,
    )  # fmt: skip
    names = ("", "a rank", "host, a node", "sent a step", "step", "of it waiting", "largest", "")
    for name in names:
        table.add_column(name, justify="right" if name else "left")
    for plan, largest in zip(found.plans, found.largest, strict=True):
        table.add_row(
            plan.name, gib(plan.choice.peak_bytes), gib(plan.host_bytes) if plan.host_bytes else "",
            gib(plan.sent_bytes), duration(plan.step_seconds), duration(plan.exposed_seconds),
            f"{largest / 1e9:.3g}B" if largest else "-", escape(_verdict(plan)),
        )  # fmt: skip
    out.print(table)
    if found.simplest is not None:
        items = Table(
            title=f"{found.simplest.name}, one rank", title_justify="left", title_style="bold",
            box=SIMPLE,
        )  # fmt: skip
        items.add_column("")
        items.add_column("GiB", justify="right")
        items.add_column("")
        for item in found.simplest.items:
            where = {"device": "", "host": "host memory", "disk": "disk"}[item.where]
            items.add_row(item.name, f"{item.num_bytes / 2**30:.3f}", where)
        out.print(items)
    mark = "[bold]Simplest that fits:[/bold]" if found.simplest else "[red]Does not fit:[/red]"
    out.print(f"{mark} {escape(found.reason)}")
    size, seconds = gib(found.checkpoint.num_bytes), duration(found.checkpoint.seconds)
    rate = found.cluster.disk / 1e9
    out.print(f"  [dim]-[/dim] a checkpoint is {size}, written in {seconds} at {rate:g} GB/s")
    reasons: dict[str, list[str]] = {}
    for plan in found.plans:
        if plan.why_not:
            reasons.setdefault(plan.why_not, []).append(plan.name)
    notes = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    for note in [*notes, *found.notes]:
        out.print(f"  [dim]-[/dim] {escape(note)}")


def _verdict(plan: RankPlan) -> str:
    """Say whether a strategy can be used."""
    if plan.why_not:
        return "no"
    if not plan.fits:
        return "does not fit"
    can_start = plan.strategy.settings(plan.cluster.num_ranks) is not None
    return "fits" if can_start else "fits; whet does not start it"
