"""Reports of several nodes: read from files, or asked for by ssh."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from whet.doctor.finding import Finding
from whet.errors import InputError

SSH_SECONDS = 180  # a first import of torch from a network file system takes minutes
_KEYS = {"host", "versions", "cuda", "nccl", "driver", "gpus", "variables", "shared", "findings"}


def read_hosts(path: Path) -> list[str]:
    """Return the hosts of a file: the first word of each line; # begins a comment.

    Raises:
        InputError: The file cannot be read, or names no host.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' cannot be read as a list of hosts: {error}") from error
    hosts = [words[0] for line in lines if (words := line.partition("#")[0].split())]
    bad = [host for host in hosts if host.startswith("-")]  # ssh would take it as an option
    if bad or not hosts:
        raise InputError(
            f"'{path}' names no hosts" if not bad else f"'{bad[0]}' in '{path}' is no host",
            fix="write one host a line, such as node1 or user@10.0.0.2",
        )
    return list(dict.fromkeys(hosts))


def read_reports(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Return the reports that `whet doctor --distributed --json` wrote on each node, by host.

    Raises:
        InputError: A file is not such a report.
    """
    nodes: dict[str, dict[str, Any]] = {}
    for path in paths:
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"'{path}' is no report of a node: {error}") from error
        if not isinstance(told, dict) or not told.keys() >= _KEYS:
            raise InputError(
                f"'{path}' is no report of a node",
                fix="write it there with `whet doctor --distributed --json > FILE`",
            )
        name = told["host"] if told["host"] not in nodes else f"{told['host']} ({path})"
        nodes[name] = told
    return nodes


def ask_hosts(
    hosts: Sequence[str], options: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], list[Finding]]:
    """Run the doctor on each host by ssh, all at once.

    Each needs this environment's Python at the same path, and log-in by key.

    Args:
        hosts: As ssh takes them.
        options: For the doctor there.

    Returns:
        What the hosts reported, and a fault for each that did not.
    """
    words = [sys.executable, "-m", "whet", "doctor", "--distributed", "--json", *options]
    command = " ".join(shlex.quote(word) for word in words)

    def ask(host: str) -> dict[str, Any] | str:
        ssh = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", host, command]
        try:
            done = subprocess.run(ssh, capture_output=True, text=True, timeout=SSH_SECONDS)
            return json.loads(done.stdout)
        except FileNotFoundError:
            return "there is no ssh here"
        except subprocess.TimeoutExpired:
            return f"no answer in {SSH_SECONDS} seconds"
        except ValueError:
            said = done.stderr.strip().splitlines() or ["nothing"]
            return f"it said: {said[-1]}"

    with ThreadPoolExecutor(max_workers=32) as pool:
        told = dict(zip(hosts, pool.map(ask, hosts), strict=True))
    nodes = {host: found for host, found in told.items() if isinstance(found, dict)}
    faults = [
        Finding(host, "fault", f"could not be asked by ssh: {found}",
                f"make `ssh {host}` work without a password, and install whet there at the same path",
                "the node cannot be compared with the others")
        for host, found in told.items()
        if isinstance(found, str)
    ]  # fmt: skip
    return nodes, faults
