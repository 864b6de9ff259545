"""Two runs of the quickstart's first steps, one of which runs out of memory on the way: the same losses.

    python -m benchmarks.out_of_memory [--steps 6]

The error is raised by hand, in the forward pass of one step and in the backward pass of another, where a
CUDA allocator would raise it. In float32, so that what differs is rounding and nothing else.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from whet.config_file import load_config
from whet.runs import RunFolder
from whet.train.listen import LogListener
from whet.train.recipe import fit
from whet.train.trainer import WhetTrainer

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.yaml"


class Printer(LogListener):
    """Prints what is told about memory, and each step's loss."""

    def stage(self, text: str) -> None:
        """Leave stages out."""

    def note(self, text: str) -> None:
        """Print what happened."""
        if "memory ran out" in text:
            print(f"  {text}")

    def progress(self, progress: Any) -> None:
        """Print a step."""
        print(f"  step {progress.step}  loss {progress.loss:.6f}")


def run(name: str, folder: str, steps: int) -> RunFolder:
    """Train the quickstart's first steps."""
    settings = [
        f"run.name={name}", f"run.dir={folder}", f"train.max_steps={steps}", "model.dtype=float32",
        "data.heldout=null", "train.batch_size=8", "plan.probe=false", "train.checkpoint_steps=null",
    ]  # fmt: skip
    print(f"{name.replace(chr(45), chr(32))}:")
    return fit(load_config(QUICKSTART, settings), listener=Printer())


def main() -> None:
    """Run both and compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    calls = 0
    compute_loss = WhetTrainer.compute_loss

    def failing(self: WhetTrainer, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        loss = compute_loss(self, *args, **kwargs)
        if calls == 2:
            raise torch.OutOfMemoryError("CUDA out of memory (injected in a forward pass)")
        if calls == 6:
            loss.register_hook(fail_backward)
        return loss

    def fail_backward(gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory (injected in a backward pass)")

    with tempfile.TemporaryDirectory() as folder:
        whole = run("without", folder, arguments.steps)
        WhetTrainer.compute_loss = failing  # type: ignore[method-assign]
        broken = run("with-out-of-memory", folder, arguments.steps)
        losses = [
            [row["loss"] for row in found.metrics() if "loss" in row] for found in (whole, broken)
        ]
        events = [row for row in broken.metrics() if row.get("event") == "out_of_memory"]
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    print(
        f"{len(events)} times out of memory, tokens a pass {[e['tokens_per_pass'] for e in events]}; "
        f"final loss {losses[0][-1]:.7f} and {losses[1][-1]:.7f}, largest difference {apart:.1e}"
    )


if __name__ == "__main__":
    main()
