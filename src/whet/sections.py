"""The sections of the config: every setting with its type, its default and its help text.

A field's docstring is its help text everywhere: in `whet init`, in `whet COMMAND --help` and in the
JSON Schema for editors. `config.py` puts the sections together and checks them against each other.
Nothing here imports torch, so that the command line answers at once.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from whet.schedules import Schedule

# Methods whose loss compares whole answers, in whet's own trainer.
PREFERENCES = ("dpo", "orpo", "kto")
# Methods that trl's trainers run.
WITH_TRL = ("reward", "grpo")


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
    """Hub id, local Hugging Face folder, `.gguf` file, llama2.c `.bin`, or the short name
    `smollm2-135m`. With `init: random` a folder with a config.json and a tokenizer is enough."""
    init: Literal["pretrained", "random"] = "pretrained"
    """Weights to start from: the model's own, or random ones as its config.json describes them, drawn
    with `train.seed` (training from scratch; needs `train.parameters: full`)."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model; null is its main branch."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights in memory; null takes what the device computes fastest, and says which."""
    load_in_4bit: bool = False
    """Keep the frozen weights in NF4 with double quantisation (QLoRA, arXiv 2305.14314)."""
    max_length: int | None = Field(default=None, ge=8)
    """Longest example in tokens; null is the model's own limit, at most 2048."""
    chat_template: str | None = None
    """Chat template: chatml, llama-3, mistral, gemma, phi-4, qwen, alpaca or zephyr, or a file with a
    Jinja template; null uses the tokenizer's own, or whet's plain one."""
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
    """File (jsonl, json, csv, tsv, parquet, arrow, txt, md; also .gz), folder, glob, or Hub dataset
    (`id` or `id:split`); or a list of them. `#500` behind a name draws 500 of its rows, the same ones
    each time. Paths are looked up beside the config file first, then in the working directory."""
    weights: list[float] = []
    """Times a row of each source in `train` is seen in an epoch, such as [1, 2, 0.5]; a share of a row
    is a seeded share of the rows. Empty is once each."""
    streaming: bool = False
    """Read Hub datasets row by row instead of downloading them whole first; `#500` and `max_rows` then
    take the first rows. Files are always read row by row, and no rows are kept in memory."""
    heldout: str | list[str] | None = None
    """Rows kept for evaluation, from files of their own."""
    heldout_fraction: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the training rows set aside for evaluation when `heldout` is null; the same rows each
    time, and copies of a row stay on one side."""
    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "alpaca",
        "prompt",
        "qa",
        "text",
        "preference",
        "kto",
        "tokens",
    ] = "auto"
    """Layout of a row: messages ([{role, content}]), sharegpt (conversations [{from, value}]), alpaca
    (instruction, input, output), prompt (prompt, completion), qa (question, answer), text, preference
    (chosen, rejected, and a prompt), kto (an answer with a label), or tokens (input_ids, and labels with
    -100 where nothing is learned); auto looks at the first row of each file."""
    columns: dict[str, str] = {}
    """Where the format's columns are in your file, such as {instruction: question, output: answer}."""
    formatting: str | None = None
    """Function that makes the text of rows, as `file.py:function` or `module:function`: it takes a dict
    of columns (lists of them, for many rows at once) and returns texts. It replaces `format`."""
    merge_turns: int = Field(default=1, ge=1)
    """Join this many neighbouring one-turn rows to one conversation, to learn several turns from them."""
    system: str | None = None
    """System prompt put before every conversation that has none."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Tokens that are learned: the assistant's turns, or all. Plain text is always learned whole."""
    text_rows: Literal["file", "paragraph", "line"] = "file"
    """A .txt or .md file is one document, or one a paragraph (blank lines between), or one a line. Long
    documents are cut into windows of `model.max_length` tokens; nothing is dropped."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """A row that cannot be used: stop and tell, or skip it and count it."""
    max_rows: int | None = Field(default=None, ge=1)
    """Use at most this many training rows, from the start."""
    allow: list[Literal["nothing_learned", "masked", "truncated", "no_end_of_turn", "overlap"]] = []
    """Faults of the data that do not stop the run: nothing_learned (no token of the whole set is),
    masked (more than 5% of the rows have no learned token left), truncated (more than 20% of the rows are
    cut at `model.max_length`), no_end_of_turn (no answer ends with a learned end-of-turn token), overlap
    (held-out rows are training rows too)."""
    cache: bool = True
    """Keep the tokenised rows in the user's cache folder, found again by what the files, the tokenizer,
    the template and these settings are; false prepares them anew each time."""
    workers: int | None = Field(default=None, ge=1)
    """Processes that tokenise; null takes one for each core, at most 8, once the rows are many."""


class TrainSection(Section):
    """How it is learned."""

    parameters: Literal["lora", "full", "last_layers"] = "lora"
    """What is trained: an adapter (lora), every weight (full), or the last layers only."""
    last_layers: int = Field(default=2, ge=1)
    """How many decoder layers `parameters: last_layers` trains; the rest is frozen."""
    batch_size: int = Field(default=8, ge=1)
    """Examples in one optimizer step. How many passes that takes is planned (`plan`), and changes
    memory and speed, never the mathematics."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens in one optimizer step, on average, instead of `batch_size` examples."""
    epochs: float = Field(default=1.0, gt=0)
    """Times each row is seen, when `max_steps` is null."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; overrides `epochs`."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate. 2e-4 suits LoRA; for `full`, 1e-5 to 5e-5 is usual."""
    schedule: Schedule = "linear"
    """Course of the learning rate after the warm-up; docs/optimizers.md has their formulas."""
    schedule_args: dict[str, str | float | int | bool] = {}
    """Settings of the schedule, by transformers' names, such as {min_lr_rate: 0.1} of
    cosine_with_min_lr or {num_decay_steps: 100} of warmup_stable_decay; docs/optimizers.md lists them."""
    warmup_steps: int = Field(default=5, ge=0)
    """Steps over which the learning rate rises from zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW weight decay."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are clipped to this norm; 0 turns clipping off."""
    optimizer: str = "adamw_torch"
    """Optimizer, by its name in transformers.TrainingArguments: adamw_torch, adamw_8bit (moments in a
    quarter of the memory), paged_adamw_8bit (CUDA: moved out when memory is short), sgd, ...; or muon
    (arXiv 2502.16982: the matrices of the layers, AdamW for the rest). docs/optimizers.md lists them."""
    optimizer_args: dict[str, str | float | int | bool] = {}
    """Settings of the optimizer, by the names that docs/optimizers.md lists for it, such as
    {rank: 64, update_proj_gap: 100}."""
    optimizer_targets: list[str] = []
    """Modules whose gradients galore_* and apollo_* optimizers project, such as [attn, mlp]; empty is
    every linear layer of the decoder that is trained."""
    lora_plus_ratio: float | None = Field(default=None, ge=1)
    """LoRA+ (arXiv 2402.12354): the B matrices learn at this many times `learning_rate`; 16 is usual.
    null leaves one rate for all."""
    embedding_learning_rate: float | None = Field(default=None, gt=0)
    """Peak rate of embeddings and head where they are trained themselves (`lora.modules_to_save`, or
    `parameters: full`), usually a fifth to a tenth of `learning_rate`; null takes that one."""
    neftune_alpha: float | None = Field(default=None, gt=0)
    """Noise on the embeddings while learning (NEFTune, arXiv 2310.05914), for sft and pretrain: uniform,
    up to this over the square root of the example's tokens times the model's width; 5 is usual. null
    adds none."""
    seed: int = Field(default=3407, ge=0)
    """Seed of the adapter's start, the order of the rows, dropout and noise."""
    shuffle: bool = True
    """Draw the order of the rows anew for each epoch; false keeps the order of the files."""
    log_steps: int = Field(default=1, ge=1)
    """Steps between two lines of metrics.jsonl."""
    checkpoint_steps: int | None = Field(default=200, ge=1)
    """Steps between two checkpoints; null writes one at the end only."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many checkpoints are kept, the newest first; the best one (`eval.keep_best`) besides."""
    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = []
    """Trackers that are told what metrics.jsonl is told, which is always written. tensorboard and wandb
    write into the run's folder; their own settings and environment variables hold."""


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
    block_tokens: int | None = Field(default=None, ge=1)
    """Tokens that go through an MLP at once; null takes 1024 on the CPU and 8192 on a GPU. It bounds
    the memory of one layer in a long pass."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Record a pass once and replay it, which saves the time between kernels: auto does it on a GPU
    for models whose passes are short work; on also where it hardly pays."""


