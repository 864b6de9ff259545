"""What the tools and files of a machine print, as values: pure functions on text.

The layouts are those of nvidia-smi from driver 384 to 610, of the kernel's /proc and cgroup files, and of
mokutil, modinfo, nvcc and ldconfig. What a text does not say becomes None or an empty list.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

MIB = 2**20
# nvidia-smi's own words when it cannot do its work, and what they are called here.
_TROUBLES: tuple[tuple[str, str], ...] = (
    ("driver/library version mismatch", "mismatch"),
    ("couldn't communicate with the nvidia driver", "no driver"),
    ("driver is not loaded", "no driver"),
    ("no devices were found", "no devices"),
    ("gpu access blocked by the operating system", "blocked"),
    ("insufficient permissions", "permissions"),
    ("gpu is lost", "lost"),
    ("unable to determine the device handle", "lost"),
    ("failed to initialize nvml", "unknown"),
)


@dataclass(frozen=True, slots=True)
class Process:
    """A process that holds a GPU: whose number, what it is, and how much memory if that is told."""

    gpu: int
    pid: int
    kind: str
    name: str
    used_bytes: int | None


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU as nvidia-smi shows it; what it does not show is None."""

    index: int
    name: str
    total_bytes: int | None
    used_bytes: int | None
    capability: tuple[int, int] | None = None
    mig: bool = False
    utilization: float | None = None
    temperature_c: float | None = None
    power_watts: float | None = None


@dataclass(frozen=True, slots=True)
class MigDevice:
    """A part of a GPU that MIG has cut off."""

    gpu: int
    index: int
    used_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Smi:
    """What `nvidia-smi` printed.

    Args:
        driver: Version of the kernel's driver.
        cuda: The highest CUDA that the driver runs; None before driver 410, which does not say.
        cards: The GPUs.
        migs: Their parts, where MIG is on.
        processes: Who holds them, as far as is seen from here.
        trouble: Why there is no table: mismatch, no driver, no devices, blocked, permissions, lost,
            unknown; or None.
    """

    driver: str | None
    cuda: tuple[int, int] | None
    cards: tuple[Card, ...]
    migs: tuple[MigDevice, ...]
    processes: tuple[Process, ...]
    trouble: str | None


def parse_smi(text: str) -> Smi:
    """Read nvidia-smi's table, its `-q` report (driver and CUDA only), or its words of failure."""
    driver = re.search(r"(?:Driver|KMD) Version\s*:\s*(\d+(?:\.\d+)+)", text)
    cuda = re.search(r"CUDA (?:UMD )?Version\s*:\s*(\d+)\.(\d+)", text)
    words = text.lower()
    trouble = next((name for sign, name in _TROUBLES if sign in words), None)
    return Smi(
        driver.group(1) if driver else None,
        (int(cuda.group(1)), int(cuda.group(2))) if cuda else None,
        tuple(_table_cards(text)),
        tuple(_table_migs(text)),
        tuple(_table_processes(text)),
        trouble,
    )


_NAME_ROW = re.compile(
    r"^\|\s+(\d+)\s+(\S.*?)\s+(?:On|Off|N/A|WDDM|TCC|MCDM|ERR!)?\s*\|\s*[0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:"
)
_USE_ROW = re.compile(r"\|\s*(\d+)MiB\s*/\s*(\d+)MiB\s*\|\s*(?:(\d+)%|N/A|ERR!)")
_HEAT_AND_POWER = re.compile(r"\s(\d+)C\s.*?(?:(\d+)W|N/A|ERR!|Off)\s*/")


def _table_cards(text: str) -> list[Card]:
    cards: list[Card] = []
    open_row: tuple[int, str] | None = None
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("| MIG devices"):
            break
        if named := _NAME_ROW.match(line):
            open_row = int(named.group(1)), named.group(2).strip()
        elif open_row and (used := _USE_ROW.search(line)):
            heat = _HEAT_AND_POWER.search(line)
            below = lines[number + 1] if number + 1 < len(lines) else ""
            cards.append(
                Card(
                    *open_row,
                    total_bytes=int(used.group(2)) * MIB,
                    used_bytes=int(used.group(1)) * MIB,
                    mig=below.rstrip(" |").endswith("Enabled"),
                    utilization=int(used.group(3)) / 100 if used.group(3) else None,
                    temperature_c=float(heat.group(1)) if heat else None,
                    power_watts=float(heat.group(2)) if heat and heat.group(2) else None,
                )
            )
            open_row = None
    return cards


