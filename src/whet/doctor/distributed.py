"""Checks of several processes or machines that are to train together.

Each node reports on itself (`report_node`), and the reports are compared (`compare`); nothing here
communicates but for the rendezvous port.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from whet.doctor.advice import report
from whet.doctor.finding import Finding, versions
from whet.doctor.gpu import check_gpu, check_nccl
from whet.doctor.machine import Machine, look
from whet.doctor.resources import check_container, check_memory
from whet.errors import InputError

CONNECT_SECONDS = 3.0
VARIABLES = (
    "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_IB_HCA", "NCCL_P2P_DISABLE", "NCCL_DEBUG",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
# Interfaces that are of this machine alone: NCCL leaves out lo and docker by itself, gloo does not.
_LOCAL = ("lo", "docker", "veth", "virbr", "br-", "cni", "flannel", "tailscale")
_MARK = ".whet-doctor"


def report_node(
    rendezvous: str | None = None, shared: str | Path | None = None, several: bool = False
) -> dict[str, Any]:
    """Look at this node, and return what JSON can say of it.

    Args:
        rendezvous: HOST:PORT where the processes will meet; None: MASTER_ADDR and MASTER_PORT.
        shared: A folder that all nodes should see.
        several: Whether more than this node takes part.

    Raises:
        InputError: The rendezvous is not HOST:PORT, or the folder is not there.
    """
    machine = look()
    found = versions()
    found["torch"] = machine.torch.version
    mark = None if shared is None else _read_mark(Path(shared))
    driver = machine.smi.driver if machine.smi else None
    return {
        "host": socket.gethostname(),
        "versions": found,
        "cuda": machine.torch.cuda,
        "nccl": machine.torch.nccl,
        "driver": driver,
        "gpus": [card.name for card in machine.torch.cards],
        "variables": {n: machine.variables[n] for n in VARIABLES if n in machine.variables},
        "interfaces": interfaces(),
        "shared": mark,
        "findings": [
            asdict(finding) for finding in check_distributed(machine, rendezvous, several, mark)
        ],
    }


def check_distributed(
    machine: Machine, rendezvous: str | None, several: bool, mark: str | None = None
) -> list[Finding]:
    """Return the lines on this node's part in a run of several processes.

    Args:
        machine: The facts.
        rendezvous: HOST:PORT, or None.
        several: Whether more than this node takes part.
        mark: What was read in the folder that all nodes should see, or None.
    """
    variables = machine.variables
    world = variables.get("WORLD_SIZE", "1")
    several = several or world != variables.get("LOCAL_WORLD_SIZE", world)
    host, port = meeting_point(rendezvous, variables)
    findings = [
        *check_gpu(machine),
        check_backend(machine),
        *check_peers(machine),
        check_port(host, port, several),
        *check_interfaces(variables, interfaces(), several),
        check_timeouts(variables),
        check_memory(machine),
        *check_container(machine, several=True),
    ]
    if mark is not None:
        findings.append(Finding("shared folder", "ok", f"can be written; its mark is {mark}"))
    return findings


def check_backend(machine: Machine) -> Finding:
    """Return the line on what the processes talk through: NCCL between GPUs, else gloo."""
    if machine.has_gpu or machine.torch.nccl:
        return check_nccl(machine, needed=machine.has_gpu)
    if machine.torch.gloo:
        return Finding("backend", "ok", "gloo, as there is no GPU (your torch has no NCCL)")
    return Finding("backend", "fault", "this torch has neither NCCL nor gloo",
                   "pip install --force-reinstall torch", "processes could not talk")  # fmt: skip


def check_peers(machine: Machine) -> list[Finding]:
    """Return the line on GPUs that can read each other's memory."""
    num = len(machine.torch.cards)
    if num < 2:
        return []
    import torch

    apart = [
        (a, b)
        for a in range(num)
        for b in range(num)
        if a != b and not torch.cuda.can_device_access_peer(a, b)
    ]
    if not apart:
        return [Finding("peer access", "ok", f"between all {num} GPUs")]
    pairs = num * (num - 1)
    return [
        Finding("peer access", "warn", f"not between {len(apart)} of {pairs} ordered pairs of GPUs",
                "nvidia-smi topo -p2p r shows the pairs; if NCCL hangs: NCCL_P2P_DISABLE=1",
                "their tensors go through the host's memory, which is slower")
    ]  # fmt: skip