class PackSection(Section):
    """How the examples of one optimizer step become passes."""

    enabled: bool = True
    """Lay examples side by side without padding; false pads them to rectangles, as other trainers do."""
    split: bool = False
    """Cut examples where a pass is full. A piece does not see what was before it, so this changes
    what is learned, a little."""
    buckets: Literal["auto", "on", "off"] = "auto"
    """Pad passes up to one of 32 lengths, so that shapes repeat; auto does it for CUDA graphs only."""


class PlanSection(Section):
    """What the memory is used for. None of it changes the mathematics but `embeddings: 8bit`."""

    preset: Literal["fast", "lean"] = "fast"
    """fast: the fastest plan that fits. lean: the least memory, an example a pass if need be."""
    memory: str | None = None
    """Memory to stay within, such as 12GB; null takes 90% of what is free when the run starts."""
    tokens_per_pass: int | None = Field(default=None, ge=1)
    """Most tokens of one forward and backward pass; null plans it. Longer examples pass alone."""
    policy: Literal["auto", "keep", "recompute", "offload"] = "auto"
    """What happens to saved tensors until the backward pass: kept; recomputed where that is cheap
    (gradient checkpointing); or moved to host memory, on the CPU to a scratch file (offload). auto
    chooses for each kind of tensor, and uses a scratch file never."""
    embeddings: Literal["device", "cpu", "8bit"] = "device"
    """Where frozen embeddings and the frozen head are: on the device, in host memory, or on the device
    in 8 bit, which changes the numbers a little."""
    probe: Literal["auto", "on", "off"] = "auto"
    """Run the longest pass once before training, and correct the plan by what was measured; auto does
    it where the plan is a rough one or uses more than half of the memory."""


