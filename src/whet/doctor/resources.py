"""Checks of cores, memory, disk, containers and the Hub."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

from whet.doctor.advice import report
from whet.doctor.finding import Finding
from whet.doctor.machine import Machine

GIB = 2**30
HUB_SECONDS = 3.0
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TOKENIZERS_PARALLELISM")


def check_cpu(machine: Machine) -> Finding:
    """Return the line on cores, threads and the CPU's bfloat16."""
    import torch

    if torch.cpu._is_amx_tile_supported():
        speed = "AMX: bfloat16 products in hardware"
    elif torch.cpu._is_avx512_bf16_supported():
        speed = "AVX-512 bfloat16: products in hardware"
    else:
        speed = "no bfloat16 instructions: float32 is fastest"
    cores, threads = machine.cores, machine.torch.threads
    text = f"{cores} cores, {threads} threads, {speed}"
    if machine.cpu_limit is not None and machine.cpu_limit < cores:
        text += f"; the cgroup lets it use {machine.cpu_limit:.3g} of the cores"
        cores = max(1, round(machine.cpu_limit))
    told = [f"{name}={machine.variables[name]}" for name in _THREADS if name in machine.variables]
    if told:
        text += f"; {' '.join(told)}"
    if threads < cores // 2:
        return Finding("CPU", "warn", text, f"set OMP_NUM_THREADS={cores} or unset it",
                       "training on the CPU uses so many threads, and no more")  # fmt: skip
    if threads > cores:
        return Finding(
            "CPU", "warn", text, f"set OMP_NUM_THREADS={cores}", "more threads only wait"
        )
    return Finding("CPU", "ok", text)


def check_memory(machine: Machine) -> Finding:
    """Return the line on memory that this process may use."""
    available, total = machine.memory_bytes
    limit = machine.memory_limit
    text = f"{available / GIB:.1f} of {total / GIB:.1f} GiB RAM available"
    if limit is not None and limit < total:
        text += f"; the cgroup lets it use {limit / GIB:.1f} GiB"
        if limit < 2 * GIB:
            return report("memory", "memory limit", text)
        if limit < 4 * GIB:
            return report("memory", "memory limit", text, "warn")
    if available < 4 * GIB:
        return Finding("memory", "warn", text, "close other programs", "the quickstart needs 4 GiB")
    return Finding("memory", "ok", text)


def check_disk(folder: Path) -> list[Finding]:
    """Return the lines on room for runs, and for models that are downloaded."""
    places = [("disk", folder, "make room, or set run.dir to another disk", 2)]
    hub = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    while not hub.exists() and hub != hub.parent:
        hub = hub.parent
    if hub.stat().st_dev != folder.stat().st_dev:
        places.append(("disk for models", hub, "make room, or set HF_HOME to another disk", 5))
    findings = []
    for name, place, fix, least in places:
        free = shutil.disk_usage(place).free
        text = f"{free / GIB:.1f} GiB free in {place.absolute()}"
        low = free < least * GIB
        findings.append(Finding(name, "warn" if low else "ok", text, fix if low else None))
    return findings


def check_container(machine: Machine, several: bool) -> list[Finding]:
    """Return the lines on shared memory in a container, and on what gives containers the GPU.

    Args:
        machine: The facts.
        several: Whether several processes are to work together.
    """
    findings = []
    if machine.container and machine.shm_bytes is not None and machine.shm_bytes < GIB:
        text = f"/dev/shm has {machine.shm_bytes / 2**20:.0f} MiB in this container"
        findings.append(report("shared memory", "small shm", text, "fault" if several else "warn"))
    engine = next((tool for tool in ("docker", "podman") if tool in machine.tools), None)
    if engine and machine.cards and not machine.container:
        if "nvidia-ctk" in machine.tools:
            findings.append(Finding("containers", "ok", f"{engine}, with nvidia-container-toolkit"))
        else:
            text = f"{engine} is here, nvidia-container-toolkit is not: containers get no GPU"
            findings.append(report("containers", "container without GPU", text, "warn"))
    return findings


def check_hub(endpoint: str | None = None, token: str | None = None) -> Finding:
    """Ask the Hub who we are, and give up after three seconds.

    Args:
        endpoint: The Hub's address; None: the one that huggingface_hub is set to.
        token: The access token; None: the one that is logged in with, if any.
    """
    import huggingface_hub

    if endpoint is None and huggingface_hub.is_offline_mode():
        return Finding(
            "Hub", "ok", "not asked, as HF_HUB_OFFLINE says; models are taken from the cache"
        )
    endpoint = endpoint or huggingface_hub.constants.ENDPOINT
    token = token or huggingface_hub.get_token()
    told: list[tuple[int, str]] = []

    # A thread, because looking up a name knows no time limit.
    asking = threading.Thread(target=lambda: told.append(_ask(endpoint, token)), daemon=True)
    asking.start()
    asking.join(HUB_SECONDS + 0.5)
    status, words = told[0] if told else (0, f"no answer in {HUB_SECONDS:.0f} seconds")
    offline = "work from a local folder, or set HF_HUB_OFFLINE=1 and use what is in the cache"
    if status == 0:
        return Finding("Hub", "warn", f"cannot be reached: {words}", offline,
                       "models and data sets by name cannot be downloaded")  # fmt: skip
    if status == 401 and token:
        return Finding("Hub", "warn", "reached, but it refuses your token", "hf auth login",
                       "gated models cannot be downloaded")  # fmt: skip
    if status == 200:
        return Finding("Hub", "ok", f"reached, logged in as {words}")
    if token is None:
        return Finding("Hub", "ok", "reached, not logged in (gated models need: hf auth login)")
    return Finding("Hub", "warn", f"reached, but it answers {status}", "try again later")


def _ask(endpoint: str, token: str | None) -> tuple[int, str]:
    """Return the HTTP status and the user's name, or 0 and what went wrong."""
    import json
    import urllib.error
    import urllib.request

    request = urllib.request.Request(f"{endpoint}/api/whoami-v2")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=HUB_SECONDS) as answer:
            who: Any = json.loads(answer.read(2**20))
            return answer.status, str(who.get("name", "?"))
    except urllib.error.HTTPError as error:
        return error.code, error.reason
    except (OSError, ValueError) as error:  # no route, no name, no time, or a proxy's own page
        return 0, str(getattr(error, "reason", error))
