"""A model that is spread over processes: what is whole on disk and in pieces in memory.

A checkpoint looks the same whatever wrote it. Here its tensors are put together from the pieces, and cut
into pieces again, one at a time: FSDP2's and tensor parallel's are DTensors, DeepSpeed's know how.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
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
        self, trainer: WhetTrainer, model: Any, last: bool
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
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if adapted and not tensor.requires_grad:
            continue
        whole = _whole(tensor)
        if trainer.world.is_first:
            found[name] = whole
    return found


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor, on the CPU; every process must ask."""
    if isinstance(tensor, DTensor):
        return tensor.detach().full_tensor().cpu()
    return tensor.detach().cpu()


def _gather_optimizer(trainer: WhetTrainer) -> dict[str, Any]:
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
    kept = torch.load(f"{folder}/optimizer.pt", map_location="cpu", weights_only=True)
    optimizer: Any = trainer.optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in kept["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameters[number].shape:
                values[key] = _piece(value, parameters[number])
    optimizer.load_state_dict(kept)


def _piece(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Cut a tensor that every process has all of, as another is cut."""
    if not isinstance(like, DTensor):
        return whole
    mesh = like.device_mesh
    return distribute_tensor(whole.to(like.device), mesh, like.placements, src_data_rank=None)


def load_whole_weights(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Load whole tensors into a model that is spread.

    Args:
        model: Some of its tensors may be missing in the weights, and stay as they are.
        weights: By name.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in weights:
            with torch.no_grad():
                tensor.copy_(_piece(weights[name].to(tensor.dtype), tensor))