class ParallelSection(Section):
    """How several processes share the work, when there are several (`--nproc`, torchrun, accelerate).

    None of it changes the mathematics.
    """

    strategy: Literal["auto", "ddp", "fsdp", "deepspeed", "tp"] = "auto"
    """ddp: each process has the whole model. fsdp: layers are spread over the processes (FSDP2).
    deepspeed: ZeRO. tp: each layer's matrices are spread (tensor parallel). auto takes the first of ddp
    and fsdp that fits into the memory."""
    zero_stage: Literal[2, 3] = 2
    """deepspeed: spread optimizer state and gradients (2), or the weights too (3)."""
    offload: bool = False
    """deepspeed and fsdp: keep what is spread in host memory, and with deepspeed step there."""


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
    patience: int | None = Field(default=None, ge=1)
    """Measurements in a row without a better held-out loss after which training stops; null: never."""
    keep_best: bool = False
    """Keep the checkpoint with the best held-out loss, and save its weights at the end of the run."""


class PreferenceSection(Section):
    """How pairs and judged answers are learned: methods dpo, orpo, kto and reward."""

    beta: float = Field(default=0.1, gt=0)
    """dpo and kto: how strongly the model is held to the reference (larger stays closer). orpo: weight
    of the odds ratio beside the plain loss."""
    loss_type: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """Loss of dpo: sigmoid (arXiv 2305.18290), ipo (arXiv 2310.12036, by the token) or hinge
    (arXiv 2305.10425)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the pairs taken to be judged the wrong way round (conservative DPO); sigmoid only."""
    reference: Literal["auto", "adapter_off", "start"] = "auto"
    """The model that dpo and kto stay close to. adapter_off: the base, with the adapter turned off, which
    costs no memory. start: the trained parameters as they were before training, kept beside. auto takes
    adapter_off where an adapter starts at nothing, else start."""
    nll_on: Literal["all", "answer"] = "all"
    """Tokens of a chosen text that orpo's plain loss is taken over: all, as in trl and in the authors'
    code, or the answer's alone."""
    desirable_weight: float = Field(default=1.0, ge=0)
    """kto: weight of the good answers (arXiv 2402.01306, eq. 8)."""
    undesirable_weight: float = Field(default=1.0, ge=0)
    """kto: weight of the bad answers; set the two so that both kinds weigh about the same."""
    share_prompts: bool = True
    """Compute what both answers of a pair begin with once; false computes it for each. It changes
    memory and speed, never the loss."""


class GrpoSection(Section):
    """How method grpo samples answers and judges them (arXiv 2402.03300); trl runs it."""

    reward: str | list[str] = []
    """Function that judges answers, as `file.py:function` or `module:function`, or a list of them. It is
    called with prompts, completions, and answer (those of the data), lists all, and returns a number for
    each. A file is looked up beside the config first."""
    num_generations: int = Field(default=8, ge=2)
    """Answers sampled to each prompt; they are compared with each other."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest sampled answer in tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the sampling."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the distance to the model before training; 0 needs no reference."""
