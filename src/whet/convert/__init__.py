"""Translate a config of Axolotl, LLaMA-Factory, Unsloth or trl: `whet init --from FILE`.

Every key is translated, or named with the reason why not; a key that nobody knows is named too. What
comes out is a config that `load_config` takes, with the reasons as comments above it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from whet.config_file import load_config, parse_yaml
from whet.convert.axolotl import AXOLOTL
from whet.convert.llama_factory import LLAMA_FACTORY
from whet.convert.rules import Dialect, Reading, Refused
from whet.convert.trl import TRL
from whet.convert.unsloth import UNSLOTH
from whet.errors import InputError

__all__ = ["DIALECTS", "Conversion", "convert", "table"]

DIALECTS: dict[str, Dialect] = {
    "axolotl": AXOLOTL, "llama-factory": LLAMA_FACTORY, "unsloth": UNSLOTH, "trl": TRL,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Conversion:
    """A translated config.

    Args:
        dialect: The project it was written for.
        tree: Our config, sections and keys, without what is at its default.
        lost: (their key, why): not taken over, and the run would have been different with it.
        moot: (their key, why): not needed here.
        unknown: Sentences about keys that whet does not know.
    """

    dialect: str
    tree: dict[str, Any]
    lost: list[tuple[str, str]]
    moot: list[tuple[str, str]]
    unknown: list[str]

    def to_yaml(self, source: str) -> str:
        """Return the config as YAML, with what was not taken over as comments above it.

        Args:
            source: Name of the file it was made of.
        """
        lines = [
            f"# Made from {source} ({self.dialect}) by `whet init --from`; then: whet data, whet plan"
        ]
        for title, items in (("Not taken over", self.lost), ("Not needed here", self.moot)):
            lines += [f"# {title}:"] if items else []
            lines += [f"#   {key}: {why}" for key, why in items]
        lines += ["# Not known to whet:"] if self.unknown else []
        lines += [f"#   {text}" for text in self.unknown]
        text = yaml.safe_dump(self.tree, sort_keys=False, allow_unicode=True)
        return "\n".join(line.replace("\n", " ") for line in lines) + "\n\n" + text


def convert(path: str | Path, dialect: str | None = None) -> Conversion:
    """Translate a config of another trainer.

    Args:
        path: Their YAML or JSON file.
        dialect: A name of DIALECTS; None takes the one whose keys fit best.

    Raises:
        InputError: The file is not such a config, or one of its settings has no like here without
            which the run would be another one.
    """
    path = Path(path)
    tree = _read(path)
    chosen = _dialect(tree, path, dialect)
    theirs = dict(_flat(tree, chosen))
    given = {key: value for key, value in theirs.items() if not _is_empty(value)}
    filled = {key: value for key, value in chosen.defaults.items() if key not in given}
    reading = Reading({**_without_twins(filled, given, chosen), **given}, path.resolve().parent)
    unknown = []
    for key, value in reading.theirs.items():
        rule = chosen.rule_of(key)
        if rule is None:
            close = difflib.get_close_matches(key, chosen.rules, n=1, cutoff=0.8)
            unknown.append(key + "".join(f" (did you mean {name}?)" for name in close))
        elif rule.moot:
            reading.moot.append((key, rule.why))
        elif not rule.to and not rule.together:
            if value not in (False, 0):  # it is turned off there, too
                reading.lose(key, rule.why)
        elif not rule.together:
            try:
                reading.set(rule.to, rule.read(value))
            except Refused as error:
                reading.lose(key, str(error))
            except (ValueError, TypeError) as error:
                raise InputError(
                    f"'{path}': {key} has a value that whet cannot read", repr(value)
                ) from error
    try:
        chosen.together(reading)
    except (ValueError, TypeError) as error:
        raise InputError(f"'{path}' has a value that whet cannot read: {error}") from error
    ours = _nested(reading.ours)
    try:
        load_config(ours)  # every value is one that whet takes, and none contradicts another
    except InputError as error:
        raise InputError(f"'{path}' makes no config that whet takes. {error}") from error
    return Conversion(chosen.name, ours, reading.lost, reading.moot, unknown)


def table(dialect: Dialect) -> str:
    """Return a project's keys and ours as Markdown, for docs/migrate.md: a table, and two lists."""
    lines = ["| theirs | ours | |", "|---|---|---|"]
    for key, rule in dialect.rules.items():
        if rule.to:
            ours = ", ".join(f"`{name}`" for name in rule.to.split(", "))
            lines.append(f"| `{key}` | {ours} | {rule.why} |")
    for title, moot in (("Not here:", False), ("Not needed:", True)):
        reasons: dict[str, list[str]] = {}
        for key, rule in dialect.rules.items():
            if not rule.to and rule.moot is moot:
                reasons.setdefault(rule.why, []).append(f"`{key}`")
        lines += ["", title, ""]
        lines += [f"- {', '.join(keys)}: {why}" for why, keys in reasons.items()]
    return "\n".join(lines) + "\n"


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(
            f"'{path}' cannot be read: {error.strerror}", fix="check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}' is not UTF-8 text", f"byte {error.start}") from error
    except yaml.YAMLError as error:
        raise InputError(f"'{path}' is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise InputError(f"'{path}' is no config of another trainer: it has no keys")
    return tree


def _dialect(tree: dict[str, Any], path: Path, wish: str | None) -> Dialect:
    if wish is not None:
        if wish not in DIALECTS:
            raise InputError(
                f"there is no dialect '{wish}'", fix=f"use one of {', '.join(DIALECTS)}"
            )
        return DIALECTS[wish]

    def known(dialect: Dialect) -> int:
        return sum(dialect.rule_of(key) is not None for key, _ in _flat(tree, dialect))

    best = max(DIALECTS.values(), key=known)
    if known(best) < 2:
        raise InputError(
            f"'{path}' is no config of {', '.join(d.name for d in DIALECTS.values())}",
            ", ".join(map(str, list(tree)[:8])),
            "whet reads its own configs as they are",
        )
    return best


def _flat(tree: dict[str, Any], dialect: Dialect) -> Iterator[tuple[str, Any]]:
    """Yield keys and values, those of sections under the names that the dialect's rules have."""
    for key, value in tree.items():
        if key in dialect.sections and isinstance(value, dict):
            for inner, one in value.items():
                yield f"{dialect.sections[key]}{inner}", one
        else:
            yield str(key), value


def _is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {})


def _without_twins(
    defaults: dict[str, Any], given: dict[str, Any], dialect: Dialect
) -> dict[str, Any]:
    """Leave out defaults of keys that the file gives under another name (`r`, `lora_r`)."""
    rules = [dialect.rule_of(key) for key in given if key not in _ADDED]
    said = {rule.to for rule in rules if rule is not None and rule.to}
    return {
        key: value
        for key, value in defaults.items()
        if dialect.rules[key].to not in said or key in _ADDED
    }


# Several keys make one of ours, and each has a default of its own.
_ADDED = ("gradient_accumulation_steps",)


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *section, key = path.split(".")
        node = tree.setdefault(section[0], {}) if section else tree
        node[key] = value
    order = ("method", "run", "model", "lora", "data", "train")
    return {name: tree.pop(name) for name in order if name in tree} | tree