def meeting_point(rendezvous: str | None, variables: Mapping[str, str]) -> tuple[str, int]:
    """Return host and port where the processes meet; torchrun's own defaults where nothing is said.

    Raises:
        InputError: It is not HOST:PORT.
    """
    text = rendezvous
    if text is None:
        text = (
            f"{variables.get('MASTER_ADDR', 'localhost')}:{variables.get('MASTER_PORT', '29500')}"
        )
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError("the rendezvous must be HOST:PORT", repr(text), "such as 10.0.0.1:29500")
    return host.strip("[]"), int(port)


def check_port(host: str, port: int, several: bool) -> Finding:
    """Listen at the rendezvous port when it is this machine's, else see whether its host answers."""
    name = "rendezvous"
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        return report(name, "rendezvous", f"'{host}' is no host's name here: {error}")
    address = str(address)
    if several and ipaddress.ip_address(address.split("%")[0]).is_loopback:
        text = f"'{host}' is {address}, which is each node itself"
        return report(name, "rendezvous", text)
    if address in _own_addresses():
        try:
            _listen(address, port)
        except OSError as error:
            return report(name, "port in use", f"port {port} cannot be opened: {error.strerror}")
        return Finding(name, "ok", f"port {port} can be opened on {host}")
    try:
        socket.create_connection((address, port), CONNECT_SECONDS).close()
    except ConnectionRefusedError:
        return Finding(name, "ok", f"{host} answers; nobody listens at port {port} yet")
    except OSError as error:
        return report(name, "rendezvous", f"{host}:{port} does not answer: {error}")
    return Finding(name, "ok", f"{host}:{port} is reached")


def _listen(address: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        one.bind((address, port))
        one.listen(1)


def interfaces() -> dict[str, list[str]]:
    """Return the addresses of the network interfaces that are up, by name."""
    import psutil

    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    inet = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [one.address.split("%")[0] for one in addresses if one.family in inet]
        for name, addresses in psutil.net_if_addrs().items()
        if name in up
    }


def _own_addresses() -> set[str]:
    return {address for addresses in interfaces().values() for address in addresses}


def check_interfaces(
    variables: Mapping[str, str], here: Mapping[str, Sequence[str]], several: bool
) -> list[Finding]:
    """Return the lines on NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME and the host's own name.

    Args:
        variables: The environment.
        here: Interfaces and their addresses.
        several: Whether more than this node takes part.
    """
    findings = []
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wanted = variables.get(variable)
        if wanted and not _named(wanted, here, prefixes=variable.startswith("NCCL")):
            text = f"{variable}={wanted}, and there are only {', '.join(here)}"
            findings.append(report("network", "interface", text))
    if findings or not several:
        names = ", ".join(name for name in here if not name.startswith(_LOCAL)) or "lo alone"
        return findings or [Finding("network", "ok", f"one node; interfaces: {names}")]
    outside = [name for name, where in here.items() if where and not name.startswith(_LOCAL)]
    if not outside:
        return [report("network", "interface", f"no interface to other nodes: {', '.join(here)}")]
    if "GLOO_SOCKET_IFNAME" not in variables and _own_name_is_local():
        text = f"this host's name, {socket.gethostname()}, is a local address in /etc/hosts"
        return [report("network", "interface", text, "warn")]
    if len(outside) > 1 and "NCCL_SOCKET_IFNAME" not in variables:
        text = f"{', '.join(outside)}: which of them reaches the other nodes is not said"
        return [report("network", "interface", text, "warn")]
    return [Finding("network", "ok", f"{variables.get('NCCL_SOCKET_IFNAME', outside[0])}")]


def _named(wanted: str, here: Mapping[str, object], prefixes: bool) -> list[str]:
    """Return the interfaces that a variable names.

    NCCL takes prefixes, `=` before an exact name and `^` before what is left out; gloo exact names.
    """
    without, exact = wanted.startswith("^"), wanted.lstrip("^").startswith("=") or not prefixes
    names = wanted.lstrip("^=").split(",")
    found = [one for one in here if (one in names if exact else one.startswith(tuple(names)))]
    return [one for one in here if one not in found] if without else found


