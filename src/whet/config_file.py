"""Read a config from any source, tell every mistake in it at once, and write one.

A misspelt key is answered with the key that was meant; keys of other trainers are known too.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from whet.config import Config
from whet.config_text import parse_json, parse_yaml, read_json, read_yaml
from whet.errors import InputError, did_you_mean
from whet.sections import Section

# --- reading -------------------------------------------------------------------------------------


def load_config(
    source: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()
) -> Config:
    """Read and check a config.

    Args:
        source: Path of a YAML or JSON file, a mapping, or a Config.
        overrides: Assignments such as `train.max_steps=20`, applied over the source in order.

    Returns:
        The checked config. Data files that lie beside the config file have absolute paths.

    Raises:
        InputError: Anything is wrong; every mistake is listed, with the key and, for a misspelt
            one, the key that was probably meant.
    """
    if isinstance(source, Config):
        tree, title = source.model_dump(), "The config has mistakes:"
    elif isinstance(source, Mapping):
        tree, title = copy.deepcopy(dict(source)), "The config has mistakes:"
    else:
        tree, title = read_yaml(Path(source)), f"{source} has mistakes:"
        _anchor_paths(tree, Path(source).resolve().parent)
    return _checked(tree, title, overrides)


def load_json_config(source: str, overrides: Sequence[str] = ()) -> Config:
    """Read and check a config that a program wrote: JSON, and no YAML that looks like it.

    Args:
        source: Path of the file, or `-` for standard input.
        overrides: As in `load_config`.

    Raises:
        InputError: As in `load_config`; or the text is not JSON, told with line and column.
    """
    if source == "-":
        name, folder, tree = (
            "standard input",
            Path.cwd(),
            parse_json(sys.stdin.read(), "standard input"),
        )
    else:
        name, folder, tree = source, Path(source).resolve().parent, read_json(Path(source))
    _anchor_paths(tree, folder)
    return _checked(tree, f"{name} has mistakes:", overrides)


def _checked(tree: dict[str, Any], title: str, overrides: Sequence[str]) -> Config:
    mistakes = [m for text in overrides if (m := _apply_override(tree, text)) is not None]
    config = None
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        mistakes += [line for detail in error.errors() for line in _sentences(detail)]
    if mistakes or config is None:
        raise InputError.listing(title, mistakes)
    return config


def _anchor_paths(tree: dict[str, Any], folder: Path) -> None:
    """Make the file names that exist beside the config file absolute, so the run can move about."""

    def anchored(name: Any) -> Any:
        if isinstance(name, list):
            return [anchored(item) for item in name]
        if not isinstance(name, str) or not name or Path(name).is_absolute():
            return name
        # `rows.jsonl#500` and `*.jsonl` are names of files too, as `file.py:function` is.
        files = [name, name.rpartition("#")[0], name.rpartition(":")[0]]
        there = any(file and (folder / file).exists() for file in files)
        there = there or ("*" in name and any(folder.glob(name.rpartition("#")[0] or name)))
        return str(folder / name) if there else name

    for section, key in (
        ("data", "train"), ("data", "heldout"), ("data", "formatting"), ("model", "name"),
        ("model", "chat_template"), ("grpo", "reward"),
    ):  # fmt: skip
        part = tree.get(section)
        if isinstance(part, dict) and key in part:
            part[key] = anchored(part[key])


def _apply_override(tree: dict[str, Any], text: str) -> str | None:
    """Apply one `a.b=c` in place; return the mistake in it, if there is one."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        return f"--set '{text}' is not of the form section.key=value"
    *sections, key = path.strip().split(".")
    node = tree
    for name in sections:
        child = node.get(name)
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            return f"--set '{text}': '{name}' is a value, not a section"
        node = child
    try:
        node[key] = parse_yaml(value)
    except yaml.YAMLError:
        return f"--set '{text}': the value is not YAML; put it in quotes"
    return None


# --- telling what is wrong -----------------------------------------------------------------------


def sections() -> dict[str, type[Section]]:
    """Return the config's sections by name, in the order they are written."""
    found: dict[str, type[Section]] = {}
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found[name] = field.annotation
    return found


def known_keys() -> list[str]:
    """Return every key as a dotted path, such as `lora.rank`."""
    parts = sections()
    top = [name for name in Config.model_fields if name not in parts]
    return top + [f"{name}.{key}" for name, part in parts.items() for key in part.model_fields]


def _sentences(detail: ErrorDetails) -> Iterator[str]:
    """Turn one pydantic error into sentences with the key, the value and the fix."""
    kind, value = detail["type"], detail["input"]
    context: dict[str, Any] = detail.get("ctx") or {}
    # A union's member stands at the end of the place (data.train.str): it is not part of the key.
    depth = 2 if detail["loc"][:1] and detail["loc"][0] in sections() else 1
    key = ".".join(str(part) for part in detail["loc"][:depth])
    if kind == "contradiction":
        yield from str(context["text"]).split("\n")
    elif kind == "extra_forbidden":
        yield _unknown_key(key)
    elif kind == "literal_error":
        guess = did_you_mean(str(value), re.findall(r"'([^']*)'", context["expected"]))
        hint = f"; did you mean '{guess}'?" if guess else ""
        yield f"{key}: '{value}' is not one of {context['expected']}{hint}"
    elif kind in ("model_type", "model_attributes_type"):
        yield f"{key}: a section with keys is expected; got {json.dumps(value, default=str)}"
    else:
        message = detail["msg"][0].lower() + detail["msg"][1:]
        yield f"{key}: {message}; got {json.dumps(value, default=str)}"


