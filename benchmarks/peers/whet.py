"""whet: what `whet train` does, with the harness's callback beside its own.

Preference pairs go through trl's DPOTrainer over a model with the engine in it, until whet has a
method of its own for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from benchmarks.peers.job import TARGETS, Job
from benchmarks.peers.worker import Watch
from whet.config import Config
from whet.config_file import load_config
from whet.train.listen import LogListener
from whet.train.recipe import fit


class _Loaded(LogListener):
    """Marks the memory once the model is loaded."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.loading = watch, False

    def stage(self, text: str) -> None:
        self.loading = text.startswith("loading ")

    def note(self, text: str) -> None:
        super().note(text)
        if self.loading:
            self.watch.loaded()
        self.loading = False


class _SameStart(TrainerCallback):
    """Gives the adapter the start that all frameworks have."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """Set the adapter."""
        self.watch.start_from_the_same(model)


def config_of(job: Job) -> Config:
    """Return the job as whet's config."""
    work = job.work
    values: dict[str, Any] = {
        "run": {"name": "run", "dir": job.folder},
        "model": {
            "name": job.model,
            "dtype": work.dtype,
            "load_in_4bit": work.load_in_4bit,
            "max_length": work.length,
        },
        "lora": {"rank": work.rank, "alpha": 2 * work.rank, "targets": TARGETS},
        "data": {"train": job.rows, "format": "tokens"},
        "train": {
            "parameters": work.parameters,
            "batch_size": work.batch_size * work.accumulation,
            "max_steps": work.steps,
            "learning_rate": work.learning_rate,
            "schedule": "constant",
            "warmup_steps": 0,
            "shuffle": False,
            "checkpoint_steps": None,
            "seed": job.seed,
        },
        **job.settings,
    }
    return load_config(values, [])


def run(job: Job, watch: Watch) -> None:
    """Train."""
    if job.work.method == "dpo":
        _prefer(job, watch)
        return
    run_folder = fit(
        config_of(job), listener=_Loaded(watch), callbacks=[_SameStart(watch), watch.callback()]
    )
    trained = run_folder.adapter_dir if job.work.parameters == "lora" else run_folder.model_dir
    Path(trained).rename(job.trained)


def _prefer(job: Job, watch: Watch) -> None:
    from benchmarks.peers import hf, trl
    from whet.engine import swap

    model = hf.load(job)
    watch.loaded(model)
    swap.attach(model)
    trl.train(job, watch, model, trl.tokenizer_of(job), prepared=lambda: swap.stay_on_top(model))
