"""DDP, FSDP2, DeepSpeed and tensor parallel: what each needs, and how a model is made ready for it.

The names in `parallel.strategy` become calls of torch, transformers and accelerate here, and nowhere else.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch

from whet.config import Config
from whet.errors import InputError
from whet.model import CausalLM
from whet.sections import WITH_TRL
from whet.train.optimizer_kinds import kind_of
from whet.train.shards import Shards
from whet.train.world import World, join, size_in_environment

# Optimizers that step each number by itself, so that pieces of a tensor are as good as all of it.
PIECEWISE = ("adamw_torch", "adamw_torch_fused", "sgd")


def join_world(config: Config) -> World:
    """Join the processes of the run, if a launcher has made several.

    Raises:
        InputError: This torch has no NCCL, or DeepSpeed is not installed.
    """
    size = size_in_environment() or 1
    strategy, on_cuda = config.parallel.strategy, torch.cuda.is_available()
    if size > 1 and on_cuda and not torch.distributed.is_nccl_available():
        raise InputError(
            "this torch has no NCCL, through which GPUs talk to each other", torch.__version__,
            "install torch for CUDA on Linux, or use one GPU",
        )  # fmt: skip
    if size > 1 and strategy == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            "strategy 'deepspeed' needs the package deepspeed, which is not installed",
            fix="pip install 'whet[deepspeed]', or take --strategy fsdp",
        )
    return join(on_cuda, strategy == "deepspeed", size if strategy == "tp" else 1)


def check_strategy(config: Config, world: World) -> list[str]:
    """Check what can be checked before the model is loaded.

    Returns:
        What should be said about it, a sentence each.

    Raises:
        InputError: A setting does not go with several processes, or with the strategy.
    """
    strategy = config.parallel.strategy
    if world.size == 1:
        return [] if strategy == "auto" else [f"one process: strategy {strategy} is not used"]
    faults = list(faults(config, strategy))
    if faults:
        raise InputError.listing(f"{world.size} processes cannot run this config:", faults)
    return []


def faults(config: Config, strategy: str) -> Iterator[str]:
    """Yield a sentence for each setting that does not go with several processes and a strategy."""
    train = config.train
    if config.method in WITH_TRL:
        yield f"method '{config.method}' runs in one process"
    if kind_of(train.optimizer).in_backward:
        yield (
            f"train.optimizer '{train.optimizer}' steps before the gradients of other processes are "
            "there; take adamw_torch"
        )
    if strategy not in ("fsdp", "deepspeed", "tp"):
        return
    if train.optimizer not in PIECEWISE:
        yield (
            f"train.optimizer '{train.optimizer}' needs whole tensors, and strategy {strategy} cuts "
            f"them; take {', '.join(PIECEWISE)}"
        )
    if config.lora.init == "pissa" and train.parameters == "lora":
        yield f"lora.init 'pissa' needs whole weights, and strategy {strategy} cuts them; take default"
    if config.plan.embeddings != "device":
        yield f"plan.embeddings '{config.plan.embeddings}' is for one process or strategy ddp"
    if config.method == "kto" and strategy != "tp":
        yield f"method 'kto' does not go with strategy {strategy}; take ddp"
    if config.model.load_in_4bit and strategy in ("deepspeed", "tp"):
        yield f"model.load_in_4bit does not go with strategy {strategy}; take ddp or fsdp"


def shards_of(config: Config, strategy: str) -> Shards | None:
    """Return how the model is spread, None where each process has all of it.

    Args:
        config: The run's config.
        strategy: What `auto` came to.
    """
    if strategy in ("none", "ddp"):
        return None
    adapted = config.train.parameters == "lora"
    if strategy == "deepspeed":
        return Shards("zero3" if config.parallel.zero_stage == 3 else "zero2", adapted)
    return Shards("tp" if strategy == "tp" else "fsdp", adapted)


def loading_options(shards: Shards | None, world: World) -> dict[str, Any]:
    """Return arguments of transformers' `from_pretrained` for a model that will be spread."""
    return {}


def reason_without_engine(shards: Shards | None) -> str:
    """Say why the engine stands aside, or nothing."""
    return ""


def strategy_arguments(world: World, shards: Shards | None) -> dict[str, Any]:
    """Return what TrainingArguments must know of several processes."""
    if world.size == 1:
        return {}
    return {
        # Every trained parameter has a gradient in every pass; buffers are constants.
        "ddp_find_unused_parameters": False,
        "ddp_broadcast_buffers": False,
        # The processes have been joined already.
        "accelerator_config": {"use_configured_state": True},
    }


def spread(model: CausalLM, shards: Shards, config: Config, world: World) -> CausalLM:
    """Spread a model over the processes, in place.

    Args:
        model: Adapted, with the engine in it.
        shards: How.
        config: The run's config.
        world: The processes.
    """
    return model