def _table_migs(text: str) -> list[MigDevice]:
    part = re.search(r"\| MIG devices:.*?(?=\| Processes:|\Z)", text, re.DOTALL)
    row = re.compile(
        r"^\|\s+(\d+)\s+\d+\s+\d+\s+(\d+)\s+\|\s*(\d+)MiB\s*/\s*(\d+)MiB", re.MULTILINE
    )
    return [
        MigDevice(int(gpu), int(index), int(used) * MIB, int(total) * MIB)
        for gpu, index, used, total in row.findall(part.group() if part else "")
    ]


def _table_processes(text: str) -> list[Process]:
    part = text.partition("| Processes:")[2]
    row = re.compile(
        r"^\|\s+(\d+)\s+(?:(?:N/A|\d+)\s+(?:N/A|\d+)\s+)?(\d+)\s+((?:M\+)?C(?:\+G)?|G)\s+(.*?)\s+(\d+MiB|N/A)\s*\|",
        re.MULTILINE,
    )
    return [
        Process(int(gpu), int(pid), kind, name, _mib(used))
        for gpu, pid, kind, name, used in row.findall(part)
    ]


def _mib(text: str) -> int | None:
    number = text.removesuffix("MiB")
    return int(number) * MIB if number.isdigit() else None


# `compute_cap` came with driver 465; an older nvidia-smi refuses the whole query.
SMI_QUERY = (
    "index,name,memory.total,memory.used,compute_cap,mig.mode.current,utilization.gpu,"
    "temperature.gpu,power.draw"
)
SMI_QUERY_OLD = "index,name,memory.total,memory.used,utilization.gpu,temperature.gpu,power.draw"


def parse_smi_csv(text: str) -> list[Card]:
    """Read `nvidia-smi --query-gpu=... --format=csv`, with its line of names."""
    rows = list(csv.reader(text.splitlines(), skipinitialspace=True))
    if not rows or "name" not in rows[0] or "index" not in rows[0]:
        return []
    names = [name.split(" [")[0] for name in rows[0]]
    cards = []
    for row in rows[1:]:
        if len(row) != len(names):
            continue
        told = dict(zip(names, row, strict=True))
        total, used = (_leading(told.get(f"memory.{key}")) for key in ("total", "used"))
        utilization = _leading(told.get("utilization.gpu"))
        cards.append(
            Card(
                int(told["index"]),
                told["name"],
                total_bytes=None if total is None else int(total) * MIB,
                used_bytes=None if used is None else int(used) * MIB,
                capability=parse_capability(told.get("compute_cap", "")),
                mig=told.get("mig.mode.current") == "Enabled",
                utilization=None if utilization is None else utilization / 100,
                temperature_c=_leading(told.get("temperature.gpu")),
                power_watts=_leading(told.get("power.draw")),
            )
        )
    return cards


def _leading(text: str | None) -> float | None:
    """Return the number a cell begins with; `[N/A]` and its like begin with none."""
    found = re.match(r"\d+(\.\d+)?", text or "")
    return float(found.group()) if found else None


def parse_capability(text: str) -> tuple[int, int] | None:
    """Read a compute capability such as `8.9`."""
    found = re.fullmatch(r"(\d+)\.(\d+)", text.strip())
    return (int(found.group(1)), int(found.group(2))) if found else None


def parse_version(text: str) -> tuple[int, ...]:
    """Read the leading numbers of a version: `550.54.14` becomes (550, 54, 14)."""
    found = re.match(r"\d+(?:\.\d+)*", text.strip())
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def parse_kernel_driver(text: str) -> tuple[str, bool] | None:
    """Read /proc/driver/nvidia/version.

    Returns:
        The version of the loaded module and whether it is the open one, or None.
    """
    found = re.search(r"NVRM version:.*?Kernel Module(?: for \S+)?\s+(\d+(?:\.\d+)+)", text)
    return (found.group(1), "Open Kernel Module" in text) if found else None


