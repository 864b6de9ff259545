"""What there is on this machine, read once: the checks then work on these facts alone.

Everything is asked with a time limit, and what cannot be read is simply not known.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from whet.doctor.finding import version_of
from whet.doctor.parse import (
    SMI_QUERY,
    SMI_QUERY_OLD,
    Card,
    Smi,
    cgroup_files,
    parse_container,
    parse_cpu_limits,
    parse_kernel_driver,
    parse_ldconfig,
    parse_memory_limits,
    parse_modinfo,
    parse_nvcc,
    parse_secure_boot,
    parse_smi,
    parse_smi_csv,
)

TOOL_SECONDS = 10  # nvidia-smi takes seconds where the driver must first be started


@dataclass(frozen=True, slots=True)
class Visible:
    """A GPU as torch sees it."""

    name: str
    capability: tuple[int, int]
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Torch:
    """What the installed torch was built for, and whether its CUDA starts.

    Args:
        version: With its local part, such as 2.13.0+cu130.
        cuda: CUDA it was built with, or None.
        hip: ROCm it was built with, or None.
        available: Whether CUDA starts.
        error: What torch says when CUDA does not start, though it was built with it.
        archs: What its kernels were compiled for, such as sm_80; empty unless CUDA starts.
        nccl: Version of NCCL, or None.
        cudnn: Version of cuDNN as torch writes it, or None.
        gloo: Whether it has gloo.
        cards: The GPUs it sees.
        threads: How many threads it computes with.
    """

    version: str
    cuda: str | None = None
    hip: str | None = None
    available: bool = False
    error: str = ""
    archs: tuple[str, ...] = ()
    nccl: str | None = None
    cudnn: int | None = None
    gloo: bool = True
    cards: tuple[Visible, ...] = ()
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Machine:
    """The facts that the checks work on.

    Args:
        torch: The installed torch.
        system: Linux, Windows or Darwin.
        release: Of the kernel.
        distribution: Its name, or "".
        container: The engine's name inside a container, or None.
        smi: What nvidia-smi printed; None: there is no nvidia-smi.
        cards: The GPUs by nvidia-smi's query, or by its table where the query is not known.
        on_bus: Whether an NVIDIA display device is on the PCI bus; None: cannot be told.
        kernel_driver: Version of the loaded module and whether it is the open one, or None.
        nouveau: Whether the kernel drives the card with nouveau.
        secure_boot: Whether modules must be signed, or None.
        module: The installed module's version, or None, and whether it is signed.
        device_files: Whether the GPU's device files are there.
        libraries: The loader's libraries and their paths.
        nvcc: Release of the CUDA toolkit, or None.
        tools: Programs on the PATH: docker, podman, nvidia-ctk, gcc.
        cores: Cores that this process may use.
        cpu_limit: Cores that its cgroup lets it use, or None.
        memory_bytes: Available and total.
        memory_limit: Bytes that its cgroup lets it use, or None.
        shm_bytes: Size of /dev/shm, or None.
        variables: The environment.
    """

    torch: Torch
    system: str = "Linux"
    release: str = ""
    distribution: str = ""
    container: str | None = None
    smi: Smi | None = None
    cards: tuple[Card, ...] = ()
    on_bus: bool | None = None
    kernel_driver: tuple[str, bool] | None = None
    nouveau: bool = False
    secure_boot: bool | None = None
    module: tuple[str | None, bool] = (None, False)
    device_files: bool = False
    libraries: Mapping[str, str] = field(default_factory=dict)
    nvcc: str | None = None
    tools: frozenset[str] = frozenset()
    cores: int = 1
    cpu_limit: float | None = None
    memory_bytes: tuple[int, int] = (0, 0)
    memory_limit: int | None = None
    shm_bytes: int | None = None
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def wsl(self) -> bool:
        """Whether this is Linux inside Windows."""
        return "microsoft" in self.release.lower()

    @property
    def has_gpu(self) -> bool:
        """Whether anything shows an NVIDIA GPU, be it usable or not."""
        seen = self.cards or self.torch.cards or self.kernel_driver or self.device_files
        return bool(seen or self.on_bus)


def look() -> Machine:
    """Read this machine."""
    import psutil

    memory = psutil.virtual_memory()
    table = output("nvidia-smi")
    cgroup = cgroup_files(text_of("/proc/self/cgroup"))
    limits = {
        kind: {name: text_of(f"/sys/fs/cgroup{name}") for name in names}
        for kind, names in cgroup.items()
    }
    smi = None if table is None else parse_smi(table)
    return Machine(
        torch=look_at_torch(),
        system=platform.system(),
        release=platform.release(),
        distribution=_distribution(),
        container=_container(),
        smi=smi,
        cards=tuple(query_cards()) or (smi.cards if smi else ()),
        on_bus=_on_bus(),
        kernel_driver=parse_kernel_driver(text_of("/proc/driver/nvidia/version")),
        nouveau=Path("/sys/module/nouveau").is_dir(),
        secure_boot=parse_secure_boot(output("mokutil", "--sb-state") or ""),
        module=parse_modinfo(output("modinfo", "nvidia") or ""),
        device_files=any(Path(name).exists() for name in ("/dev/nvidia0", "/dev/dxg")),
        libraries=parse_ldconfig(output("ldconfig", "-p") or ""),
        nvcc=parse_nvcc(output("nvcc", "--version") or ""),
        tools=frozenset(
            tool for tool in ("docker", "podman", "nvidia-ctk", "gcc", "cc") if shutil.which(tool)
        ),
        cores=usable_cores(),
        cpu_limit=parse_cpu_limits(limits["cpu"]),
        memory_bytes=(memory.available, memory.total),
        memory_limit=parse_memory_limits(limits["memory"]),
        shm_bytes=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
        variables=dict(os.environ),
    )


def look_at_torch() -> Torch:
    """Read the installed torch; its CUDA is started, as training would."""
    import torch
    import torch.distributed as dist
    from torch.cuda import nccl as torch_nccl

    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    has_nccl = dist.is_available() and dist.is_nccl_available()
    nccl = ".".join(map(str, torch_nccl.version())) if has_nccl else None
    available, error, cards = torch.cuda.is_available(), "", []
    if torch.version.cuda and not available:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as failure:
            error = str(failure).split("\n")[0]
    for index in range(torch.cuda.device_count() if available else 0):
        card = torch.cuda.get_device_properties(index)
        try:
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError:  # in exclusive mode, while another process is in it
            free, total = 0, card.total_memory
        cards.append(Visible(card.name, (card.major, card.minor), free, total))
    return Torch(
        version=version_of("torch") or torch.__version__,
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        available=available,
        error=error,
        archs=tuple(torch.cuda.get_arch_list()),
        nccl=nccl,
        cudnn=cudnn,
        gloo=dist.is_available() and dist.is_gloo_available(),
        cards=tuple(cards),
        threads=torch.get_num_threads(),
    )


def output(*command: str) -> str | None:
    """Return what a program prints, on either stream, or None when it is not there or hangs."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/sbin", "/usr/sbin"])
    program = shutil.which(command[0], path=path)
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *command[1:]], capture_output=True, text=True, errors="replace",
            timeout=TOOL_SECONDS, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout + done.stderr


