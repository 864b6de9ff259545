"""What a run tells while it runs: metrics.jsonl, progress for the front end, and a clean stop."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from whet.errors import WhetError
from whet.runs import RunFolder, writing

if TYPE_CHECKING:
    from whet.train.trainer import WhetTrainer


@dataclass(frozen=True, slots=True)
class Progress:
    """One log step, as the front ends show it.

    Args:
        step: Optimizer steps done.
        num_steps: Optimizer steps in all.
        loss: Mean loss over the labelled tokens since the last log step.
        learning_rate: Of the next step.
        grad_norm: Before clipping.
        tokens_per_second: Tokens that entered the model, padding left out.
        memory_bytes: Peak on the GPU, or resident memory of the process on the CPU.
        seconds: Since training began.
        eta_seconds: Until training ends, at the mean pace so far.
    """

    step: int
    num_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    memory_bytes: int
    seconds: float
    eta_seconds: float


class Metrics(TrainerCallback):
    """Appends each log step to metrics.jsonl as it happens, and hands it to the front end.

    Args:
        run: The run's folder.
        show: Called with each Progress; may be None.
    """

    def __init__(self, run: RunFolder, show: Callable[[Progress], None] | None) -> None:
        self.run, self.show = run, show
        self.trainer: WhetTrainer | None = None
        self._start = self._last = 0.0
        self._first_step = self._tokens = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clocks."""
        assert self.trainer is not None
        self._start = self._last = time.perf_counter()
        self._first_step, self._tokens = state.global_step, self.trainer.tokens_seen

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Write one line."""
        logs = logs or {}
        if "eval_loss" in logs:
            self._write({"step": state.global_step, "heldout_loss": logs["eval_loss"]})
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise WhetError(
                f"the loss is no longer a number at step {state.global_step}",
                logs["loss"],
                "lower train.learning_rate or raise train.warmup_steps, and start anew",
            )
        assert self.trainer is not None
        now, tokens = time.perf_counter(), self.trainer.tokens_seen
        done = state.global_step - self._first_step
        progress = Progress(
            step=state.global_step,
            num_steps=state.max_steps,
            loss=logs["loss"],
            learning_rate=logs["learning_rate"],
            grad_norm=logs.get("grad_norm", 0.0),
            tokens_per_second=(tokens - self._tokens) / (now - self._last),
            memory_bytes=peak_memory_bytes(),
            seconds=now - self._start,
            eta_seconds=(now - self._start) / done * (state.max_steps - state.global_step),
        )
        self._last, self._tokens = now, tokens
        self._write(
            {
                "step": progress.step,
                "epoch": logs["epoch"],
                "loss": progress.loss,
                "learning_rate": progress.learning_rate,
                "grad_norm": progress.grad_norm,
                "tokens_per_second": progress.tokens_per_second,
                "tokens_seen": tokens,
                "memory_bytes": progress.memory_bytes,
                "seconds": progress.seconds,
            }
        )
        if self.show:
            self.show(progress)

    def _write(self, line: dict[str, Any]) -> None:
        with (
            writing(self.run.metrics_file),
            open(self.run.metrics_file, "a", encoding="utf-8") as f,
        ):
            f.write(json.dumps(line) + "\n")


class StopAtSignal(TrainerCallback):
    """Ends training after the current step, with a checkpoint, at Ctrl-C or SIGTERM."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save and stop, when asked to."""
        if self.asked:
            control.should_save = True
            control.should_training_stop = True

    @contextmanager
    def listening(self, tell: Callable[[str], None]) -> Iterator[None]:
        """Take the first signal as a wish to stop; a second one acts at once, as usual.

        Args:
            tell: Called with a sentence at the first signal.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # a notebook or server thread: signals are not ours to take
            return

        def ask(number: int, frame: FrameType | None) -> None:
            self.asked = True
            for name, handler in before.items():
                signal.signal(name, handler)
            tell("stopping after this step, with a checkpoint (once more to stop at once)")

        before = {name: signal.signal(name, ask) for name in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)


def peak_memory_bytes() -> int:
    """Return the peak of the GPU's allocator, or the process's peak resident memory on a CPU."""
    import resource
    import sys

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
