"""What a plan is made for: this machine, or a card or an amount of memory that is named."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from whet.config import parse_bytes
from whet.errors import InputError
from whet.plan.policy import Target
from whet.plan.speed import card_speed, card_with, measure_speed

SHARE = 0.9  # of what is free
# The CUDA context with the kernels of torch and cuBLAS, outside of torch's allocator: an assumption, for
# cards that are not here.
CUDA_RESERVE = 640 * 2**20


def target_of(
    device: str | None, memory: str | None, dtype: torch.dtype, named: bool = False
) -> Target:
    """Describe what is planned for.

    Args:
        device: `cpu`, `cuda` or a card's name, such as "RTX 4090"; None is this machine's own.
        memory: Memory to stay within, as people write it; None takes 90% of what is free.
        dtype: Type of the products.
        named: The memory is that of another card, so that a machine without one plans for a card.

    Raises:
        InputError: The amount or the card is not known.
    """
    try:
        budget = parse_bytes(memory) if memory else None
    except ValueError as error:
        raise InputError(f"--vram: {error}") from error
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" or (here == "cpu" and device is None and not named):
        return _this_machine("cpu", budget, dtype)
    if here == "cuda" and device in (None, "cuda"):
        return _this_machine("cuda", budget, dtype)
    return _other_card(device, budget)


def _this_machine(kind: str, budget: int | None, dtype: torch.dtype) -> Target:
    if kind == "cpu":
        speed = measure_speed(dtype, torch.device(kind))
        own = psutil.Process().memory_info().rss
        free = budget or int(SHARE * (free_host_bytes() + own))
        return Target("cpu", "this machine's RAM", free, own, 0, speed)
    free, total = torch.cuda.mem_get_info()
    name = torch.cuda.get_device_name()
    speed = card_speed(name) or measure_speed(dtype, torch.device(kind))
    context = max(0, total - free - torch.cuda.memory_reserved())
    host = int(0.5 * free_host_bytes())
    known = budget or int(SHARE * (free + torch.cuda.memory_allocated()))
    # What is in use already is not in `free`; the context of this process is there by now.
    return Target("cuda", name, known, 0 if context else CUDA_RESERVE, host, speed)


def _other_card(device: str | None, budget: int | None) -> Target:
    if device in (None, "cuda"):
        if budget is None:
            raise InputError(
                "there is no CUDA device here to plan for",
                fix="say how much memory with --vram 12GB",
            )
        device = card_with(budget)
    speed = card_speed(device)
    if speed is None:
        raise InputError(
            f"no data sheet of '{device}' is known",
            fix="use cpu, cuda, or a card such as 'RTX 4090', with --vram 24GB",
        )
    from whet.plan.speed import CARDS

    gib = next(size for key, (_, _, size) in CARDS.items() if key.lower() in device.lower())
    budget = budget or gib * 2**30
    # Nine tenths of the card: a desktop, or another process, has some of it.
    name = f"{budget / 2**30:.4g} GiB, speed as of {speed.name}"
    return Target("cuda", name, int(SHARE * budget), CUDA_RESERVE, 16 * 2**30, speed)


def free_host_bytes() -> int:
    """Return the memory that may still be taken: what the system has, within a container's limit."""
    free = psutil.virtual_memory().available
    limit, used = (
        _number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current")
    )
    return min(free, limit - used) if limit and used else free


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
