"""Draw loss.png from metrics.jsonl."""

from __future__ import annotations

from whet.runs import RunFolder, writing
from whet.sections import PREFERENCES


def plot_loss(run: RunFolder) -> None:
    """Draw the loss of every log step, its running mean, and the held-out losses.

    Args:
        run: A run with metrics; nothing is drawn when there are none.

    Raises:
        WhetError: The picture cannot be written.
    """
    rows = [row for row in run.metrics() if "loss" in row]
    if not rows:
        return
    # The figure is made without pyplot: no display, no global state, safe beside a user's own plots.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.0), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    axes.plot(steps, losses, color="#b9c6d6", linewidth=1, label="training, each step")
    axes.plot(
        steps, _running_mean(losses), color="#1f5fa8", linewidth=2, label="training, smoothed"
    )
    heldout = [(row["step"], row["heldout_loss"]) for row in run.metrics() if "heldout_loss" in row]
    report = run.report
    # A loss over pairs is no loss over tokens, which is what the evaluation measures.
    compares = report.get("config", {}).get("method") in PREFERENCES
    evaluation = {} if compares else report.get("evaluation", {})
    if "base" in evaluation:
        heldout.insert(0, (0, evaluation["base"]["loss"]))
    if "tuned" in evaluation:
        heldout.append((steps[-1], evaluation["tuned"]["loss"]))
    if heldout:
        points = sorted(dict(heldout).items())
        # Two points have no course between them: a line would draw one that nobody measured.
        line = "--" if len(points) > 2 else "none"
        axes.plot(
            *zip(*points, strict=True),
            marker="o",
            linestyle=line,
            color="#d1603d",
            label="held out",
        )
        for step, loss in (points[0], points[-1]):
            axes.annotate(
                f"{loss:.3g}", (step, loss), (0, 9), textcoords="offset points", ha="center"
            )
    axes.set(xlabel="optimizer step", ylabel="loss (nats per learned token)", title=run.path.name)
    if min(losses) > 0 and max(losses) > 20 * losses[-1]:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(0, None)
    axes.margins(x=0.04, y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False)
    temporary = run.plot_file.with_name(".loss.tmp.png")
    with writing(run.plot_file):
        figure.savefig(temporary)
        temporary.replace(run.plot_file)


def _running_mean(values: list[float], weight: float = 0.85) -> list[float]:
    """Return the exponential mean, corrected for its start (as Adam's moments are)."""
    mean, means = 0.0, []
    for count, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        means.append(mean / (1 - weight**count))
    return means
