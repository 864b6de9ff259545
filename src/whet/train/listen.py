"""What a front end hears of a run."""

from __future__ import annotations

import logging
from typing import Protocol

from whet.train.callbacks import Progress

logger = logging.getLogger(__name__)


class Listener(Protocol):
    """What a front end hears of a run."""

    def stage(self, text: str) -> None:
        """A part of the work begins that takes a while."""

    def note(self, text: str) -> None:
        """Something a person should know."""

    def progress(self, progress: Progress) -> None:
        """Training went one log step further."""


class LogListener:
    """The Listener of a run without a front end: everything goes to `logging`."""

    _plain, _loud = logging.INFO, logging.WARNING

    def stage(self, text: str) -> None:
        """Log a stage."""
        logger.log(self._plain, "%s", text)

    def note(self, text: str) -> None:
        """Log a note."""
        logger.log(self._loud, "%s", text)

    def progress(self, progress: Progress) -> None:
        """Log a step."""
        done = f"step {progress.step}/{progress.num_steps}"
        logger.log(self._plain, "%s loss %.4f", done, progress.loss)


class QuietListener(LogListener):
    """Of several processes one is heard; the others log as debugging."""

    _plain = _loud = logging.DEBUG