def parse_secure_boot(text: str) -> bool | None:
    """Read `mokutil --sb-state`: whether modules must be signed, or None where there is no EFI."""
    words = text.lower()
    if "validation is disabled" in words or "secureboot disabled" in words:
        return False
    return True if "secureboot enabled" in words else None


def parse_modinfo(text: str) -> tuple[str | None, bool]:
    """Read `modinfo nvidia`.

    Returns:
        The module's version (None when there is no module), and whether it is signed.
    """
    fields = dict(re.findall(r"^(\w+):[ \t]*(.*)$", text, re.MULTILINE))
    return fields.get("version"), bool(fields.get("signer") or fields.get("sig_id"))


def parse_nvcc(text: str) -> str | None:
    """Read the release of `nvcc --version`, such as 12.4."""
    found = re.search(r"release (\d+\.\d+)", text)
    return found.group(1) if found else None


def parse_ldconfig(text: str) -> dict[str, str]:
    """Read `ldconfig -p`: library names such as libcudnn.so.9 and the path of the first of each."""
    found: dict[str, str] = {}
    for name, path in re.findall(r"^\s+(\S+) \(.*?\) => (\S+)", text, re.MULTILINE):
        found.setdefault(name, path)
    return found


def cgroup_files(proc_self_cgroup: str) -> dict[Literal["memory", "cpu"], list[str]]:
    """Return the files that may limit this process, below /sys/fs/cgroup, the closest group first.

    A group's parents limit it too. In a container the paths of version 1 are the host's, and only the
    mount's root is there; files that do not exist are simply not read.

    Args:
        proc_self_cgroup: /proc/self/cgroup; version 2 is the line `0::/path`.
    """
    found: dict[Literal["memory", "cpu"], list[str]] = {"memory": [], "cpu": []}
    for line in proc_self_cgroup.splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            for folder in _and_parents(path):
                found["memory"].append(f"{folder}/memory.max")
                found["cpu"].append(f"{folder}/cpu.max")
        for name in names.split(","):
            for folder in _and_parents(path):
                if name == "memory":
                    found["memory"].append(f"/memory{folder}/memory.limit_in_bytes")
                elif name == "cpu":
                    found["cpu"].append(f"/{names}{folder}/cpu.cfs_quota_us")
                    found["cpu"].append(f"/cpu{folder}/cpu.cfs_quota_us")
    return found


def _and_parents(path: str) -> list[str]:
    parts = [part for part in path.split("/") if part]
    return ["".join(f"/{part}" for part in parts[:size]) for size in range(len(parts), -1, -1)]


def parse_memory_limits(texts: Mapping[str, str]) -> int | None:
    """Return the lowest memory limit among the contents of `cgroup_files`, in bytes, or None.

    Version 1 writes "no limit" as the largest multiple of a page that fits 63 bits.
    """
    limits = [int(text) for text in texts.values() if text.strip().isdigit()]
    return min((limit for limit in limits if limit < 2**60), default=None)


def parse_cpu_limits(texts: Mapping[str, str]) -> float | None:
    """Return the lowest limit on cores, or None.

    Args:
        texts: Contents by file: `cpu.max` (quota and period), or `cpu.cfs_quota_us`, whose period is
            the kernel's 100 ms unless a line of it follows.
    """
    limits = []
    for text in texts.values():
        quota, period = [*text.split(), "100000"][:2] if text.split() else ("max", "1")
        if quota.isdigit() and int(period):
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def parse_container(proc_1_cgroup: str, marks: Mapping[str, bool]) -> str | None:
    """Name the container this is, or None.

    Args:
        proc_1_cgroup: /proc/1/cgroup.
        marks: Whether each of the engines' marker files is there, by the engine's name.
    """
    for name, here in marks.items():
        if here:
            return name
    found = re.search(r"docker|kubepods|containerd|libpod|lxc", proc_1_cgroup)
    return found.group() if found else None
