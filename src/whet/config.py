"""The one config schema: YAML, JSON, Python dicts and `--set a.b=c` are all this.

A field's docstring is its help text everywhere: in `whet init`, in `whet COMMAND --help` and in the
JSON Schema for editors. Every key is checked, and every mistake is told at once.
Nothing here imports torch, so that the command line answers at once.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from whet.errors import InputError, did_you_mean


class Section(BaseModel):
    """A part of the config: strict types, no unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class RunSection(Section):
    """Where the run is kept."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its folder is `dir`/`name`."""
    dir: str = "runs"
    """Folder that holds the runs."""


class ModelSection(Section):
    """The model to start from."""

    name: str = "smollm2-135m"
    """Hub id, local Hugging Face folder, `.gguf` file, or the short name `smollm2-135m`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model; null is its main branch."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights in memory; null takes what the device computes fastest, and says which."""
    load_in_4bit: bool = False
    """Keep the frozen weights in NF4 with double quantisation (QLoRA, arXiv 2305.14314)."""
    max_length: int | None = Field(default=None, ge=8)
    """Longest example in tokens; null is the model's own limit, at most 2048."""
    chat_template: str | None = None
    """File with a Jinja chat template; null uses the tokenizer's own, or whet's plain one."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave it off unless you have read that code."""


class LoraSection(Section):
    """The adapter, used when `train.parameters` is `lora` (arXiv 2106.09685)."""

    rank: int = Field(default=16, ge=1)
    """Rank of the update; more rank learns more and costs more memory."""
    alpha: float = Field(default=32, gt=0)
    """Scale of the update: it is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout in front of the adapter."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained too."""
    targets: str | list[str] = "all-linear"
    """`all-linear` (every linear layer but the head), or names of modules, such as [q_proj, v_proj]."""
    init: Literal["default", "gaussian", "pissa", "loftq"] = "default"
    """Start of the adapter: default (zero update), gaussian, pissa (arXiv 2404.02948) or loftq
    (arXiv 2310.08659; needs `model.load_in_4bit`)."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, which suits large ranks (arXiv 2312.03732)."""
    dora: bool = False
    """Learn magnitude and direction apart (DoRA, arXiv 2402.09353); slower."""
    modules_to_save: list[str] = []
    """Modules trained in full beside the adapter, such as [embed_tokens, lm_head]."""


class DataSection(Section):
    """What is learned."""

    train: str | list[str] = ""
    """File (jsonl, json, csv, tsv, parquet, txt, md) or Hub dataset id (`id` or `id:split`); or a
    list of them. Paths are looked up beside the config file first, then in the working directory."""
    heldout: str | list[str] | None = None
    """Rows kept for evaluation, from files of their own."""
    heldout_fraction: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the training rows set aside for evaluation when `heldout` is null; the same rows each
    time, and copies of a row stay on one side."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt", "text"] = "auto"
    """Layout of a row: messages ([{role, content}]), sharegpt (conversations [{from, value}]), alpaca
    (instruction, input, output), prompt (prompt, completion), text; auto looks at the first row."""
    columns: dict[str, str] = {}
    """Where the format's columns are in your file, such as {instruction: question, output: answer}."""
    system: str | None = None
    """System prompt put before every conversation that has none."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Tokens that are learned: the assistant's turns, or all. Plain text is always learned whole."""
    text_rows: Literal["file", "line"] = "file"
    """A .txt or .md file is one document, or one document a line. Long documents are cut into
    windows of `model.max_length` tokens; nothing is dropped."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """A row that cannot be used: stop and tell, or skip it and count it."""
    max_rows: int | None = Field(default=None, ge=1)
    """Use at most this many training rows, from the start."""


class TrainSection(Section):
    """How it is learned."""

    parameters: Literal["lora", "full", "last_layers"] = "lora"
    """What is trained: an adapter (lora), every weight (full), or the last layers only."""
    last_layers: int = Field(default=2, ge=1)
    """How many decoder layers `parameters: last_layers` trains; the rest is frozen."""
    batch_size: int = Field(default=8, ge=1)
    """Examples in one optimizer step."""
    examples_per_pass: int | None = Field(default=None, ge=1)
    """Examples in one forward and backward pass; null fits the batch into as few passes as divide
    it, of at most 8 examples. It changes memory and speed, never the mathematics."""
    epochs: float = Field(default=1.0, gt=0)
    """Times each row is seen, when `max_steps` is null."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; overrides `epochs`."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate. 2e-4 suits LoRA; for `full`, 1e-5 to 5e-5 is usual."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up."""
    warmup_steps: int = Field(default=5, ge=0)
    """Steps over which the learning rate rises from zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW weight decay."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are clipped to this norm; 0 turns clipping off."""
    optimizer: str = "adamw_torch"
    """Optimizer, by its name in transformers.TrainingArguments: adamw_torch, adamw_8bit, sgd, ..."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    seed: int = Field(default=3407, ge=0)
    """Seed of the adapter's start, the order of the rows and dropout."""
    log_steps: int = Field(default=1, ge=1)
    """Steps between two lines of metrics.jsonl."""
    checkpoint_steps: int | None = Field(default=200, ge=1)
    """Steps between two checkpoints; null writes one at the end only."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many checkpoints are kept, the newest first."""


