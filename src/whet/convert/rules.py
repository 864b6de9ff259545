"""What may become of a key of another trainer: ours, not needed here, or lost; and the shared rules.

A dialect is a table of rules, the other project's own defaults, and a function for what takes several
keys together. The tables are also those of docs/migrate.md. Values are read as their public
documentation describes them; nothing of those projects is imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from whet.errors import InputError
from whet.schedules import schedule_faults


class Refused(ValueError):
    """Why a value of theirs, valid as it is, has no like here."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What becomes of one key.

    Args:
        to: Our key, or several with commas between; empty when there is none.
        why: Why there is none, or what is different about ours.
        read: Their value -> ours. It raises Refused with the reason when ours cannot be that, and
            returns None for our default.
        moot: Nothing is lost without it.
        together: The dialect's function reads it, with others.
    """

    to: str = ""
    why: str = ""
    read: Callable[[Any], Any] = field(default=lambda value: value)
    moot: bool = False
    together: bool = False


@dataclass(slots=True)
class Reading:
    """A config of another trainer on its way to ours.

    Args:
        theirs: Their keys and values, sections taken apart, empty ones left out.
        folder: Where their file lies.
        ours: Our keys, dotted, and values.
        lost: (their key, why) of what is not taken over and would matter.
        moot: (their key, why) of what is not needed here.
    """

    theirs: dict[str, Any]
    folder: Path
    ours: dict[str, Any] = field(default_factory=dict)
    lost: list[tuple[str, str]] = field(default_factory=list)
    moot: list[tuple[str, str]] = field(default_factory=list)

    def get(self, key: str, default: Any = None) -> Any:
        """Return their value of a key."""
        return self.theirs.get(key, default)

    def set(self, key: str, value: Any) -> None:
        """Set one of ours; None leaves the default."""
        if value is not None:
            self.ours[key] = value

    def lose(self, key: str, why: str) -> None:
        """Say that a key of theirs is not taken over."""
        self.lost.append((key, why))


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one project writes a config.

    Args:
        name: The project.
        rules: Their key -> rule. A key that ends in `*` stands for all that begin so.
        defaults: Their own defaults, where ours differ; used for keys that their file leaves out.
        together: Reads the keys whose rules say so.
        sections: Their sections -> what is put before the names of their keys.
    """

    name: str
    rules: Mapping[str, Rule]
    defaults: Mapping[str, Any]
    together: Callable[[Reading], None]
    sections: Mapping[str, str] = field(default_factory=dict)

    def rule_of(self, key: str) -> Rule | None:
        """Return the rule of a key, or None when nobody knows it."""
        if key in self.rules:
            return self.rules[key]
        for pattern, rule in self.rules.items():
            if pattern.endswith("*") and key.startswith(pattern[:-1]):
                return rule
        return None


def to(key: str, read: Callable[[Any], Any] = lambda value: value, why: str = "") -> Rule:
    """Return the rule of a key that is `key` here."""
    return Rule(key, why, read)


def with_others(key: str, why: str = "") -> Rule:
    """Return the rule of a key that is read together with others."""
    return Rule(key, why, together=True)


def moot(why: str) -> Rule:
    """Return the rule of a key that is not needed here."""
    return Rule(why=why, moot=True)


def lost(why: str) -> Rule:
    """Return the rule of a key that has no place here, and that one would miss."""
    return Rule(why=why)


# --- reading values ------------------------------------------------------------------------------


def whole(value: Any) -> int:
    """Read a whole number."""
    if isinstance(value, bool) or float(value) != int(value):
        raise ValueError(f"{value} is no whole number")
    return int(value)


def steps(value: Any) -> int | None:
    """Read a number of steps; 0 and -1 are none, and shares are refused."""
    if float(value) <= 0:
        return None
    if float(value) < 1:
        raise Refused(f"{value} is a share of the steps; whet counts steps")
    return whole(value)


def share(value: Any) -> float | None:
    """Read a share of rows; a count is refused."""
    if float(value) > 0.5:
        raise Refused(f"{value}: whet sets a share of at most 0.5 aside, not a number of rows")
    return float(value) or None


def names(value: Any) -> list[str]:
    """Read names in a list or with commas between."""
    parts = value if isinstance(value, list) else str(value).split(",")
    return [str(part).strip() for part in parts if str(part).strip()]


def targets(value: Any) -> str | list[str]:
    """Read the modules of an adapter."""
    found = names(value)
    return "all-linear" if found in (["all"], ["all-linear"]) else found