def text_of(path: str | Path) -> str:
    """Return a file's text, or "" where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


def query_cards() -> list[Card]:
    """Ask nvidia-smi for the GPUs; none where it is not there or fails."""
    for fields in (SMI_QUERY, SMI_QUERY_OLD):
        told = output("nvidia-smi", f"--query-gpu={fields}", "--format=csv")
        if told is None:
            return []
        if cards := parse_smi_csv(told):
            return cards
    return []


def _distribution() -> str:
    if sys.platform != "linux":
        return ""
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        return ""


def _container() -> str | None:
    marks = {
        "docker": Path("/.dockerenv").exists(),
        "podman": Path("/run/.containerenv").exists(),
        "Kubernetes": "KUBERNETES_SERVICE_HOST" in os.environ,
        "apptainer": "APPTAINER_CONTAINER" in os.environ,
    }
    return parse_container(text_of("/proc/1/cgroup"), marks)


def _on_bus() -> bool | None:
    """Look for NVIDIA's vendor number among display devices (class 0x03) on the PCI bus."""
    bus = Path("/sys/bus/pci/devices")
    if not bus.is_dir():
        return None
    return any(
        text_of(device / "vendor").strip() == "0x10de"
        and text_of(device / "class").startswith("0x03")
        for device in bus.iterdir()
    )
