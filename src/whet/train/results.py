"""What a run found out, in report.json and samples.md."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from whet.config import Config
from whet.data.prepare import PreparedData
from whet.evaluate import Sample, Scores, evaluate
from whet.model import Tokenizer
from whet.plan.plan import Plan
from whet.runs import RunFolder, write_text
from whet.train.listen import Listener
from whet.train.shards import Shards
from whet.train.world import World


@dataclass
class Training:
    """What one run trains with.

    Args:
        run: Its folder.
        config: Its config.
        tokenizer: The model's.
        data: The prepared rows.
        plan: How the memory is used.
        world: The processes.
        shards: How the model is spread over them, or None.
        base_samples: The base model's answers, where they are measured on the spread model.
    """

    run: RunFolder
    config: Config
    tokenizer: Tokenizer
    data: PreparedData
    plan: Plan
    world: World
    shards: Shards | None
    base_samples: list[Sample] = field(default_factory=list)


class BaseFirst(TrainerCallback):
    """Measures the base model once it is spread: whole it may not fit into a process.

    Args:
        training: Its answers are kept there.
        listener: Hears of it.
    """

    def __init__(self, training: Training, listener: Listener) -> None:
        self.training, self.listener = training, listener

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Measure, with the adapter turned off."""
        own, model = self.training, more["model"]
        known = own.world.agree(own.run.report.get("evaluation", {}))
        if "base" in known:
            own.base_samples = [Sample(**sample) for sample in known["base_samples"]]
        elif own.data.heldout:
            self.listener.stage("measuring the base model")
            adapted = hasattr(model, "disable_adapter")
            with model.disable_adapter() if adapted else contextlib.nullcontext():
                scores, own.base_samples = evaluate(model, own.tokenizer, own.data, own.config.eval)
            write_evaluation(own.run, base=scores, base_samples=own.base_samples)


def write_evaluation(run: RunFolder, **parts: Scores | list[Sample]) -> None:
    """Put scores and samples into report.json.

    Args:
        run: The run's folder.
        parts: By their names there: base, base_samples, tuned, tuned_samples.
    """
    evaluation = dict(run.report.get("evaluation", {}))
    for name, part in parts.items():
        if isinstance(part, Scores):
            evaluation[name] = part.to_dict()
        else:
            evaluation[name] = [asdict(sample) for sample in part]
    run.update_report(evaluation=evaluation)


def write_samples(run: RunFolder, base: list[Sample], tuned: list[Sample]) -> None:
    """Write samples.md: each held-out row with the reference and both models' answers.

    Args:
        run: The run's folder.
        base: The base model's answers.
        tuned: The tuned model's, to the same rows in the same order.
    """
    lines = [f"# Held-out samples of {run.path.name}", ""]
    for before, after in zip(base, tuned, strict=False):
        lines += [f"## {after.where}", "", _quoted(after.question), ""]
        for name, text in (
            ("reference", after.reference), ("base", before.answer), ("tuned", after.answer)
        ):  # fmt: skip
            lines += [f"**{name}**", "", _quoted(text), ""]
    write_text(run.samples_file, "\n".join(lines))


def _quoted(text: str) -> str:
    return "\n".join(f"    {line}" for line in (text.strip() or "(nothing)").split("\n"))
