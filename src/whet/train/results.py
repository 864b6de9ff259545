"""What a run found out, in report.json and samples.md."""

from __future__ import annotations

from dataclasses import asdict

from whet.evaluate import Sample, Scores
from whet.runs import RunFolder, write_text


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