class EvalSection(Section):
    """What is measured on the held-out rows, for the base and for the tuned model."""

    batch_size: int = Field(default=40, ge=1)
    """Rows evaluated at once."""
    max_rows: int | None = Field(default=None, ge=1)
    """Use at most this many held-out rows; null uses all."""
    exact_match: bool = False
    """Generate the answer to each held-out row, greedily, and count those equal to the reference."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest generated answer; null is the longest reference answer and a little more."""
    samples: int = Field(default=3, ge=0)
    """Held-out rows shown with both models' answers."""
    steps: int | None = Field(default=None, ge=1)
    """Steps between two measurements of the held-out loss during training; null measures none."""


class Config(Section):
    """A whole run, as written in a config file."""

    method: Literal["sft"] = "sft"
    """Training method: sft learns the answers of conversations, or all of a plain text."""
    run: RunSection = RunSection()
    """Where the run is kept."""
    model: ModelSection = ModelSection()
    """The model to start from."""
    lora: LoraSection = LoraSection()
    """The adapter."""
    data: DataSection = DataSection()
    """What is learned."""
    train: TrainSection = TrainSection()
    """How it is learned."""
    eval: EvalSection = EvalSection()
    """What is measured."""

    @model_validator(mode="after")
    def _check_across_sections(self) -> Config:
        mistakes = list(_contradictions(self))
        if mistakes:
            raise PydanticCustomError("contradiction", "{text}", {"text": "\n".join(mistakes)})
        return self

    @property
    def examples_per_pass(self) -> int:
        """Examples in one pass: what the config says, or the largest divisor of the batch up to 8."""
        batch = self.train.batch_size
        return self.train.examples_per_pass or max(
            size for size in range(1, min(8, batch) + 1) if batch % size == 0
        )


def _contradictions(config: Config) -> Iterator[str]:
    """Yield a sentence for each pair of settings that cannot both hold."""
    train, lora = config.train, config.lora
    if config.model.load_in_4bit and train.parameters != "lora":
        yield (
            f"train.parameters '{train.parameters}' needs weights that can change, and "
            "model.load_in_4bit freezes them; set one of the two back"
        )
    if lora.init == "loftq" and not config.model.load_in_4bit:
        yield "lora.init 'loftq' corrects 4-bit weights; set model.load_in_4bit: true"
    if lora.init == "pissa" and config.model.load_in_4bit:
        yield "lora.init 'pissa' takes the weights apart, which 4-bit weights do not allow; use loftq"
    if config.data.heldout is not None and config.data.heldout_fraction:
        yield "data.heldout and data.heldout_fraction exclude each other; set one"
    if train.examples_per_pass and train.batch_size % train.examples_per_pass:
        yield (
            f"train.batch_size {train.batch_size} is not a multiple of train.examples_per_pass "
            f"{train.examples_per_pass}; change one"
        )


# --- reading -------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML whose `1e-4` is a number and whose doubled keys are errors."""


_Loader.yaml_implicit_resolvers = copy.deepcopy(yaml.SafeLoader.yaml_implicit_resolvers)
# YAML 1.1 reads 1e-4 as text because it has no dot; every config of a trainer has such a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _mapping_without_doubles(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, str) and key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key '{key}' is given twice", key_node.start_mark
            )
        seen.add(key if isinstance(key, str) else str(key))
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_doubles)


def parse_yaml(text: str) -> Any:
    """Parse YAML (or JSON, which is YAML) with numbers as people write them.

    Args:
        text: The document.

    Raises:
        yaml.YAMLError: The text is not YAML, or gives a key twice.
    """
    return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)


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
        tree, title = _read_file(Path(source)), f"{source} has mistakes:"
        _anchor_paths(tree, Path(source).resolve().parent)
    mistakes = [m for text in overrides if (m := _apply_override(tree, text)) is not None]
    config = None
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        mistakes += [line for detail in error.errors() for line in _sentences(detail)]
    if mistakes or config is None:
        raise InputError.listing(title, mistakes)
    return config


def _read_file(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise InputError(f"there is no config file '{path}'", fix="`whet init` writes one")
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}' is not UTF-8 text", f"byte {error.start}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise InputError(f"{at}: {error.problem}", fix="correct the YAML there") from error
    except yaml.YAMLError as error:
        raise InputError(f"'{path}' is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(
            f"'{path}' must hold sections (model, data, train, ...)",
            type(tree).__name__,
            "`whet init` writes an example",
        )
    return tree


def _anchor_paths(tree: dict[str, Any], folder: Path) -> None:
    """Make the file names that exist beside the config file absolute, so the run can move about."""

    def anchored(name: Any) -> Any:
        if isinstance(name, list):
            return [anchored(item) for item in name]
        beside = isinstance(name, str) and name and not Path(name).is_absolute() and folder / name
        return str(beside) if beside and beside.exists() else name

    for section, key in (
        ("data", "train"), ("data", "heldout"), ("model", "name"), ("model", "chat_template")
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
    "optim": "train.optimizer",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "micro_batch_size": "train.examples_per_pass",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.examples_per_pass",
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
    if head and (guess := did_you_mean(last, sections()[head[0]].model_fields)):
        return f"{head[0]}.{guess}"
    names = {known.rsplit(".", 1)[-1]: known for known in reversed(known_keys())}
    if last in names or last in _FOREIGN_NAMES:
        return names.get(last) or _FOREIGN_NAMES[last]
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


def commented_yaml(template: str = "sft") -> str:
    """Return a config with every key at its default and its meaning above it.

    Args:
        template: One of TEMPLATES.
    """
    values = {"data.train": "train.jsonl", "data.heldout_fraction": 0.1, **TEMPLATES[template]}
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
