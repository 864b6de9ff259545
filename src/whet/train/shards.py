"""A model that is spread over processes: what is whole on disk and in pieces in memory.

A checkpoint looks the same whatever wrote it. Here its tensors are put together from the pieces, and cut
into pieces again, one at a time: FSDP2's and tensor parallel's are DTensors, DeepSpeed's know how.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from whet.train.steps import StepTrainer
    from whet.train.trainer import WhetTrainer

Kind = Literal["fsdp", "tp", "zero2", "zero3"]


@dataclass(frozen=True, slots=True)
class Shards:
    """How a model is spread.

    Args:
        kind: By what.
        whole_gradients: Gradients fit whole into one process, and are reduced once a step.
    """

    kind: Kind
    whole_gradients: bool = False

    def gradients_meet(
        self, trainer: StepTrainer, model: Any, last: bool
    ) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a pass, in which gradients are reduced or wait for the last pass."""
        trainer.accelerator.gradient_state._set_sync_gradients(last)
        if self.kind == "fsdp" and self.whole_gradients and not last:
            return _no_reduction(model)
        # Else every pass reduces, so that no process ever holds the gradients of the whole model.
        return contextlib.nullcontext()


@contextlib.contextmanager
def _no_reduction(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def clip_gradients_(parameters: Iterable[torch.Tensor], most: float) -> torch.Tensor:
    """Scale gradients, of which some are cut, to a norm of at most `most`; return the norm they had.

    transformers 5.17 counts a gradient that every process has whole once for each of them.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(whole))
    scale = (most / (total + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(scale)
    return total


@dataclass(frozen=True, slots=True)
class WholeState:
    """What a checkpoint holds of a model that is spread; empty but in rank 0."""

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]


def gather_state(trainer: WhetTrainer) -> WholeState:
    """Put weights and optimizer state together in rank 0; all processes take part.

    Args:
        trainer: Between two steps.
    """
    return WholeState(gather_weights(trainer), _gather_optimizer(trainer))


def gather_weights(trainer: WhetTrainer) -> dict[str, torch.Tensor]:
    """Put the weights together in rank 0, of an adapted model those that are trained."""
    model: Any = trainer.model
    adapted = hasattr(model, "peft_config")
    found: dict[str, torch.Tensor] = {}
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if (adapted and not tensor.requires_grad) or id(tensor) in seen:
            continue  # frozen, or tied to one that is there
        seen.add(id(tensor))
        whole = _whole(tensor)
        if trainer.world.is_first:
            found[name] = whole
    return found


def save_spread(trainer: WhetTrainer, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write a model as a single process would, from weights that rank 0 has put together.

    Args:
        trainer: Of the model.
        folder: Where to.
        weights: All of them, or those of its adapter.
    """
    model: Any = trainer.model
    # transformers would wait for the other processes to save with it, and note how it was cut.
    cut = vars(model.config).pop("distributed_config", None)
    model.save_pretrained(str(folder), state_dict=weights)
    if cut is not None:
        model.config.distributed_config = cut


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor, on the CPU; every process must ask."""
    if isinstance(tensor, DTensor):
        whole: torch.Tensor = tensor.full_tensor()
        return whole.detach().cpu()
    if hasattr(tensor, "ds_id"):  # ZeRO 3
        import deepspeed  # type: ignore[import-not-found]

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().cpu().clone()
    return tensor.detach().cpu()


def _gather_optimizer(trainer: WhetTrainer) -> dict[str, Any]:
    assert trainer.shards is not None
    if trainer.shards.kind.startswith("zero"):
        return _gather_deepspeed(trainer)
    state: dict[str, Any] = trainer.optimizer.state_dict()  # type: ignore[union-attr]
    whole = {}
    for number, values in state["state"].items():
        parts = {k: _whole(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        if trainer.world.is_first:
            whole[number] = parts
    return {**state, "state": whole}


def load_optimizer_state(trainer: WhetTrainer, folder: str) -> None:
    """Cut the optimizer state of a checkpoint into the pieces of this process.

    Args:
        trainer: Whose optimizer is made.
        folder: A checkpoint that was found whole.
    """
    assert trainer.shards is not None
    kept = torch.load(f"{folder}/optimizer.pt", map_location="cpu", weights_only=True)
    if trainer.shards.kind.startswith("zero"):
        _load_deepspeed(trainer, kept)
        return
    optimizer: Any = trainer.optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in kept["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameters[number].shape:
                values[key] = _piece(value, parameters[number])
    optimizer.load_state_dict(kept)


def _gather_deepspeed(trainer: WhetTrainer) -> dict[str, Any]:
    """Return AdamW's or SGD's state as torch writes it, from DeepSpeed's flat pieces."""
    from deepspeed.utils import (  # type: ignore[import-not-found]
        safe_get_full_optimizer_state,
    )

    _link_states(trainer)
    flat = _flat_states(trainer)
    keys = [key for key, value in flat[0].items() if key != "step"] if flat else []
    state, number = {}, 0
    for group in trainer.parameter_groups:
        for parameter in group:
            values = {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
            if trainer.world.is_first:
                state[number] = {
                    key: value.detach().cpu().clone().view(_shape(parameter))
                    for key, value in values.items()
                    if value is not None
                }
                if "step" in flat[0]:
                    state[number]["step"] = flat[0]["step"].detach().cpu().clone()
            number += 1
    return {"state": state, "param_groups": _plain_groups(trainer)}


def _plain_groups(trainer: WhetTrainer) -> list[dict[str, Any]]:
    """Return the optimizer's groups with numbers for parameters; DeepSpeed drops empty ones."""
    optimizer: Any = trainer.optimizer
    live, number, groups = list(optimizer.param_groups), 0, []
    for members in trainer.parameter_groups:
        group = live.pop(0) if members else {**optimizer.param_groups[0], "weight_decay": 0.0}
        settings = {key: value for key, value in group.items() if key != "params"}
        groups.append({**settings, "params": list(range(number, number + len(members)))})
        number += len(members)
    return groups


def _load_deepspeed(trainer: WhetTrainer, kept: dict[str, Any]) -> None:
    """Put a state that torch wrote into DeepSpeed's flat pieces, which are not made before a step."""
    from deepspeed.utils import (  # type: ignore[import-not-found]
        safe_set_full_optimizer_state,
    )

    zero = _zero_of(trainer)
    for piece in _flat_pieces(trainer):
        made = {k: torch.zeros_like(piece) for k in kept["state"][0] if k != "step"}
        if "step" in kept["state"][0]:
            made["step"] = kept["state"][0]["step"].clone()
        zero.optimizer.state[piece] = made
    _link_states(trainer)
    parameters = [p for group in trainer.parameter_groups for p in group]
    for number, values in kept["state"].items():
        for key, value in values.items():
            if key != "step":
                safe_set_full_optimizer_state(parameters[number], value, key)
    # The rate of the next step among them; DeepSpeed drops empty groups.
    filled = [group for group in kept["param_groups"] if group["params"]]
    for group, settings in zip(zero.param_groups, filled, strict=True):
        group.update({key: value for key, value in settings.items() if key != "params"})


def _link_states(trainer: WhetTrainer) -> None:
    """Have ZeRO 2 find the state of each parameter in its flat pieces.

    It does so by itself after the first group of the first step, when later groups have no state yet, and
    not again (deepspeed 0.19.8). This can go when it links every group.
    """
    zero = _zero_of(trainer)
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _zero_of(trainer: WhetTrainer) -> Any:
    wrapped: Any = trainer.model_wrapped
    return wrapped.optimizer


def _flat_pieces(trainer: WhetTrainer) -> list[torch.Tensor]:
    zero = _zero_of(trainer)
    stage3 = getattr(zero, "fp32_partitioned_groups_flat", None)
    return list(zero.single_partition_of_fp32_groups if stage3 is None else stage3)


def _flat_states(trainer: WhetTrainer) -> list[dict[str, torch.Tensor]]:
    zero = _zero_of(trainer)
    return [zero.optimizer.state[piece] for piece in _flat_pieces(trainer)]


def _shape(parameter: torch.Tensor) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _piece(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Cut a tensor that every process has all of, as another is cut."""
    if not isinstance(like, DTensor):
        return whole
    mesh = like.device_mesh
    return distribute_tensor(whole.to(like.device), mesh, like.placements, src_data_rank=None)
