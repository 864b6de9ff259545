"""One framework's process: it loads, then makes a step each time it is its turn.

    python -m benchmarks.peers.worker JOB.json STARTED

Answers are JSON lines on the standard output that the process was started with; whatever the
framework prints goes to the standard error. A turn is a line on the standard input. The turns are kept
by a callback of the framework's own trainer, so that its own loop is what is measured.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
import zlib
from pathlib import Path
from typing import Any, TextIO

from benchmarks.peers.job import Job


class Memory:
    """Peak memory of this process, above what it holds once the model is loaded.

    Args:
        device: `cpu`: resident memory (Linux); `cuda`: what torch allocated and reserved, and what the
            driver gave away.
    """

    def __init__(self, device: str) -> None:
        self.device, self.loaded = device, 0

    def mark_loaded(self) -> None:
        """Take what is held now as the model's."""
        gc.collect()
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
            self.loaded = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            _return_freed_memory()
            self.loaded = _resident("VmRSS:")
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading

    def peak(self) -> dict[str, int]:
        """Return the peaks since then, in bytes."""
        if self.device != "cuda":
            return {"loaded": self.loaded, "above": _resident("VmHWM:") - self.loaded}
        import torch

        free, total = torch.cuda.mem_get_info()
        pinned = getattr(torch.cuda, "host_memory_stats", dict)()
        allocated = torch.cuda.max_memory_allocated()
        return {
            "loaded": self.loaded,
            "above": allocated - self.loaded,
            "allocated": allocated,
            "reserved": torch.cuda.max_memory_reserved(),
            "driver": total - free,
            "pinned": int(pinned.get("allocated_bytes.peak", 0)),
        }


def _resident(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(key)[1].split()[0]) * 1024


def _return_freed_memory() -> None:
    import ctypes

    ctypes.CDLL("libc.so.6").malloc_trim(0)


class Watch:
    """What a peer tells, and where it waits for its turn.

    Args:
        job: What is to be done.
        answers: Where the harness listens.
        started: When the process was started, as seconds since the epoch.
    """

    def __init__(self, job: Job, answers: TextIO, started: float) -> None:
        self.job, self.answers, self.started = job, answers, started
        self.memory = Memory(job.device)
        self.entered = 0
        self.load_seconds = 0.0

    def tell(self, event: str, **values: Any) -> None:
        """Send an event to the harness."""
        self.answers.write(json.dumps({"event": event, **values}) + "\n")
        self.answers.flush()

    def wait(self) -> None:
        """Wait for a turn; a harness that is gone ends this process."""
        if not sys.stdin.readline():
            os._exit(1)

    def loaded(self, model: Any = None) -> None:
        """Call this once the model is loaded and adapted, and before a trainer is made."""
        if model is not None:
            self.start_from_the_same(model)
            for parameter in model.parameters():
                parameter.detach().view(-1)[
                    ::1024
                ].clone()  # pages of a mapped file count as loaded
        self.memory.mark_loaded()
        self.load_seconds = time.time() - self.started

    def start_from_the_same(self, model: Any) -> None:
        """Give the adapter the start that all frameworks have, and count the tokens that enter."""
        import torch

        for name, parameter in model.named_parameters():
            place = name[name.index("layers.") :].replace(".default", "") if "lora_" in name else ""
            if "lora_B" in name:
                parameter.data.zero_()
            elif "lora_A" in name:
                generator = torch.Generator().manual_seed(
                    zlib.crc32(place.encode()) + self.job.seed
                )
                start = torch.rand(parameter.shape, generator=generator) * 2 - 1
                parameter.data.copy_(start / parameter.shape[1] ** 0.5)

        def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = args[0] if args else kwargs["input"]
            self.entered += ids.numel()

        model.get_input_embeddings().register_forward_pre_hook(count, with_kwargs=True)

    def callback(self) -> Any:
        """Return the callback that keeps the turns."""
        from transformers import TrainerCallback

        watch = self

        class Turns(TrainerCallback):
            """Waits before each step and tells what it took."""

            def __init__(self) -> None:
                self.began, self.found = 0.0, {}

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                """Wait for a turn; what came before belongs to the step that is done."""
                if self.began:
                    self.tell()
                else:
                    watch.tell(
                        "ready", seconds=time.time() - watch.started, loading=watch.load_seconds
                    )
                watch.wait()
                watch.entered = 0
                self.began = time.perf_counter()

            def on_log(
                self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any
            ) -> None:
                """Keep the step's loss; after the last step there is no next one to wait in."""
                if "loss" not in logs or not self.began:
                    return
                self.found = {key: float(logs.get(key, 0.0)) for key in ("loss", "grad_norm")}
                if state.global_step == state.max_steps:
                    self.tell()
                    self.began = 0.0
                    watch.wait()  # saving must not disturb those who are not done yet

            def tell(self) -> None:
                if watch.job.device == "cuda":
                    import torch

                    torch.cuda.synchronize()
                watch.tell(
                    "step",
                    seconds=time.perf_counter() - self.began,
                    entered=watch.entered,
                    memory=watch.memory.peak(),
                    **self.found,
                )

        return Turns()


def versions() -> dict[str, str]:
    """Return the versions of what matters, in this environment."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    names = "torch transformers trl peft accelerate bitsandbytes liger-kernel triton unsloth whet"
    for name in names.split():
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Do one job."""
    job, started = Job.read(sys.argv[1]), float(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the framework prints is not an answer
    os.chdir(job.folder)
    watch = Watch(job, answers, started)
    try:
        peer = importlib.import_module(f"benchmarks.peers.{job.peer}")
        peer.run(job, watch)
        watch.tell("done", versions=versions())
    except BaseException as error:
        traceback.print_exc()
        words = str(error).strip().split("\n")[0]
        watch.tell("failed", error=f"{type(error).__name__}: {words}"[:300])
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
