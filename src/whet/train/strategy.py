"""DDP, FSDP2, DeepSpeed and tensor parallel: what each needs, and how a model is made ready for it.

The names in `parallel.strategy` become calls of torch, transformers and accelerate here.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch

from whet.config import Config
from whet.engine.model import decoder_of
from whet.engine.swap import base_of, decoder_layers
from whet.errors import InputError
from whet.model import CausalLM
from whet.model.load import device
from whet.plan.parallel import PIECEWISE
from whet.sections import WITH_TRL
from whet.train.optimizer_kinds import kind_of
from whet.train.shards import Shards
from whet.train.world import World, join, size_in_environment


def join_world(config: Config) -> World:
    """Join the processes of the run, if a launcher has made several.

    Raises:
        InputError: This torch has no NCCL, or DeepSpeed is not installed.
    """
    size = size_in_environment() or 1
    strategy, on_cuda = config.parallel.strategy, torch.cuda.is_available()
    if not on_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no GPU
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
    found = list(faults(config, strategy))
    if found:
        raise InputError.listing(f"{world.size} processes cannot run this config:", found)
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
    if config.eval.keep_best:
        yield f"eval.keep_best needs the whole model, and strategy {strategy} cuts it; take ddp"
    if config.method == "kto" and strategy != "tp":
        yield f"method 'kto' does not go with strategy {strategy}; take ddp"
    if train.parameters == "lora" and strategy == "tp":
        yield "train.parameters 'lora' does not go with strategy tp, which cuts matrices; take fsdp"
    if config.model.load_in_4bit and strategy in ("deepspeed", "tp"):
        yield f"model.load_in_4bit does not go with strategy {strategy}; take ddp or fsdp"


def shards_of(config: Config, world: World) -> Shards | None:
    """Return how the model is spread, None where each process has all of it.

    Args:
        config: The run's config, with a strategy in place of `auto`.
        world: The processes.
    """
    strategy = config.parallel.strategy
    if world.size == 1 or strategy == "ddp":
        return None
    adapted = config.train.parameters == "lora"
    if strategy == "deepspeed":
        return Shards("zero3" if config.parallel.zero_stage == 3 else "zero2", adapted)
    return Shards("tp" if strategy == "tp" else "fsdp", adapted)


def loading_options(shards: Shards | None, world: World) -> dict[str, Any]:
    """Return arguments of transformers' `from_pretrained` for a model that will be spread."""
    if shards is None or shards.kind != "tp":
        return {}
    from transformers.distributed.configuration_utils import DistributedConfig

    plan = DistributedConfig(tp_size=world.size, tp_plan="auto")
    return {"distributed_config": plan, "device_map": None}


def reason_without_engine(shards: Shards | None) -> str:
    """Say why the engine stands aside, or nothing."""
    if shards is not None and shards.kind == "tp":
        return "tensor parallel cuts each matrix, and the engine multiplies by whole ones"
    if shards is not None and shards.kind == "zero3":
        return (
            "ZeRO 3 takes the weights away that the engine's functions keep for the backward pass"
        )
    return ""


def strategy_arguments(config: Config, world: World, shards: Shards | None) -> dict[str, Any]:
    """Return what TrainingArguments must know of several processes."""
    if world.size == 1:
        return {}
    settings: dict[str, Any] = {
        # Every trained parameter has a gradient in every pass; buffers are constants.
        "ddp_find_unused_parameters": False,
        "ddp_broadcast_buffers": False,
        # The processes have been joined already.
        "accelerator_config": {"use_configured_state": True},
    }
    if shards is not None and shards.kind == "tp":
        settings["save_strategy"] = "no"  # see callbacks.SaveEvery
    if shards is not None and shards.kind.startswith("zero"):
        # accelerate forgets about DeepSpeed where it is told of a CPU; the device is known already.
        settings.update(
            deepspeed=deepspeed_config(config, world), use_cpu=False, per_device_train_batch_size=1
        )
    return settings


def deepspeed_config(config: Config, world: World) -> dict[str, Any]:
    """Return DeepSpeed's config: ZeRO around the optimizer that whet makes.

    Args:
        config: The run's config.
        world: The processes.
    """
    stage, offload = config.parallel.zero_stage, {"device": "cpu"}
    zero: dict[str, Any] = {"stage": stage, "contiguous_gradients": True}
    if config.parallel.offload:
        zero["offload_optimizer"] = offload
        if stage == 3:
            zero["offload_param"] = offload
    return {
        "zero_optimization": zero,
        # A step's passes are whet's: DeepSpeed takes each for a batch of one and divides by nothing.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world.size,
        "gradient_clipping": config.train.max_grad_norm,
        # torch's AdamW, which needs no compiler.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def spread(model: CausalLM, shards: Shards, config: Config, world: World) -> CausalLM:
    """Spread a model over the processes, in place.

    Args:
        model: Adapted, with the engine in it.
        shards: How.
        config: The run's config.
        world: The processes.
    """
    if shards.kind == "fsdp":
        _shard_fully(model, config, world)
    if shards.kind in ("fsdp", "tp"):
        # accelerate's own mark: it is ready, and must not be put into DDP.
        model._is_accelerate_prepared = True  # type: ignore[attr-defined]
    return model


def _shard_fully(model: CausalLM, config: Config, world: World) -> None:
    """Spread each layer's weights, and those outside of the layers together (FSDP2).

    A layer's weights are whole from its call until its output is there, and again from when the
    gradient of its output is: both through hooks around the layer's `__call__`, in which the engine's
    functions read them. The tensors that a function has kept are the same ones in both, filled again.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    offload = config.parallel.offload and device().type == "cuda"
    _store_as_numbers(model)
    whole = {p for p in model.parameters() if not p.is_floating_point()}
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device().type, (world.size,)),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
        "ignored_params": whole,
    }
    for layer in decoder_layers(decoder_of(base_of(model))):
        fully_shard(layer, **options)
    fully_shard(model, **options)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")


def _store_as_numbers(model: CausalLM) -> None:
    """Have the bytes of 4-bit weights taken for numbers, which FSDP2 cuts and puts together.

    Their scales, an eighth of a bit a weight, stay whole in each process: bitsandbytes keeps them beside
    the parameter, and in the module.
    """
    for module in model.modules():
        weight: Any = module._parameters.get("weight")  # an adapter shows that of its base too
        if type(weight).__name__ != "Params4bit" or weight.dtype != torch.uint8:
            continue
        if weight.numel() % torch.bfloat16.itemsize == 0:
            module.quant_state = weight.quant_state  # type: ignore[assignment]
            numbers = weight.data.view(-1).view(torch.bfloat16).view(-1, 1)
            module.weight = torch.nn.Parameter(numbers, requires_grad=False)  # type: ignore[assignment]