def _own_name_is_local() -> bool:
    """Whether the host's name leads to the loopback, as Debian's 127.0.1.1 does; gloo listens there."""
    with contextlib.suppress(OSError, ValueError):
        return ipaddress.ip_address(socket.gethostbyname(socket.gethostname())).is_loopback
    return False


def check_timeouts(variables: Mapping[str, str]) -> Finding:
    """Return the line on how long processes wait for each other."""
    from torch.distributed.constants import default_pg_nccl_timeout, default_pg_timeout

    minutes = [
        f"{name} {limit.total_seconds() / 60:.0f} minutes"
        for name, limit in (("gloo", default_pg_timeout), ("NCCL", default_pg_nccl_timeout))
        if limit is not None
    ]
    text = f"processes wait for each other: {', '.join(minutes)}"
    if variables.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == "0":
        return Finding("time-outs", "warn", "TORCH_NCCL_ASYNC_ERROR_HANDLING=0: nobody is ended",
                       "unset it", "when one process dies, the others wait for ever")  # fmt: skip
    return Finding("time-outs", "ok", text)


def _read_mark(folder: Path) -> str:
    """Return what the first node wrote into a folder: the same on all nodes if they see one folder.

    Raises:
        InputError: The folder is not there or cannot be written.
    """
    mark = folder / _MARK
    try:
        with contextlib.suppress(FileExistsError), open(mark, "x", encoding="ascii") as file:
            file.write(uuid.uuid4().hex[:12])
        return mark.read_text(encoding="ascii")
    except OSError as error:
        raise InputError(
            f"folder '{folder}' cannot be used: {error.strerror}",
            fix="name one that all nodes mount",
        ) from error


def forget_mark(folder: Path) -> None:
    """Remove what `report_node` wrote into a shared folder."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(folder / _MARK)


def compare(nodes: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Return the lines on what differs between nodes.

    Args:
        nodes: What each reported (`report_node`), by name.
    """
    findings = [
        Finding(f"{name}: {line['name']}", line["status"], line["text"], line["fix"], line["why"])
        for name, node in nodes.items()
        for line in node["findings"]
        if line["status"] != "ok"
    ]
    packages = sorted({package for node in nodes.values() for package in node["versions"]})
    values = {one: {n: node["versions"].get(one) for n, node in nodes.items()} for one in packages}
    values |= {key: {n: node[key] for n, node in nodes.items()} for key in ("cuda", "nccl")}
    unequal = [
        report("versions", "unequal nodes", _apart(key, told))
        for key, told in values.items()
        if len(set(told.values())) > 1
    ]
    findings += unequal or [Finding("versions", "ok", f"equal on {len(nodes)} nodes")]
    for key, told in (
        ("driver", {n: node["driver"] for n, node in nodes.items()}),
        ("GPUs", {n: _counted(node["gpus"]) for n, node in nodes.items()}),
        *(
            (variable, {n: node["variables"].get(variable) for n, node in nodes.items()})
            for variable in VARIABLES
            if variable not in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
        ),
    ):
        if len(set(told.values())) > 1:
            findings.append(report("nodes", "unequal nodes", _apart(key, told), "warn"))
    return findings + _compare_shared(nodes)


def _compare_shared(nodes: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    marks = {name: node["shared"] for name, node in nodes.items()}
    if not any(marks.values()):
        return [Finding("shared folder", "ok", "not asked for (--shared DIR)")]
    if len(set(marks.values())) > 1:
        text = _apart("the nodes see different folders", marks)
        return [report("shared folder", "no shared folder", text)]
    return [Finding("shared folder", "ok", f"one and the same on {len(nodes)} nodes")]


def _counted(names: Sequence[str]) -> str:
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names)) or "none"


def _apart(what: str, told: Mapping[str, Any]) -> str:
    return f"{what}: " + ", ".join(f"{value or 'none'} on {name}" for name, value in told.items())
