"""Experiment trackers, through transformers' callbacks: what must be installed, and where they write.

metrics.jsonl is written whatever is chosen here.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from whet.errors import InputError
from whet.runs import RunFolder

if TYPE_CHECKING:
    from transformers import TrainerCallback

PROJECT = "whet"


def check_trackers(names: Sequence[str]) -> None:
    """Check that what was asked for is installed.

    Args:
        names: As in `train.trackers`, which are the packages' names too.

    Raises:
        InputError: A package is missing.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"train.trackers needs {', '.join(missing)}, which is not installed",
            fix=f"pip install 'whet[{','.join(missing)}]'",
        )


@contextmanager
def tracking(
    run: RunFolder, names: Sequence[str], callbacks: Sequence[TrainerCallback]
) -> Iterator[None]:
    """Have the trackers write into the run's folder while the body trains.

    Args:
        run: The run's folder; its name is the trackers' name for it.
        names: As in `train.trackers`.
        callbacks: The trainer's callbacks, some of which are the trackers'.
    """
    for callback in callbacks:
        if type(callback).__name__ == "TensorBoardCallback":
            board: Any = callback
            board.logging_dir = board.logging_dir or str(run.path / "tensorboard")
    started = _start_wandb(run) if "wandb" in names else None
    try:
        yield
    finally:
        if started is not None:
            started.finish()


def _start_wandb(run: RunFolder) -> Any:
    """Start a run of wandb in the run's folder; None when the caller's program has one already."""
    import wandb  # type: ignore[import-not-found]

    if wandb.run is not None:
        return None
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    return wandb.init(project=project, name=run.path.name, dir=str(run.path))
