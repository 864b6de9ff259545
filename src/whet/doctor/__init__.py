"""Look at this machine, and say what stands in the way of training, each with its fix.

machine.py reads the facts, parse.py what tools print; gpu.py, software.py, resources.py and
distributed.py judge them; advice.py knows what helps, and explain.py says the same about an error at
run time.
"""

from __future__ import annotations

from pathlib import Path

from whet.doctor.explain import explain
from whet.doctor.finding import PACKAGES, Finding, versions

__all__ = ["PACKAGES", "Finding", "examine", "explain", "versions"]


def examine(folder: str | Path = ".") -> list[Finding]:
    """Look at system, packages, devices, memory, disk, threads and the Hub.

    Args:
        folder: Where runs would be written.
    """
    from whet.doctor import gpu, resources, software
    from whet.doctor.machine import look

    machine = look()
    several = max(len(machine.cards), len(machine.torch.cards)) > 1
    return [
        *software.check_system(machine),
        *software.check_packages(),
        *gpu.check_gpu(machine),
        gpu.check_nccl(machine, needed=several),
        software.check_toolkit(machine),
        software.check_triton(machine),
        software.check_four_bit(machine),
        software.check_flash_attention(machine),
        resources.check_cpu(machine),
        resources.check_memory(machine),
        *resources.check_disk(Path(folder)),
        *resources.check_container(machine, several),
        resources.check_hub(),
        software.check_quickstart_model(),
    ]
