"""What a person reads of a run that goes on."""

import io

from rich.console import Console

from whet.terminal import Terminal
from whet.train.callbacks import Progress, judged_in

STEP = {
    "step": 3, "num_steps": 9, "loss": 0.5, "learning_rate": 1e-4, "grad_norm": 1.0,
    "tokens_per_second": 1234.0, "labelled_per_second": 56.0, "entered_per_second": 1234.0, "mfu": 0.25,
    "hfu": 0.25, "memory_bytes": 2**30, "planned_bytes": 2**31, "seconds_in": {}, "seconds": 3.0,
    "eta_seconds": 61.0,
}  # fmt: skip


def line(**more):
    text = io.StringIO()
    Terminal(Console(file=text, width=200)).progress(Progress(**{**STEP, **more}))
    return " ".join(text.getvalue().split())


def test_a_step_is_one_line_with_the_most_telling_first():
    assert line() == (
        "step 3/9 loss 0.5000 ETA 1:01 1,234 tokens/s 1.00 of 2.00 GiB MFU 25% lr 1.0e-04 56 learned/s"
    )


def test_rewards_are_shown_and_what_was_not_measured_is_left_out():
    judged = judged_in({"loss": 0.5, "reward": 0.875, "reward_std": 0.1})
    told = line(judged=judged, planned_bytes=0, mfu=0.0, labelled_per_second=0.0)
    assert told == ("step 3/9 loss 0.5000 reward 0.875 ETA 1:01 1,234 tokens/s 1.00 GiB lr 1.0e-04")
    assert judged_in({"rewards/accuracies": 0.5}) == {"preferred": 0.5}
