"""The courses of the learning rate, by transformers' names, and the settings that each has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

Schedule = Literal[
    "linear", "cosine", "constant", "cosine_with_min_lr", "cosine_with_restarts", "polynomial",
    "inverse_sqrt", "warmup_stable_decay",
]  # fmt: skip
Value = str | float | int | bool

# Numbers, but where words are listed.
_SETTINGS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "cosine": {"num_cycles": ()},
    "cosine_with_min_lr": {"min_lr": (), "min_lr_rate": (), "num_cycles": ()},
    "cosine_with_restarts": {"num_cycles": ()},
    "polynomial": {"lr_end": (), "power": ()},
    "inverse_sqrt": {"timescale": ()},
    "warmup_stable_decay": {
        "num_decay_steps": (), "num_stable_steps": (), "min_lr_ratio": (), "num_cycles": (),
        "warmup_type": ("linear", "cosine", "1-sqrt"), "decay_type": ("linear", "cosine", "1-sqrt"),
    },
}  # fmt: skip
# Of each, one and only one must be given: there is no course without.
_NEEDED = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}


def schedule_faults(schedule: str, given: Mapping[str, Value], peak: float) -> Iterator[str]:
    """Yield a sentence for each setting that a schedule does not have, take, or do without.

    Args:
        schedule: Its name.
        given: `train.schedule_args`.
        peak: The rate at the end of the warm-up.
    """
    known = _SETTINGS.get(schedule, {})
    for key, value in given.items():
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            yield f"train.schedule_args: schedule '{schedule}' has no setting '{key}'; {has}"
        elif known[key] and value not in known[key]:
            yield f"train.schedule_args.{key} is one of {', '.join(known[key])}; got {value!r}"
        elif not known[key] and (isinstance(value, (str, bool)) or value < 0):
            yield f"train.schedule_args.{key} is a number of at least 0; got {value!r}"
        elif key in ("min_lr", "lr_end") and float(value) >= peak:
            yield f"train.schedule_args.{key} is a rate below train.learning_rate; got {value!r}"
    needed = _NEEDED.get(schedule, ())
    if needed and len(set(needed) & set(given)) != 1:
        words = " or ".join(needed)
        yield f"train.schedule '{schedule}' needs {words}; set it in train.schedule_args"
