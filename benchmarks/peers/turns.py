"""Several frameworks in turns: each in its own process, one step each, and again from the first.

While one works the others wait on a pipe. So whatever the machine does besides, and however fast it
happens to be that minute, meets all of them alike.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from benchmarks.peers.environments import ROOT
from benchmarks.peers.job import Job

LONGEST_WAIT = 1800.0  # seconds for one answer: a load, or a step


@dataclass
class Run:
    """What one framework did.

    Args:
        job: What it was asked.
        steps: Of each step its seconds, loss, gradient norm, tokens that entered, and memory.
        ready_seconds: From the start of the process until the first step could begin.
        versions: Of the packages in its environment.
        failure: Why it did not finish; empty when it did.
    """

    job: Job
    steps: list[dict[str, Any]] = field(default_factory=list)
    ready_seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    failure: str = ""


class _Worker:
    """A peer's process."""

    def __init__(self, job: Job, python: Path, threads: int | None) -> None:
        self.run, self.job = Run(job), job
        self.log = Path(job.folder) / "log.txt"
        file = job.write()
        variables = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", **job.environment}
        variables.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_DISABLED="true")
        if threads:
            variables["OMP_NUM_THREADS"] = str(threads)
        self.answers: Queue[dict[str, Any] | None] = Queue()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(python), "-m", "benchmarks.peers.worker", str(file), str(time.time())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=variables,
                cwd=job.folder,
            )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(json.loads(line))
        self.answers.put(None)

    def turn(self) -> None:
        """Give a turn and take in what comes back."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        self.listen()

    def listen(self) -> str:
        """Wait for an event, take it in, and return its kind."""
        try:
            event = self.answers.get(timeout=LONGEST_WAIT)
        except Empty:
            event = {"event": "failed", "error": f"no answer in {LONGEST_WAIT:.0f} s"}
        kind = "failed" if event is None else event.pop("event")
        if kind == "ready":
            self.run.ready_seconds = event["seconds"]
        elif kind == "step":
            self.run.steps.append(event)
        elif kind == "done":
            self.run.versions = event["versions"]
        elif kind == "failed":
            code = self.process.wait(30) if event is None else None
            self.run.failure = event["error"] if event else f"the process ended with code {code}"
            self.stop()
        return kind

    @property
    def alive(self) -> bool:
        return not self.run.failure

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def take_turns(
    jobs: Sequence[Job], pythons: Sequence[Path], threads: int | None, tell: Any = print
) -> list[Run]:
    """Run jobs step by step in turns.

    Args:
        jobs: One of each framework; all make the same number of steps.
        pythons: The Python of each.
        threads: OpenMP threads of each process; None leaves it to the machine.
        tell: Called with a line now and then.

    Returns:
        What each did, in the order of the jobs.
    """
    workers: list[_Worker] = []
    try:
        for job, python in zip(jobs, pythons, strict=True):
            worker = _Worker(job, python, threads)
            workers.append(worker)
            worker.listen()  # one after another: a load would disturb another load
            if worker.alive:
                tell(f"  {job.name}: ready after {worker.run.ready_seconds:.1f} s")
            else:
                tell(f"  {job.name}: {worker.run.failure} ({worker.log})")
        for number in range(jobs[0].work.steps):
            # Another begins each time, so that none always follows the same one.
            order = workers[number % len(workers) :] + workers[: number % len(workers)]
            for worker in order:
                if worker.alive:
                    worker.turn()
            took = ", ".join(
                f"{worker.job.name} {worker.run.steps[-1]['seconds']:.2f}"
                for worker in workers
                if worker.alive and worker.run.steps
            )
            tell(f"  step {number + 1} of {jobs[0].work.steps}: {took} s")
        for worker in workers:
            if worker.alive:
                worker.turn()  # to save what was trained
    finally:
        for worker in workers:
            worker.stop()
    return [worker.run for worker in workers]
