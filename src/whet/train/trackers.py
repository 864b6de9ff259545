"""Experiment trackers, through transformers' callbacks: what must be installed, and where they write.

metrics.jsonl is written whatever is chosen here.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from whet.errors import InputError, WhetError, first_line
from whet.runs import RunFolder

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
    run: RunFolder,
    names: Sequence[str],
    callbacks: list[TrainerCallback],
    tell: Callable[[str], None],
) -> Iterator[None]:
    """Have the trackers write into the run's folder while the body trains.

    Args:
        run: The run's folder; its name is the trackers' name for it.
        names: As in `train.trackers`.
        callbacks: The trainer's callbacks; those of the trackers are replaced by guarded ones.
        tell: Called with a sentence when a tracker fails on the way.

    Raises:
        WhetError: A tracker cannot be started.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    kinds = {INTEGRATION_TO_CALLBACK[name]: name for name in names}
    for number, callback in enumerate(callbacks):
        if type(callback) not in kinds:
            continue
        name = kinds[type(callback)]
        if name == "tensorboard":
            board: Any = callback
            board.logging_dir = board.logging_dir or str(run.path / "tensorboard")
        callbacks[number] = GuardedTracker(callback, name, tell)
    started = _start_wandb(run) if "wandb" in names else None
    try:
        yield
    finally:
        if started is not None:
            started.finish()


class GuardedTracker(TrainerCallback):
    """A tracker whose failure does not end a run that has begun: hours of training are worth more.

    A tracker that cannot be started does end it, for nothing is lost then.

    Args:
        tracker: transformers' callback of it.
        name: Its name in `train.trackers`.
        tell: Called with a sentence when it fails; it hears nothing more from then on.
    """

    def __init__(self, tracker: Any, name: str, tell: Callable[[str], None]) -> None:
        self._tracker, self._name, self._tell, self._failed = tracker, name, tell, False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the tracker."""
        try:
            self._tracker.on_train_begin(*args, **kwargs)
        except Exception as error:  # each tracker has its own, with no common class
            raise _not_started(self._name, error) from error

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Tell it what is logged."""
        self._pass_on("on_log", *args, **kwargs)

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Tell it of a checkpoint."""
        self._pass_on("on_save", *args, **kwargs)

    def on_predict(self, *args: Any, **kwargs: Any) -> None:
        """Tell it of a prediction."""
        self._pass_on("on_predict", *args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """End it."""
        self._pass_on("on_train_end", *args, **kwargs)

    def _pass_on(self, event: str, *args: Any, **kwargs: Any) -> None:
        if self._failed:
            return
        try:
            getattr(self._tracker, event)(*args, **kwargs)
        except Exception as error:  # as above
            self._failed = True
            self._tell(
                f"{self._name} failed and is told nothing more; metrics.jsonl is complete: "
                f"{first_line(error)}"
            )


def _not_started(name: str, error: Exception) -> WhetError:
    return WhetError(
        f"tracker '{name}' cannot be started: {first_line(error)}",
        fix="correct its settings, or leave it out of train.trackers",
    )


def _start_wandb(run: RunFolder) -> Any:
    """Start a run of wandb in the run's folder; None when the caller's program has one already."""
    import wandb  # type: ignore[import-not-found]

    if wandb.run is not None:
        return None
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    try:
        return wandb.init(project=project, name=run.path.name, dir=str(run.path))
    except wandb.Error as error:
        raise _not_started("wandb", error) from error
