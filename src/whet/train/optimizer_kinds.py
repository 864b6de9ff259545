"""Which optimizers there are, what each needs, and whether a config suits the one it names.

docs/optimizers.md is the table of all that the tests try, with what was measured. Making those that
transformers does not make is optimizers.py's.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from transformers.training_args import OptimizerNames

from whet.config import Config
from whet.errors import InputError, did_you_mean
from whet.sections import WITH_TRL, TrainSection

ADAM = ("beta1", "beta2", "epsilon")
GALORE = ("rank", "update_proj_gap", "scale", "proj_type")
APOLLO = ("rank", "proj", "scale_type", "update_proj_gap", "scale", "proj_type", *ADAM)
FREE = ("weight_lr_power", "r")


@dataclass(frozen=True, slots=True)
class OptimizerKind:
    """What an optimizer needs, and what can be set.

    Args:
        arguments: Names in `train.optimizer_args`.
        package: Module that must be there; empty for those of torch, transformers and bitsandbytes.
        extra: Extra of whet that brings it.
        in_backward: It steps inside the backward pass, gradient by gradient.
        projects: It projects the gradients of `train.optimizer_targets`.
        ignores: Keys of `train` that it does not use.
        state_classes: Classes in its state besides tensors and numbers, as `module:name`.
        state_attributes: Its attributes that are state, and that its `state_dict` leaves out.
        needs_cuda: Why it runs on CUDA only; empty when it does not.
    """

    arguments: tuple[str, ...] = ()
    package: str = ""
    extra: str = ""
    in_backward: bool = False
    projects: bool = False
    ignores: tuple[str, ...] = ()
    state_classes: tuple[str, ...] = ()
    state_attributes: tuple[str, ...] = ()
    needs_cuda: str = ""


def _galore(layerwise: bool = False, needs_cuda: str = "") -> OptimizerKind:
    return OptimizerKind(
        GALORE, "galore_torch", "galore", layerwise, True,
        ignores=("max_grad_norm",) if layerwise else (),
        state_classes=("galore_torch.galore_projector:GaLoreProjector",),
        needs_cuda=needs_cuda,
    )  # fmt: skip


def _apollo(layerwise: bool = False) -> OptimizerKind:
    return OptimizerKind(
        APOLLO, "apollo_torch", "apollo", layerwise, True,
        ignores=("max_grad_norm",) if layerwise else (),
        state_classes=(
            "apollo_torch.random_projector:GradientProjector",
            "apollo_torch.svd_projector:GaLoreProjector",
        ),
    )  # fmt: skip


_NOT_LOMO = ("max_grad_norm", "weight_decay")
_WAITS = "its package waits for CUDA after each parameter"
_ADAM = OptimizerKind(ADAM)

# Those that the tests try. Others that transformers knows are taken too, without settings of their own.
OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw_torch": _ADAM,
    "adamw_torch_fused": _ADAM,
    "adamw_8bit": _ADAM,
    "paged_adamw_8bit": _ADAM,
    "paged_adamw_32bit": _ADAM,
    "adafactor": OptimizerKind(),
    "lion_8bit": OptimizerKind(("beta1", "beta2")),
    "sgd": OptimizerKind(("momentum", "dampening", "nesterov")),
    "muon": OptimizerKind(("momentum", "nesterov", "ns_steps", "adjust_lr_fn", *ADAM)),
    "galore_adamw": _galore(),
    "galore_adamw_8bit": _galore(needs_cuda=_WAITS),
    "galore_adafactor": _galore(),
    "galore_adamw_layerwise": _galore(layerwise=True),
    "galore_adamw_8bit_layerwise": _galore(layerwise=True, needs_cuda=_WAITS),
    "galore_adafactor_layerwise": _galore(layerwise=True),
    "apollo_adamw": _apollo(),
    "apollo_adamw_layerwise": _apollo(layerwise=True),
    "lomo": OptimizerKind((), "lomo_optim", "lomo", in_backward=True, ignores=_NOT_LOMO),
    "adalomo": OptimizerKind(
        (), "lomo_optim", "lomo", in_backward=True, ignores=_NOT_LOMO,
        state_attributes=("step_num", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"),
        needs_cuda="its package makes the moments with .cuda()",
    ),
    "grokadamw": OptimizerKind(
        ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping"),
        "grokadamw", "grokadamw",
    ),
    "schedule_free_adamw": OptimizerKind((*FREE, *ADAM), "schedulefree", "schedulefree"),
    "schedule_free_sgd": OptimizerKind(FREE, "schedulefree", "schedulefree"),
    "schedule_free_radam": OptimizerKind((*FREE, *ADAM), "schedulefree", "schedulefree"),
    "stable_adamw": OptimizerKind(("max_lr", *ADAM), "optimi", "optimi"),
}  # fmt: skip


def kind_of(name: str) -> OptimizerKind:
    """Return what is known of an optimizer; nothing for one that only transformers knows."""
    return OPTIMIZERS.get(name, OptimizerKind())


def check_optimizer(config: Config) -> list[str]:
    """Check everything about the optimizer that can be checked before the model is loaded.

    Args:
        config: The whole config.

    Returns:
        What should be said about it, a sentence each.

    Raises:
        InputError: There is no such optimizer, its package is missing, or a setting does not suit it.
    """
    train = config.train
    name = train.optimizer
    known = list(dict.fromkeys([*OPTIMIZERS, *(str(other.value) for other in OptimizerNames)]))
    if name not in known:
        guess = did_you_mean(name, known)
        raise InputError(
            f"train.optimizer '{name}' is not one that transformers knows",
            fix=f"did you mean '{guess}'?" if guess else f"use one of {', '.join(known)}",
        )
    kind = kind_of(name)
    _check_package(name, kind)
    _check_settings(train, kind)
    _check_parameters(train, kind)
    own = kind.projects or name == "muon" or train.lora_plus_ratio is not None
    if own and config.method in WITH_TRL:
        raise InputError(
            f"method '{config.method}' is run by trl, which cannot use muon, LoRA+, GaLore or APOLLO as "
            "whet makes them",
            fix="set train.optimizer: adamw_torch and leave train.lora_plus_ratio out",
        )
    from whet.model.load import choose_dtype, device

    if kind.needs_cuda and device().type != "cuda":
        raise InputError(
            f"train.optimizer '{name}' needs a CUDA device: {kind.needs_cuda}",
            fix="take lomo or another that docs/optimizers.md says runs on a CPU",
        )
    if kind.in_backward:
        if choose_dtype(config.model.dtype, train.parameters != "lora")[0] is torch.float16:
            raise InputError(
                f"train.optimizer '{name}' steps inside the backward pass, before float16 gradients "
                "are scaled back",
                fix="set model.dtype: bfloat16 or float32, or take another optimizer",
            )
    notes = [
        f"train.{key} is not used by {name}" for key in kind.ignores if getattr(train, key)
    ]  # fmt: skip
    if name.startswith("schedule_free") and train.schedule != "constant":
        notes.append(f"train.schedule is not used by {name}, which needs none")
    return notes


def _check_package(name: str, kind: OptimizerKind) -> None:
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        raise InputError(
            "train.optimizer 'muon' needs torch 2.9 or newer",
            torch.__version__,
            "pip install -U torch",
        )
    if kind.package and importlib.util.find_spec(kind.package) is None:
        raise InputError(
            f"train.optimizer '{name}' needs the package {kind.package}, which is not installed",
            fix=f"pip install 'whet[{kind.extra}]'",
        )


def _check_settings(train: TrainSection, kind: OptimizerKind) -> None:
    for key, value in train.optimizer_args.items():
        if key not in kind.arguments:
            guess = did_you_mean(key, kind.arguments)
            raise InputError(
                f"train.optimizer_args: '{train.optimizer}' has no setting '{key}' here",
                fix=f"did you mean '{guess}'?"
                if guess
                else f"it has {', '.join(kind.arguments) or 'none'}",
            )
        if isinstance(value, str) and set(value) & set(",= "):
            raise InputError(f"train.optimizer_args.{key} is one word or number", repr(value))
        if key in ADAM and isinstance(value, str):
            raise InputError(f"train.optimizer_args.{key} is a number", repr(value))
    if train.optimizer_targets and not kind.projects:
        raise InputError(
            f"train.optimizer_targets is for optimizers that project gradients, not for "
            f"'{train.optimizer}'",
            fix="leave it out, or take galore_adamw or apollo_adamw",
        )


def _check_parameters(train: TrainSection, kind: OptimizerKind) -> None:
    if kind.projects and train.parameters == "lora":
        raise InputError(
            f"train.optimizer '{train.optimizer}' projects the gradients of whole weights, and "
            "train.parameters is lora",
            fix="set train.parameters: full or last_layers, or take adamw_torch",
        )
    plain = not (kind.projects or kind.in_backward or train.optimizer == "muon")
    for key in ("lora_plus_ratio", "embedding_learning_rate"):
        if getattr(train, key) is not None and not plain:
            raise InputError(
                f"train.{key} does not go with train.optimizer '{train.optimizer}'",
                fix="take adamw_torch, adamw_8bit or another that transformers steps",
            )


def optimizer_arguments(train: TrainSection) -> dict[str, Any]:
    """Translate the optimizer's name and settings into those of TrainingArguments."""
    kind, settings = kind_of(train.optimizer), dict(train.optimizer_args)
    translated: dict[str, Any] = {
        f"adam_{key}": float(settings.pop(key)) for key in ADAM if key in settings
    }
    translated["optim"] = "adamw_torch" if train.optimizer == "muon" else train.optimizer
    if settings and train.optimizer != "muon":
        translated["optim_args"] = ",".join(f"{key}={value}" for key, value in settings.items())
    if kind.in_backward:
        translated["max_grad_norm"] = 0.0  # gradients are gone before they could be clipped
    if train.optimizer.startswith("schedule_free"):
        # The optimizer warms up by itself.
        translated |= {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {}}
    return translated
