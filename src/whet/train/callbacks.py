"""What a run tells while it runs: metrics.jsonl, progress for the front end, and a clean stop."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from whet.errors import WhetError
from whet.runs import RunFolder, writing
from whet.sensors import Sensors, training_gpus
from whet.train.world import World

if TYPE_CHECKING:
    from whet.plan.plan import Plan
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
        labelled_per_second: Tokens that were learned.
        entered_per_second: Tokens that entered the model, padding included.
        mfu: Operations of the model over those the device could do (arXiv 2204.02311): by its data sheet,
            or on a CPU at the rate measured on a large product.
        hfu: The same with what is computed again in the backward pass.
        memory_bytes: Peak on the GPU, or resident memory of the process on the CPU.
        planned_bytes: The peak that was planned.
        seconds_in: Share of the time in data, forward, backward and optimizer, in seconds a step.
        seconds: Since training began.
        eta_seconds: Until training ends, at the mean pace so far.
        judged: What else tells how it goes, by the word to show: the mean `reward` (grpo), the share of
            pairs whose chosen answer is `preferred` (dpo, orpo, reward).
    """

    step: int
    num_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    labelled_per_second: float
    entered_per_second: float
    mfu: float
    hfu: float
    memory_bytes: int
    planned_bytes: int
    seconds_in: dict[str, float]
    seconds: float
    eta_seconds: float
    judged: dict[str, float] = field(default_factory=dict)


# What whet's and trl's trainers log of it, and the word for it.
_JUDGED = {"reward": "reward", "rewards/accuracies": "preferred", "accuracy": "preferred"}


def judged_in(logs: Mapping[str, Any]) -> dict[str, float]:
    """Return what a line of logs tells besides the loss, by the word to show."""
    return {word: float(logs[key]) for key, word in _JUDGED.items() if key in logs}


class Metrics(TrainerCallback):
    """Appends each log step to metrics.jsonl as it happens, and hands it to the front end.

    Args:
        run: The run's folder.
        show: Called with each Progress; may be None.
        plan: Tells the planned peak and what the device can do.
        world: The processes; rank 0 writes what they do together, the others what they do.
    """

    def __init__(
        self,
        run: RunFolder,
        show: Callable[[Progress], None] | None,
        plan: Plan,
        world: World | None = None,
    ) -> None:
        self.run, self.show, self.plan = run, show, plan
        self.world = world or World()
        self.trainer: WhetTrainer | None = None
        self.sensors: Sensors | None = None
        self._start = self._last = 0.0
        self._first_step = self._last_step = 0
        self._stepping = ExitStack()
        self.peak_before = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clocks."""
        assert self.trainer is not None
        self._start = self._last = time.perf_counter()
        self._first_step = self._last_step = state.global_step
        self.trainer.meter.forget()
        self.sensors = Sensors(training_gpus())
        self.peak_before = forget_peak_memory()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clock of the optimizer."""
        assert self.trainer is not None
        self._stepping.enter_context(self.trainer.meter.phase("optimizer"))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop the clock of the optimizer."""
        self._stepping.close()

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
            found = {k.replace("eval_", "heldout_", 1): v for k, v in logs.items() if k != "epoch"}
            self.write({"step": state.global_step, **found})
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise WhetError(
                f"the loss is no longer a number at step {state.global_step}",
                logs["loss"],
                "lower train.learning_rate or raise train.warmup_steps, and start anew",
            )
        progress = self._progress(state, logs)
        self.write(
            {
                "step": progress.step,
                "epoch": logs["epoch"],
                "loss": progress.loss,
                "learning_rate": progress.learning_rate,
                "grad_norm": progress.grad_norm,
                "tokens_per_second": progress.tokens_per_second,
                "labelled_per_second": progress.labelled_per_second,
                "entered_per_second": progress.entered_per_second,
                "mfu": progress.mfu,
                "hfu": progress.hfu,
                "tokens_seen": self.trainer.tokens_seen,  # type: ignore[union-attr]
                "memory_bytes": progress.memory_bytes,
                "planned_bytes": progress.planned_bytes,
                "seconds_in": progress.seconds_in,
                "seconds": progress.seconds,
                **machine_figures(self.sensors),
                # What a method logs beside the loss, such as rewards/margins.
                **{
                    k: v
                    for k, v in logs.items()
                    if k not in ("loss", "learning_rate", "grad_norm", "epoch")
                },
            }
        )
        if self.show:
            self.show(progress)

    def _progress(self, state: TrainerState, logs: dict[str, float]) -> Progress:
        """Read the clocks and counters since the last log step."""
        assert self.trainer is not None
        now, steps = time.perf_counter(), state.global_step - self._last_step
        counts, phases = self.trainer.meter.take()
        memory = peak_memory_bytes()
        own = {"step": state.global_step, "memory_bytes": memory, **counts}
        append_rank_line(self.run, self.world, {**own, "seconds_in": phases})
        everyone = self.world.gather((dict(counts), memory))
        counts = sum((Counter(c) for c, _ in everyone[:: self.world.tensor]), Counter())
        memory = max(bytes_ for _, bytes_ in everyone)
        passed, done = now - self._last, state.global_step - self._first_step
        self._last, self._last_step = now, state.global_step
        possible = self.plan.target.speed.flops * passed * self.world.size
        return Progress(
            step=state.global_step,
            num_steps=state.max_steps,
            loss=logs["loss"],
            learning_rate=logs["learning_rate"],
            grad_norm=logs.get("grad_norm", 0.0),
            tokens_per_second=counts["tokens"] / passed,
            labelled_per_second=counts["labelled_tokens"] / passed,
            entered_per_second=counts["entered_tokens"] / passed,
            mfu=counts["model_flops"] / possible,
            hfu=counts["hardware_flops"] / possible,
            memory_bytes=memory,
            planned_bytes=self.plan.choice.peak_bytes,
            seconds_in={name: seconds / steps for name, seconds in phases.items()},
            seconds=now - self._start,
            eta_seconds=(now - self._start) / done * (state.max_steps - state.global_step),
            judged=judged_in(logs),
        )

    def write(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        append_line(self.run, line)


def machine_figures(sensors: Sensors | None) -> dict[str, Any]:
    """Return the `machine` of a log step: once a second at most, nothing in between."""
    found = None if sensors is None else sensors.sample()
    return {} if found is None else {"machine": found}


def append_line(run: RunFolder, line: dict[str, Any]) -> None:
    """Append a line to a run's metrics.jsonl.

    Args:
        run: The run's folder.
        line: What JSON can say.
    """
    if not run.writes:
        return
    with writing(run.metrics_file), open(run.metrics_file, "a", encoding="utf-8") as f:
        f.write(json.dumps(line) + "\n")


def append_rank_line(run: RunFolder, world: World, line: dict[str, Any]) -> None:
    """Append what one of several processes did to its own file, ranks/rank-N.jsonl.

    Args:
        run: The run's folder.
        world: The processes; where there is one, metrics.jsonl says it all.
        line: What JSON can say.
    """
    if world.size == 1:
        return
    run.ranks_dir.mkdir(exist_ok=True)
    file = run.ranks_dir / f"rank-{world.rank}.jsonl"
    with writing(file), open(file, "a", encoding="utf-8") as f:
        f.write(json.dumps(line) + "\n")


class StopAtSignal(TrainerCallback):
    """Ends training after the current step, with a checkpoint, at Ctrl-C or SIGTERM."""

    def __init__(self) -> None:
        self.asked = False
        self.agreed: bool | None = None  # whether any process was asked, once all know

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save and stop, when asked to: all processes after the same step."""
        if self.asked if self.agreed is None else self.agreed:
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

        # torchrun ends its processes with SIGTERM, when one of them has failed: that is no wish.
        elastic = "TORCHELASTIC_RUN_ID" in os.environ
        wishes = [signal.SIGINT] if elastic else [signal.SIGINT, signal.SIGTERM]
        before = {name: signal.signal(name, ask) for name in wishes}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)


