"""Random states: each process that has rows of its own has a stream of its own, kept in checkpoints."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.trainer_pt_utils import safe_globals

if TYPE_CHECKING:
    from whet.train.trainer import WhetTrainer


def random_file(share: int) -> str:
    """Return the name of a process's random state; the first's is what a single one would have."""
    return f"rng_state_{share}.pth" if share else "rng_state.pth"


def random_state() -> dict[str, Any]:
    """Return the state of this process's random generators, as transformers keeps it."""
    found = {
        "python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state(),
    }  # fmt: skip
    return {**found, "cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else found


def seed_share(trainer: WhetTrainer, step: int) -> None:
    """Give the processes random streams of their own; rank 0's is that of a single process.

    Args:
        trainer: Its processes that compute one replica together stay in step.
        step: Steps done, so that a stream is not begun anew at a resume.
    """
    if trainer.world.share:
        torch.manual_seed(trainer.args.seed * 1_000_003 + step * 1009 + trainer.world.share)


def load_random_state(trainer: WhetTrainer, folder: Path) -> None:
    """Put back a process's random state, or begin a new stream where there was no such process.

    Args:
        trainer: Between two steps.
        folder: A checkpoint that was found whole.
    """
    file = folder / random_file(trainer.world.share)
    if not file.is_file():
        seed_share(trainer, int(folder.name.removeprefix("step-")))
        return
    with safe_globals():  # of numpy's state
        state = torch.load(file, map_location="cpu", weights_only=True)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        kept = state["cuda"]
        torch.cuda.set_rng_state(kept[0] if isinstance(kept, list) else kept)
