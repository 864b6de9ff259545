"""The optimizers that transformers does not make, or not as they are needed here.

muon; LoRA+ (peft's); and the projecting ones (GaLore, APOLLO), whose layer-wise kinds step inside the
backward pass: transformers' own keep their moments outside of what a checkpoint holds, and are scheduled
by hooks. optimizer_kinds.py has the names.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import Trainer
from transformers.training_args import OptimizerNames

from whet.errors import InputError
from whet.model.lora import decoder_layers
from whet.sections import TrainSection
from whet.train.optimizer_kinds import ADAM, kind_of

if TYPE_CHECKING:
    from transformers import TrainingArguments

GROUP_KEYS = "group_keys"


def make_optimizer(
    model: nn.Module, args: TrainingArguments, train: TrainSection, decayed: Iterable[str]
) -> torch.optim.Optimizer | None:
    """Make the optimizers that transformers does not make, or not as they are needed here.

    Args:
        model: The model, frozen and adapted.
        args: The trainer's arguments.
        train: The config's section.
        decayed: Names of the parameters that weight decay holds for.

    Returns:
        The optimizer, or None where transformers should make it.

    Raises:
        InputError: `train.optimizer_targets` names nothing that is trained.
    """
    if train.optimizer == "muon":
        return _make_muon(model, args, train, set(decayed))
    if train.lora_plus_ratio is not None:
        return _make_lora_plus(model, args, train.lora_plus_ratio)
    if kind_of(train.optimizer).projects:
        return _make_projecting(model, args, train, set(decayed))
    if train.optimizer == "stable_adamw" and args.device.type == "cpu":
        return _make_stable_on_cpu(model, args, set(decayed))
    return None


class JoinedOptimizer(torch.optim.Optimizer):
    """Several optimizers, each with parameters of its own, as one.

    Args:
        parts: The optimizers.
        in_backward: The parts are stepped by hooks in the backward pass, so `step` does nothing.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer], in_backward: bool = False) -> None:
        self.parts, self.in_backward = list(parts), in_backward
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        # Where schedules look for the rate; given above, it would be put into every group.
        self.defaults = {"lr": self.parts[0].defaults["lr"]}

    @property
    def state(self) -> dict[torch.Tensor, Any]:  # type: ignore[override]
        """The parts' states in one dict, to look at."""
        return {key: value for part in self.parts for key, value in part.state.items()}

    @state.setter
    def state(self, value: object) -> None:
        """Take nothing: torch's constructor sets an empty state, and the parts have theirs."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step each part, unless the backward pass did."""
        assert closure is None
        if not self.in_backward:
            for part in self.parts:
                part.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the parts' states, each as that optimizer writes it."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        # Loading makes new groups, which the scheduler must find here.
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def _make_muon(
    model: nn.Module, args: TrainingArguments, train: TrainSection, decayed: set[str]
) -> JoinedOptimizer:
    """Muon for the matrices of the layers, AdamW for embeddings, head, norms and biases."""
    outside = {
        id(parameter)
        for table in (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
        if isinstance(table, nn.Module)
        for parameter in table.parameters()
    }
    matrices, others, plain = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            hidden = parameter.ndim == 2 and id(parameter) not in outside
            (matrices if hidden else others if name in decayed else plain).append(parameter)
    settings: dict[str, Any] = {k: v for k, v in train.optimizer_args.items() if k not in ADAM}
    # Updates as large as AdamW's, so that a learning rate for one suits the other (arXiv 2502.16982).
    settings.setdefault("adjust_lr_fn", "match_rms_adamw")
    decay: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        parts.append(torch.optim.Muon(matrices, **decay, **settings))
    groups = [{"params": others}, {"params": plain, "weight_decay": 0.0}]
    if others or plain:
        betas = (args.adam_beta1, args.adam_beta2)
        parts.append(torch.optim.AdamW(groups, betas=betas, eps=args.adam_epsilon, **decay))
    return JoinedOptimizer(parts)


def _make_lora_plus(model: Any, args: TrainingArguments, ratio: float) -> torch.optim.Optimizer:
    """LoRA+ (arXiv 2402.12354): B matrices and vectors learn at `ratio` times the rate."""
    from peft.optimizers import create_loraplus_optimizer

    made, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
    settings.pop("lr")
    return create_loraplus_optimizer(
        model, made, lr=args.learning_rate, loraplus_lr_ratio=ratio,
        # peft's own rate for adapters of embeddings is 1e-6, whatever was asked for.
        loraplus_lr_embedding=args.learning_rate, loraplus_weight_decay=args.weight_decay,
        **settings,
    )  # fmt: skip


def let_embeddings_learn_at_(
    optimizer: torch.optim.Optimizer, model: nn.Module, rate: float
) -> None:
    """Give the embeddings and the head groups of their own in an optimizer that has not stepped.

    Adapters on them stay where they are: their matrices begin at nothing, and learn as others do.

    Args:
        optimizer: One that steps each group by the group's own settings.
        model: Whose parameters it has.
        rate: Of whole embeddings and of a whole head.

    Raises:
        InputError: Neither is trained.
    """
    tables = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    whole = {
        id(parameter)
        for table in tables
        if isinstance(table, nn.Module)
        for name, parameter in table.named_parameters()
        if parameter.requires_grad and "lora_" not in name
    }
    if not whole:
        raise InputError(
            "there is a learning rate for embeddings, and neither they nor the head are trained",
            fix="name them in modules_to_save (embed_tokens and lm_head of most models), or leave "
            "embedding_learning_rate out",
        )
    for group in list(optimizer.param_groups):
        chosen = [parameter for parameter in group["params"] if id(parameter) in whole]
        if chosen:
            group["params"] = [p for p in group["params"] if id(p) not in whole]
            optimizer.add_param_group({**group, "params": chosen, "lr": rate})


def _make_stable_on_cpu(
    model: Any, args: TrainingArguments, decayed: set[str]
) -> torch.optim.Optimizer:
    """torch-optimi's StableAdamW without its kernels, which 0.3.3 takes on a CPU too where triton is."""
    made, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
    settings.pop("weight_decay")
    groups = [group for group in _two_groups(model, args, decayed) if group["params"]]
    return made(groups, triton=False, **settings)


def make_for_tensor_parallel(
    model: nn.Module, args: TrainingArguments, decayed: Iterable[str]
) -> torch.optim.Optimizer:
    """Make AdamW or SGD that steps each tensor by itself: some are cut, and no call takes both kinds.

    transformers would put the two kinds into groups of their own, and a checkpoint's groups would not be
    those of one process.

    Args:
        model: Cut by a tensor parallel plan.
        args: The trainer's arguments.
        decayed: Names of the parameters that weight decay holds for.
    """
    made, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
    settings = {k: v for k, v in settings.items() if k not in ("fused", "weight_decay")}
    return made(_two_groups(model, args, set(decayed)), **{**settings, "foreach": False})


def _two_groups(model: nn.Module, args: TrainingArguments, decayed: set[str]) -> list[Any]:
    """Return what is trained in transformers' groups: what weight decay holds for, and the rest."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in named if n in decayed], "weight_decay": args.weight_decay},
        {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
    ]


def _make_projecting(
    model: nn.Module, args: TrainingArguments, train: TrainSection, decayed: set[str]
) -> torch.optim.Optimizer:
    """GaLore or APOLLO, one optimizer for all or one for each parameter.

    transformers' parameter groups hold frozen weights and leave weight decay out.
    """
    plain = copy.copy(args)
    plain.optim = OptimizerNames(train.optimizer.removesuffix("_layerwise"))
    plain.optim_target_modules = _target_modules(model, train.optimizer_targets)
    made, settings = Trainer.get_optimizer_cls_and_kwargs(plain, model)  # type: ignore[arg-type]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = []
    for group in settings.pop("params"):
        trained = [p for p in group["params"] if p.requires_grad]
        for decays in (True, False):
            some = [p for p in trained if (names[id(p)] in decayed) is decays]
            decay = args.weight_decay if decays else 0.0
            groups.append({**group, "params": some, "weight_decay": decay})
    groups = [group for group in groups if group["params"]]
    if not kind_of(train.optimizer).in_backward:
        return made(groups, **settings)
    parts = []
    for group in groups:
        for parameter in group["params"]:
            part = made([{**group, "params": [parameter]}], **settings)
            parameter.register_post_accumulate_grad_hook(partial(_step_now, part))
            parts.append(part)
    return JoinedOptimizer(parts, in_backward=True)


def _step_now(part: torch.optim.Optimizer, parameter: torch.Tensor) -> None:
    """Step one parameter as soon as its gradient is there, and let the gradient go."""
    part.step()
    parameter.grad = None


def _target_modules(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """Return the linear layers whose gradients are projected, by their whole paths.

    Args:
        model: The model.
        wanted: Parts of their paths; none means all of the decoder's layers.

    Raises:
        InputError: Nothing that is trained matches.
    """
    inside = {id(module) for layer in decoder_layers(model) for module in layer.modules()}
    trained = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad
    }
    if wanted:
        missing = [name for name in wanted if not any(name in path for path in trained)]
    else:
        missing = []
    found = [
        path
        for path, module in trained.items()
        if (any(name in path for name in wanted) if wanted else id(module) in inside)
    ]
    if missing or not found:
        some = sorted({path.rsplit(".", 1)[-1] for path in trained})
        raise InputError(
            f"train.optimizer_targets: no linear layer that is trained matches {missing or 'the layers'}",
            fix=f"there are {', '.join(some)}" if some else "take adamw_torch",
        )
    return found


def state_loading(name: str) -> AbstractContextManager[None]:
    """Let torch.load read the classes in an optimizer's state, and no others, while a body lasts."""
    classes = []
    for place in kind_of(name).state_classes:
        module, _, attribute = place.partition(":")
        if importlib.util.find_spec(module.split(".")[0]) and importlib.util.find_spec(module):
            classes.append(getattr(importlib.import_module(module), attribute))
    return torch.serialization.safe_globals(classes)


def move_state_(optimizer: torch.optim.Optimizer) -> None:
    """Move the tensors inside objects of a loaded state (projectors) to their parameter's device."""
    for parameter, state in optimizer.state.items():
        for value in state.values() if isinstance(state, dict) else ():
            for key, tensor in getattr(value, "__dict__", {}).items():
                if isinstance(tensor, torch.Tensor) and not isinstance(value, torch.Tensor):
                    setattr(value, key, tensor.to(parameter.device))


def outside_state(optimizer: Any, name: str) -> dict[str, Any]:
    """Return the state that an optimizer's `state_dict` leaves out, or that loading it would lose.

    Args:
        optimizer: As accelerate wraps it.
        name: Its name.

    Returns:
        Attributes of the optimizer; and, of one that keeps its moments in its parameter groups, by
        parameter (grokadamw), which parameter each of them belongs to.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    kept: dict[str, Any] = {key: getattr(inner, key) for key in kind_of(name).state_attributes}
    if any(isinstance(group.get("state"), dict) for group in inner.param_groups):
        kept[GROUP_KEYS] = []
        for group in inner.param_groups:
            numbers = {id(parameter): number for number, parameter in enumerate(group["params"])}
            kept[GROUP_KEYS].append([numbers[id(key)] for key in group.get("state", {})])
    return kept


def load_outside_state_(optimizer: Any, kept: dict[str, Any]) -> None:
    """Put back what `outside_state` returned, on the devices where it is now."""
    inner = getattr(optimizer, "optimizer", optimizer)
    for group, numbers in zip(inner.param_groups, kept.pop(GROUP_KEYS, ()), strict=False):
        # Its keys are now copies of the parameters, which the optimizer would not find.
        moments = list(group.get("state", {}).values())
        group["state"] = dict(zip((group["params"][n] for n in numbers), moments, strict=True))
    for key, value in kept.items():
        if isinstance(value, dict):
            now = getattr(inner, key)
            value = {name: tensor.to(now[name].device) for name, tensor in value.items()}
        setattr(inner, key, value)


def turn_optimizer(optimizer: torch.optim.Optimizer | None, mode: Literal["train", "eval"]) -> None:
    """Have a schedule-free optimizer put the weights of training, or those of use, into the model."""
    turn = getattr(optimizer, mode, None)
    if callable(turn):
        turn()
