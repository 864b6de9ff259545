"""Counts and times of training: tokens, floating-point operations, and where the time goes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch

Phase = Literal["data", "forward", "backward", "optimizer"]
PHASES: tuple[Phase, ...] = ("data", "forward", "backward", "optimizer")


@dataclass
class Meter:
    """Adds up what the passes did since it was last read.

    On CUDA the phases are timed by events on the stream, so that timing makes nobody wait; they are
    read where the loss is read, which waits anyway.

    Args:
        device: Where the passes run.
    """

    device: torch.device
    counts: Counter[str] = field(default_factory=Counter)
    _seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    _events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def add(self, **counts: float) -> None:
        """Add to counts: tokens, entered_tokens, labelled_tokens, model_flops, hardware_flops."""
        self.counts.update(counts)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Time the body as a part of a phase."""
        if self.device.type != "cuda" or name == "data":  # the data is the host's work
            start = time.perf_counter()
            try:
                yield
            finally:
                self._seconds[name] += time.perf_counter() - start
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        try:
            yield
        finally:
            last.record()
            self._events.append((name, first, last))

    def forget(self) -> None:
        """Start again from nothing."""
        self.counts.clear()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._events.clear()

    def take(self) -> tuple[Counter[str], dict[str, float]]:
        """Return the counts and each phase's seconds since the last call, and start again."""
        for name, first, last in self._events:
            last.synchronize()
            self._seconds[name] += first.elapsed_time(last) / 1000
        counts = Counter(self.counts)
        seconds = dict(self._seconds)
        self.forget()
        return counts, seconds
