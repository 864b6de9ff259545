"""The one config schema: YAML, JSON, Python dicts and `--set a.b=c` are all this.

A field's docstring is its help text everywhere: in `whet init`, in `whet COMMAND --help` and in the
JSON Schema for editors. Reading and writing configs is `config_file.py`'s.
Nothing here imports torch, so that the command line answers at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


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


class EngineSection(Section):
    """How layers and loss are computed."""

    enabled: bool = True
    """Compute decoder layers and the loss with whet's engine; false leaves transformers' own code."""
    check: Literal["quick", "full", "off"] = "quick"
    """Compare the engine with the original before training: one layer of each structure, the whole
    model and one real pass (quick), every layer (full), or nothing (off). What differs is not used."""
    strict: bool = False
    """Make it an error when any part keeps its original code, instead of a line in the report."""
    debug: bool = False
    """Look at every layer's output and gradient, and name the first that is not finite; slower."""
    head_rows: int | None = Field(default=None, ge=1)
    """Labelled tokens whose logits exist at once; null takes 256 on the CPU and 1024 on a GPU. It
    changes memory and speed, never the loss."""


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
    engine: EngineSection = EngineSection()
    """How layers and loss are computed."""
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
