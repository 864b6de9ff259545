"""Commands about the machine: `doctor` and `top`."""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from whet.cli_options import AsJson
from whet.errors import InputError

if TYPE_CHECKING:
    from whet.doctor.finding import Finding

machine_app = typer.Typer()


@machine_app.command()
def doctor(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="With --compare: what --distributed --json printed on each node."),
    ] = None,
    as_json: AsJson = False,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Look at what several processes or nodes need.")
    ] = False,
    hosts: Annotated[
        Path | None, typer.Option(help="File with a host a line: ask each by ssh, and compare.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare the nodes of which FILES are the reports.")
    ] = False,
    rdzv: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Where they meet; default: MASTER_ADDR, MASTER_PORT."
        ),
    ] = None,
    shared: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder that all nodes should see.")
    ] = None,
    several: Annotated[
        bool,
        typer.Option("--several", help="This node is one of several (--hosts says it itself)."),
    ] = False,
) -> None:
    """Check this machine: driver, torch, packages, memory, disk; each fault with its fix."""
    # Its import says that an optional kernel package is not there, which is no fault.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    files = files or []
    if bool(files) != compare:
        raise InputError("--compare and the nodes' reports go together",
                         fix="whet doctor --compare node1.json node2.json")  # fmt: skip
    if not (distributed or hosts or compare):
        if rdzv or shared or several:
            raise InputError("--rdzv, --shared and --several go with --distributed")
        from whet.doctor import examine

        findings = examine()
        told: object = [asdict(finding) for finding in findings]
    else:
        findings, told = _examine_nodes(hosts, files, rdzv, shared, several)
    if as_json:
        typer.echo(json.dumps(told, indent=2))
    else:
        from whet.terminal import console, finding_lines

        for line in finding_lines(findings):
            console().print(line)
    if any(finding.status == "fault" for finding in findings):
        raise typer.Exit(1)


def _examine_nodes(
    hosts: Path | None, reports: list[Path], rdzv: str | None, shared: Path | None, several: bool
) -> tuple[list[Finding], object]:
    """Report on this node, or compare several; return the lines, and what JSON says."""
    from whet.doctor import distributed
    from whet.doctor.finding import Finding
    from whet.doctor.hosts import ask_hosts, read_hosts, read_reports

    if hosts is None and not reports:
        node = distributed.report_node(rdzv, shared, several)
        return [Finding(**line) for line in node["findings"]], node
    nodes, findings = read_reports(reports), []
    if hosts is not None:
        options = ["--several"]
        options += [] if rdzv is None else ["--rdzv", rdzv]
        options += [] if shared is None else ["--shared", str(shared.absolute())]
        asked, findings = ask_hosts(read_hosts(hosts), options)
        nodes |= asked
        if shared is not None:
            distributed.forget_mark(shared)
    findings += distributed.compare(nodes)
    return findings, {"nodes": nodes, "findings": [asdict(finding) for finding in findings]}


@machine_app.command()
def top(
    name: Annotated[str, typer.Argument(metavar="RUN", help="Run folder.")],
    interval: Annotated[float, typer.Option(min=0.05, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Show one moment and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Watch a run and its machine: loss, speed, GPU, CPU, memory, heat and power; Ctrl-C ends it."""
    from whet.runs import RunFolder
    from whet.terminal import console
    from whet.top import follow

    if not RunFolder.is_run(name):
        raise InputError(
            f"'{name}' is not a run (a folder with config.yaml)",
            fix="`whet train` makes one under runs/",
        )
    with contextlib.suppress(KeyboardInterrupt):  # the usual way to leave: nothing was stopped
        follow(RunFolder(name), console(), interval, as_json, once, typer.echo)
