"""The rates that a run logs are those of the formulas in docs/optimizers.md."""

import math

import pytest
from tests.train.test_recipe import Heard

from whet.config_file import load_config
from whet.errors import InputError
from whet.train.recipe import fit

pytestmark = pytest.mark.usefixtures("quick")
PEAK, WARMUP, STEPS = 4e-3, 2, 8


def cosine(share, cycles=0.5):
    return (1 + math.cos(2 * math.pi * cycles * share)) / 2


# Name -> settings, and the share of the peak once `done` of `left` steps after the warm-up are done.
COURSES = {
    "linear": ({}, lambda done, left: 1 - done / left),
    "cosine": ({}, lambda done, left: cosine(done / left)),
    "constant": ({}, lambda done, left: 1.0),
    "cosine_with_min_lr": ({"min_lr": 1e-3}, lambda done, left: 0.25 + 0.75 * cosine(done / left)),
    "cosine_with_restarts": ({"num_cycles": 2}, lambda done, left: cosine(2 * done / left % 1)),
    "polynomial": (
        {"power": 2, "lr_end": 1e-3},
        lambda done, left: 0.25 + 0.75 * (1 - done / left) ** 2,
    ),
    "inverse_sqrt": ({"timescale": 3}, lambda done, left: math.sqrt(3 / (3 + done))),
    "warmup_stable_decay": (
        {"num_decay_steps": 4, "decay_type": "linear", "min_lr_ratio": 0.2},
        lambda done, left: 1.0 if done < left - 4 else 0.2 + 0.8 * (left - done) / 4,
    ),
}


def assignments(schedule, settings):
    return [
        f"train.schedule={schedule}",
        *(f"train.schedule_args.{k}={v}" for k, v in settings.items()),
    ]


@pytest.mark.parametrize("schedule", COURSES)
def test_the_rate_takes_its_course(config, schedule):
    settings, course = COURSES[schedule]
    config = load_config(config, [
        *assignments(schedule, settings), f"train.learning_rate={PEAK}", f"train.warmup_steps={WARMUP}",
        f"train.max_steps={STEPS}", "data.heldout_fraction=0",
    ])  # fmt: skip
    rates = [
        row["learning_rate"] for row in fit(config, listener=Heard()).metrics() if "loss" in row
    ]
    after = [PEAK * course(done, STEPS - WARMUP) for done in range(STEPS - WARMUP)]
    least = (
        0.2 * PEAK if schedule == "warmup_stable_decay" else 0
    )  # it warms up from its lowest rate
    before = [least + (PEAK - least) * step / WARMUP for step in range(WARMUP)]
    assert rates == pytest.approx([*before, *after], rel=1e-6)


@pytest.mark.parametrize(
    ("schedule", "settings", "words"),
    [
        ("linear", {"power": 2}, "schedule 'linear' has no setting 'power'; it has none"),
        ("cosine", {"min_lr": 1e-5}, "has no setting 'min_lr'; it has num_cycles"),
        ("cosine_with_min_lr", {}, "needs min_lr or min_lr_rate"),
        ("cosine_with_min_lr", {"min_lr": 1e-5, "min_lr_rate": 0.1}, "needs min_lr or min_lr_rate"),
        ("cosine_with_min_lr", {"min_lr": 1.0}, "is a rate below train.learning_rate"),
        ("polynomial", {"power": "two"}, "is a number of at least 0"),
        ("warmup_stable_decay", {}, "needs num_decay_steps"),
        ("warmup_stable_decay", {"num_decay_steps": 4, "decay_type": "steep"}, "is one of linear"),
        ("liner", {}, "did you mean 'linear'"),
    ],
)
def test_a_wrong_setting_is_told(config, schedule, settings, words):
    with pytest.raises(InputError, match=words):
        load_config(config, assignments(schedule, settings))


def test_whets_own_optimizer_takes_a_schedule_with_settings(config):
    config = load_config(config, [
        "train.optimizer=muon", *assignments("polynomial", {"power": 2}), "train.max_steps=3",
        "train.warmup_steps=0", f"train.learning_rate={PEAK}", "data.heldout_fraction=0",
    ])  # fmt: skip
    rates = [
        row["learning_rate"] for row in fit(config, listener=Heard()).metrics() if "loss" in row
    ]
    assert rates == pytest.approx([PEAK, PEAK * 4 / 9, PEAK / 9], rel=1e-3)