class SaveEvery(TrainerCallback):
    """Has checkpoints written as `save_steps` says, where transformers would not by itself.

    Its Trainer cannot write one of a model that was cut while it was loaded; whet can.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask for a checkpoint after every so many steps, and after the last."""
        last = state.global_step >= state.max_steps
        control.should_save = control.should_save or last or not state.global_step % args.save_steps


class HeldOutWatch(TrainerCallback):
    """Knows the best held-out loss so far, has that checkpoint kept, and ends training in time.

    Args:
        patience: Measurements in a row without a better loss after which training ends; None: never.
        keep: Write a checkpoint after each measurement that is the best so far.
    """

    def __init__(self, patience: int | None, keep: bool) -> None:
        self.patience, self.keep = patience, keep
        self.best_loss, self.best_step, self.num_worse = math.inf, 0, 0

    @property
    def stopped(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.num_worse >= self.patience

    @property
    def kept_step(self) -> int:
        """The step whose checkpoint is kept beside the newest, or 0."""
        return self.best_step if self.keep else 0

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **_: Any,
    ) -> None:
        """Compare a measurement with the best."""
        loss = metrics["eval_loss"]
        if loss < self.best_loss:  # a loss that is no number is never better
            self.best_loss, self.best_step, self.num_worse = loss, state.global_step, 0
            control.should_save = control.should_save or self.keep
        else:
            self.num_worse += 1
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def to_dict(self) -> dict[str, float | None]:
        """Return what a checkpoint keeps."""
        best = self.best_loss if self.best_step else None
        return {"best_loss": best, "best_step": self.best_step, "num_worse": self.num_worse}

    def load(self, kept: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self.best_step, self.num_worse = kept["best_step"], kept["num_worse"]
        self.best_loss = math.inf if kept["best_loss"] is None else kept["best_loss"]


def peak_memory_bytes() -> int:
    """Return the peak of the GPU's allocator, or the process's peak resident memory on a CPU."""
    import resource
    import sys

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak_memory() -> int:
    """Let the peak begin anew, where the system can, and return what it was."""
    import ctypes
    import gc

    import torch

    before = peak_memory_bytes()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return before
    with suppress(OSError, AttributeError):  # Linux with glibc
        ctypes.CDLL(None).malloc_trim(0)  # what an evaluation used, and the allocator has kept
        Path("/proc/self/clear_refs").write_text("5")
    return before
