"""The one config schema: YAML, JSON, Python dicts and `--set a.b=c` are all this.

Its sections are in `sections.py`; reading and writing configs is `config_file.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from whet.schedules import schedule_faults
from whet.sections import (
    PREFERENCES,
    WITH_TRL,
    DataSection,
    EngineSection,
    EvalSection,
    GrpoSection,
    LoraSection,
    ModelSection,
    PackSection,
    ParallelSection,
    PlanSection,
    PreferenceSection,
    RunSection,
    Section,
    TrainSection,
)


def parse_bytes(text: str) -> int:
    """Read an amount of memory as people write it: 12GB, 11.5 GiB, 800MB, or bytes.

    Cards are sold in GB and hold GiB (12 GB are 12,288 MiB), so both mean 2^30 here, as in nvidia-smi.

    Raises:
        ValueError: It is not an amount; the text says what is.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)i?B?\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise ValueError(f"'{text}' is no amount of memory; write 12GB or 800MB")
    power = "KMGT".index(found[2].upper()) + 1 if found[2] else 0
    return int(float(found[1]) * 1024**power)


class Config(Section):
    """A whole run, as written in a config file."""

    method: Literal["sft", "pretrain", "dpo", "orpo", "kto", "reward", "grpo"] = "sft"
    """Training method: sft learns the answers of conversations, or all of a plain text; pretrain learns
    plain text only; dpo and orpo learn from pairs (chosen, rejected), kto from answers with a label,
    reward makes a model that scores answers, of pairs; grpo samples answers and learns from
    `grpo.reward`."""
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
    pack: PackSection = PackSection()
    """How examples become passes."""
    engine: EngineSection = EngineSection()
    """How layers and loss are computed."""
    plan: PlanSection = PlanSection()
    """What the memory is used for."""
    parallel: ParallelSection = ParallelSection()
    """How several processes share the work."""
    eval: EvalSection = EvalSection()
    """What is measured."""
    preference: PreferenceSection = PreferenceSection()
    """How pairs and judged answers are learned."""
    grpo: GrpoSection = GrpoSection()
    """How answers are sampled and judged."""

    @model_validator(mode="after")
    def _check_across_sections(self) -> Config:
        mistakes = list(_contradictions(self))
        if mistakes:
            raise PydanticCustomError("contradiction", "{text}", {"text": "\n".join(mistakes)})
        return self


def _contradictions(config: Config) -> Iterator[str]:
    """Yield a sentence for each pair of settings that cannot both hold."""
    train, lora = config.train, config.lora
    if config.model.load_in_4bit and train.parameters != "lora":
        yield (
            f"train.parameters '{train.parameters}' needs weights that can change, and "
            "model.load_in_4bit freezes them; set one of the two back"
        )
    if config.model.init == "random" and train.parameters != "full":
        yield (
            f"model.init 'random' makes weights that know nothing, and train.parameters "
            f"'{train.parameters}' would leave them so; set train.parameters: full"
        )
    if lora.init == "loftq" and not config.model.load_in_4bit:
        yield "lora.init 'loftq' corrects 4-bit weights; set model.load_in_4bit: true"
    if lora.init == "pissa" and config.model.load_in_4bit:
        yield "lora.init 'pissa' takes the weights apart, which 4-bit weights do not allow; use loftq"
    if config.data.heldout is not None and config.data.heldout_fraction:
        yield "data.heldout and data.heldout_fraction exclude each other; set one"
    if config.plan.embeddings != "device" and train.parameters != "lora":
        yield (
            f"plan.embeddings '{config.plan.embeddings}' is for frozen embeddings; with "
            f"train.parameters '{train.parameters}' leave it at device"
        )
    if config.plan.policy in ("recompute", "offload") and not config.engine.enabled:
        if config.plan.policy == "offload":
            yield "plan.policy 'offload' needs the engine; set engine.enabled: true"
    if train.lora_plus_ratio is not None and train.parameters != "lora":
        yield "train.lora_plus_ratio is for adapters; leave it out or set train.parameters: lora"
    yield from schedule_faults(train.schedule, train.schedule_args, train.learning_rate)
    if train.neftune_alpha is not None and config.method not in ("sft", "pretrain"):
        yield f"train.neftune_alpha is for sft and pretrain; leave it out with method '{config.method}'"
    if train.embedding_learning_rate is not None and config.method in WITH_TRL:
        yield f"train.embedding_learning_rate is not for method '{config.method}'; leave it out"
    if (config.eval.patience or config.eval.keep_best) and not config.eval.steps:
        yield "eval.patience and eval.keep_best go by the held-out loss during training; set eval.steps"
    if config.eval.steps and config.data.heldout is None and not config.data.heldout_fraction:
        yield "eval.steps measures held-out rows; set data.heldout or data.heldout_fraction"
    if config.pack.split and not config.pack.enabled:
        yield "pack.split cuts packed examples; set pack.enabled: true"
    if config.method in PREFERENCES and config.data.loss_on == "all":
        yield f"method '{config.method}' compares answers; leave data.loss_on at assistant"
    if config.method in PREFERENCES and config.pack.split:
        yield f"method '{config.method}' needs whole answers; set pack.split: false"
    if config.preference.label_smoothing and config.preference.loss_type != "sigmoid":
        yield "preference.label_smoothing is for preference.loss_type sigmoid; set one of the two back"
    if config.preference.reference == "adapter_off" and train.parameters != "lora":
        yield (
            f"preference.reference 'adapter_off' needs an adapter; with train.parameters "
            f"'{train.parameters}' set it to start"
        )
    if config.method == "grpo" and not config.grpo.reward:
        yield "method 'grpo' needs a function that judges answers; set grpo.reward: file.py:function"
    if config.method == "reward" and config.model.load_in_4bit:
        yield "method 'reward' does not train 4-bit models yet; set model.load_in_4bit: false"
    if config.method == "kto" and train.batch_size < 2:
        yield "method 'kto' compares the answers of a step; set train.batch_size: 2 or more"
    if config.plan.memory is not None:
        try:
            parse_bytes(config.plan.memory)
        except ValueError as error:
            yield f"plan.memory: {error}"
