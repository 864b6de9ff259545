"""What one framework is asked to do: the contract between the harness and the peers' processes.

Only the standard library is used, since this is imported in every peer's environment.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Workload:
    """A piece of work that every framework does alike.

    Args:
        name: Short name.
        model: `smollm2-135m`, a folder, or the name of a shape in `benchmarks.shapes`.
        data: `alpaca`, `pairs`, or `long` (one text of `length` tokens a row).
        dtype: Of the weights (of the products, where they are NF4).
        load_in_4bit: NF4 weights with double quantisation.
        parameters: What is trained.
        rank: Of the adapter; alpha is twice that.
        batch_size: Rows of one pass, for a framework that is told so.
        accumulation: Passes of one optimizer step.
        length: Longest row in tokens.
        learning_rate: Constant; AdamW, no weight decay, clipped to 1.
        warm: Steps that are not timed, the first among them.
        rounds: Timed steps.
        heldout: Rows of the float32 evaluation at the end.
        device: Where it makes sense: `cpu`, `cuda`, or both (None).
        variants: Which variants of which peers to run where the user names none; all others run as
            default and tuned.
        at_once: Processes that hold a model at a time, whet's in each group of them: what a long row
            needs, five frameworks do not fit beside each other in 24 GB.
    """

    name: str
    model: str = "smollm2-135m"
    data: Literal["alpaca", "pairs", "long"] = "alpaca"
    dtype: str = "bfloat16"
    load_in_4bit: bool = False
    parameters: Literal["lora", "full"] = "lora"
    rank: int = 16
    batch_size: int = 2
    accumulation: int = 4
    length: int = 2048
    learning_rate: float = 2e-4
    warm: int = 1
    rounds: int = 5
    heldout: int = 24
    device: str | None = None
    variants: dict[str, list[str]] = field(default_factory=dict)
    at_once: int = 99

    @property
    def method(self) -> str:
        """`dpo` for preference pairs, else `sft`."""
        return "dpo" if self.data == "pairs" else "sft"

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        return self.warm + self.rounds

    @property
    def rows(self) -> int:
        """Rows that are trained on, each once."""
        return self.steps * self.batch_size * self.accumulation


@dataclass(frozen=True)
class Job:
    """One run of one framework.

    Args:
        peer: Module of benchmarks.peers.
        variant: Name of its settings.
        settings: What the variant sets.
        work: The workload.
        model: Folder of the model.
        rows: File with the tokenised rows (`input_ids`, `labels`), or pairs of texts, in their order.
        folder: Where the worker may write; the trained weights are left in `trained` there.
        device: `cpu` or `cuda`.
        seed: Of the adapter's start.
    """

    peer: str
    variant: str
    settings: dict[str, Any]
    work: Workload
    model: str
    rows: str
    folder: str
    device: str
    seed: int = 3407
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """How the run is called in tables."""
        return f"{self.peer} {self.variant}"

    @property
    def trained(self) -> Path:
        """Folder of the trained weights."""
        return Path(self.folder) / "trained"

    def write(self) -> Path:
        """Write the job into its folder and return the file."""
        path = Path(self.folder) / "job.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2))
        return path

    @staticmethod
    def read(path: str | Path) -> Job:
        """Read a job from its file."""
        values = json.loads(Path(path).read_text())
        return Job(**{**values, "work": Workload(**values["work"])})

    def read_rows(self) -> list[dict[str, Any]]:
        """Read the rows."""
        return [json.loads(line) for line in Path(self.rows).read_text().splitlines()]