def one_of(table: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Return a reader of names that are others here."""

    def read(value: Any) -> Any:
        if str(value).lower() not in table:
            raise Refused(f"'{value}' is none that whet has ({', '.join(sorted(table))})")
        return table[str(value).lower()]

    return read


schedule = one_of(
    {
        "linear": "linear", "cosine": "cosine", "constant": "constant",
        "constant_with_warmup": "constant",
        **{name: name for name in (
            "cosine_with_min_lr", "cosine_with_restarts", "polynomial", "inverse_sqrt",
            "warmup_stable_decay",
        )},
    }
)  # fmt: skip
dtype = one_of(
    {
        "bfloat16": "bfloat16", "bf16": "bfloat16", "float16": "float16", "fp16": "float16",
        "half": "float16", "float32": "float32", "fp32": "float32", "auto": None, "null": None,
        "none": None,
    }
)  # fmt: skip


def optimizer(value: Any) -> str:
    """Read an optimizer's name; whet takes transformers', without their double names."""
    same = {
        "adamw_bnb_8bit": "adamw_8bit",
        "adamw_hf": "adamw_torch",
        "paged_adamw": "paged_adamw_32bit",
    }
    return same.get(str(value), str(value))


def settings(value: Any) -> dict[str, Any]:
    """Read an optimizer's settings, a mapping or `a=1,b=2`."""
    if isinstance(value, dict):
        return value
    found: dict[str, Any] = {}
    for part in names(value):
        key, _, text = part.partition("=")
        number = re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", text.strip())
        found[key.strip()] = float(text) if number else text.strip()
    return found


def trackers(value: Any) -> list[str] | None:
    """Read the names of trackers; all that whet does not have are refused."""
    found = [name for name in names(value) if name not in ("none", "all")]
    if unknown := [n for n in found if n not in ("tensorboard", "wandb", "trackio", "mlflow")]:
        raise Refused(f"whet does not write to {unknown[0]}; metrics.jsonl is always written")
    return found or None


def fatal(key: str, value: Any, fix: str) -> InputError:
    """Return the error for a setting without which the run would be another one."""
    return InputError(f"{key}: {value} cannot be translated", fix=fix)


# --- what several keys say together --------------------------------------------------------------


def set_place(reading: Reading, key: str = "output_dir") -> None:
    """Make run.dir and run.name of an output folder."""
    place = reading.get(key)
    if not place:
        return
    path = PurePosixPath(str(place))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.name).strip("-._")
    reading.set("run.name", name or None)
    parent = str(path.parent)
    reading.set("run.dir", parent if parent != "." else None)


def set_batch(reading: Reading, rows_key: str, length_key: str, packed: bool) -> None:
    """Make train.batch_size of a micro batch and its accumulation; of packed rows, batch_tokens.

    With packing on, those projects count rows of the full length, each filled with examples; here
    `batch_size` counts examples, so that the same step is so many tokens.
    """
    rows = whole(reading.get(rows_key, 1)) * whole(reading.get("gradient_accumulation_steps", 1))
    if packed and reading.get(length_key):
        reading.set("train.batch_tokens", rows * whole(reading.get(length_key)))
    else:
        reading.set("train.batch_size", rows)


def set_warmup(reading: Reading, usual: tuple[float, int] = (0.0, 0)) -> None:
    """Make warmup_steps of a number or, where the steps are known, of a share.

    Args:
        reading: Their config.
        usual: The share of the steps that is warm-up when their file is silent, and the most of them.
    """
    given, num_steps = float(reading.get("warmup_steps", 0)), reading.get("max_steps")
    # transformers 5 takes a share in `warmup_steps`, too.
    ratio = (given or float(reading.get("warmup_ratio", 0))) if given < 1 else 0.0
    silent = "warmup_steps" not in reading.theirs and "warmup_ratio" not in reading.theirs
    most = None
    if silent and usual[0]:
        ratio, most = usual
    known = whole(num_steps) if num_steps and float(num_steps) > 0 else None
    if not ratio:
        reading.set("train.warmup_steps", whole(given))
    elif known:
        wanted = round(ratio * known)
        reading.set("train.warmup_steps", min(wanted, most) if most else wanted)
    else:
        limit = f", at most {most}" if most else ""
        reading.lose(
            "warmup_ratio",
            f"whet counts steps: set train.warmup_steps to {ratio:g} of those that `whet plan` "
            f"shows{limit}",
        )


def set_evaluation(reading: Reading) -> None:
    """Measure during training only where rows are held out and the steps between are known."""
    heldout = "data.heldout" in reading.ours or "data.heldout_fraction" in reading.ours
    every, when = reading.get("eval_steps"), str(reading.get("eval_strategy", "steps"))
    if heldout and when not in ("steps", "no", "False"):
        reading.lose("eval_strategy", f"{when}: whet measures every eval.steps, and at the end")
    elif every is not None and not heldout:
        reading.moot.append(("eval_steps", "no rows are held out"))
    elif every is not None and when == "steps":
        try:
            reading.set("eval.steps", steps(every))
        except ValueError as error:
            reading.lose("eval_steps", str(error))
    for key, ours in (
        ("early_stopping_patience", "eval.patience"),
        ("load_best_model_at_end", "eval.keep_best"),
    ):
        if value := reading.get(key):
            if "eval.steps" in reading.ours:
                reading.set(ours, value)
            else:
                reading.lose(
                    key, "goes by the held-out loss during training: set eval.steps, then " + ours
                )


def set_schedule(reading: Reading) -> None:
    """Take the settings of a schedule over that whet has."""
    found = reading.get("lr_scheduler_kwargs")
    if not found:
        return
    given = settings(json.loads(found) if str(found).startswith('{"') else found)
    schedule, peak = reading.ours.get("train.schedule", "linear"), reading.get("learning_rate", 1.0)
    faults = list(schedule_faults(schedule, given, float(peak)))
    if faults:
        reading.lose("lr_scheduler_kwargs", "; ".join(faults))
    else:
        reading.set("train.schedule_args", given)


def set_noise(reading: Reading, *keys: str) -> None:
    """Take the noise on embeddings over, under the first of their names that is given."""
    key = next((key for key in keys if reading.get(key)), None)
    if key is None:
        return
    if reading.ours.get("method", "sft") in ("sft", "pretrain"):
        reading.set("train.neftune_alpha", float(reading.get(key)))
    else:
        reading.lose(key, "noise on embeddings is for sft and pretrain")