# What other trainers call our keys (transformers, peft, trl, Unsloth, Axolotl).
_FOREIGN_NAMES = {
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "lora_target_modules": "lora.targets",
    "use_rslora": "lora.rslora",
    "use_dora": "lora.dora",
    "init_lora_weights": "lora.init",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "lr_scheduler_kwargs": "train.schedule_args",
    "neftune_noise_alpha": "train.neftune_alpha",
    "embedding_lr": "train.embedding_learning_rate",
    "optim": "train.optimizer",
    "optim_args": "train.optimizer_args",
    "optim_target_modules": "train.optimizer_targets",
    "loraplus_lr_ratio": "train.lora_plus_ratio",
    "report_to": "train.trackers",
    "eval_steps": "eval.steps",
    "early_stopping_patience": "eval.patience",
    "load_best_model_at_end": "eval.keep_best",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "micro_batch_size": "plan.tokens_per_pass",
    "examples_per_pass": "plan.tokens_per_pass",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.batch_size",
    "gradient_checkpointing": "plan.policy",
    "use_gradient_checkpointing": "plan.policy",
    "activation_checkpointing": "plan.policy",
    "sample_packing": "pack.enabled",
    "packing": "pack.enabled",
    "logging_steps": "train.log_steps",
    "save_steps": "train.checkpoint_steps",
    "save_total_limit": "train.keep_checkpoints",
    "random_state": "train.seed",
    "base_model": "model.name",
    "model_name": "model.name",
    "model_name_or_path": "model.name",
    "torch_dtype": "model.dtype",
    "max_seq_length": "model.max_length",
    "sequence_len": "model.max_length",
    "cutoff_len": "model.max_length",
    "output_dir": "run.dir",
    "datasets": "data.train",
    "dataset": "data.train",
    "val_set_size": "data.heldout_fraction",
}


def _unknown_key(key: str) -> str:
    guess = _meant_key(key)
    hint = f"did you mean `{guess}`?" if guess else "`whet init` writes every key with its meaning"
    return f"unknown key `{key}`; {hint}"


def _meant_key(key: str) -> str | None:
    """Find the key somebody meant: in its own section, under that name elsewhere, or close to it."""
    *head, last = key.split(".")
    if last in _FOREIGN_NAMES:  # a name that is known is no slip of the pen for one that is like it
        return _FOREIGN_NAMES[last]
    if head and (guess := did_you_mean(last, sections()[head[0]].model_fields)):
        return f"{head[0]}.{guess}"
    names = {known.rsplit(".", 1)[-1]: known for known in reversed(known_keys())}
    if last in names:
        return names[last]
    if not head and (guess := did_you_mean(last, Config.model_fields)):
        return guess
    guess = did_you_mean(last, names)
    return names[guess] if guess else None


# --- writing -------------------------------------------------------------------------------------

TEMPLATES: dict[str, dict[str, Any]] = {
    "sft": {},
    "qlora": {"model.load_in_4bit": True},
    "full": {"train.parameters": "full", "train.learning_rate": 2e-5},
    "last_layers": {"train.parameters": "last_layers", "train.learning_rate": 5e-5},
}


def commented_yaml(template: str = "sft", name: str = "run") -> str:
    """Return a config with every key at its default and its meaning above it.

    Args:
        template: One of TEMPLATES.
        name: Name of the run.
    """
    values = {
        "run.name": name,
        "data.train": "train.jsonl",
        "data.heldout_fraction": 0.1,
        **TEMPLATES[template],
    }
    lines = [
        "# A whet config. Check the data with `whet data FILE`, then run `whet train FILE`.",
        "# Every key is here with its default; delete what you do not change.",
        "",
    ]
    parts = sections()
    for name, field in Config.model_fields.items():
        if name not in parts:
            lines += [*_comment(field, ""), f"{name}: {_scalar(field.default)}", ""]
            continue
        lines += [f"{name}:"]
        for key, inner in parts[name].model_fields.items():
            value = values.get(f"{name}.{key}", inner.get_default(call_default_factory=True))
            lines += [*_comment(inner, "  "), f"  {key}: {_scalar(value)}"]
        lines.append("")
    return "\n".join(lines)


def _comment(field: FieldInfo, indent: str) -> list[str]:
    doc = " ".join((field.description or "").split())
    width = 96 - len(indent)
    lines, line = [], ""
    for word in doc.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [f"{indent}# {text}" for text in [*lines, line] if text]


def _scalar(value: Any) -> str:
    if isinstance(value, float) and value and abs(value) < 1e-3:
        return f"{value:g}"
    return json.dumps(value)


def to_yaml(config: Config) -> str:
    """Return the resolved config as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


def to_json_schema() -> str:
    """Return the JSON Schema (draft 2020-12) of a config file, for editors."""
    schema = Config.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "whet config"
    return json.dumps(schema, indent=2) + "\n"


def help_text(*names: str) -> str:
    """Return the keys of some sections, a line each, for a command's `--help`.

    Args:
        names: Sections, such as `model`; none means all.
    """
    lines = []
    for name, part in sections().items():
        if names and name not in names:
            continue
        for key, field in part.model_fields.items():
            doc = " ".join((field.description or "").split())
            default = _scalar(field.get_default(call_default_factory=True))
            lines.append(f"{name}.{key} = {default}\n    {doc}")
    return "\n".join(lines)
