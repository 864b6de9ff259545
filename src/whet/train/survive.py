"""What a run does when memory runs out: recognise it, free what can be freed, and step again.

The pass that failed is cut smaller by the trainer (`StepTrainer.training_step`); here is what that needs.
With several processes each says what it wishes for, and all do the same.
"""

from __future__ import annotations

import functools
import gc
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from whet.data.tokenize import Tokens
from whet.engine.memory import release_workspaces
from whet.engine.offload import release_offload_buffers
from whet.errors import WhetError

if TYPE_CHECKING:
    from whet.train.steps import StepTrainer

# How allocators other than torch's CUDA one say it, in a RuntimeError.
_SIGNS = (
    "can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "alloc_failed",
    "cannot allocate memory",
)  # fmt: skip
MOST_TRIES = 3
# What a process wishes for: nothing; that the model keeps less; or a number of tokens a pass.
FITS, KEEP_LESS = -1, 0


class MemoryRanOutElsewhere(Exception):  # noqa: N818 - a message, not a fault of this process
    """Another process ran out of memory, and the step runs again.

    Args:
        wishes: What each process wishes for.
    """

    def __init__(self, wishes: list[int]) -> None:
        self.wishes = wishes
        super().__init__(wishes)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def free_memory() -> None:
    """Give back what is only held for later: garbage, the engine's buffers, CUDA's cached blocks."""
    gc.collect()
    release_workspaces()
    release_offload_buffers()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def does_not_fit(example: Tokens, reason: str) -> WhetError:
    """Return the error of a run in which one example alone does not fit.

    Args:
        example: Which.
        reason: What the allocator said.
    """
    return WhetError(
        f"one example alone does not fit into the memory: {example.where}",
        f"{len(example.input_ids):,} tokens; {reason}",
        "lower model.max_length below that, or set model.load_in_4bit: true, "
        "plan.embeddings: cpu or train.optimizer: adamw_8bit; then go on with --resume",
    )


def cannot_step_again(rank: int, reason: str) -> WhetError:
    """Return the error of a process that ran out of memory while all were at work together.

    Args:
        rank: Of the process.
        reason: What the allocator said.
    """
    return WhetError(
        f"memory ran out in process {rank}, where the others already waited for its part",
        reason,
        "lower plan.tokens_per_pass, and go on with --resume from the last checkpoint",
    )


def wish_for(trainer: StepTrainer, passes: list[list[Tokens]]) -> int:
    """Return what a process wishes for whose memory ran out: tokens of a pass, or KEEP_LESS."""
    failed = passes[trainer.at[0]]
    if len(failed) <= 1:
        return KEEP_LESS
    return max(1, max(trainer.packing.num_entered(group) for group in passes if group) // 2)


def make_room(
    trainer: StepTrainer, passes: list[list[Tokens]], reason: str, wishes: list[int]
) -> None:
    """Make the passes smaller, or else the model keep less, and tell it.

    Args:
        trainer: Whose passes these are.
        passes: Of the step.
        reason: What the allocator said.
        wishes: What each process wishes for; all that are given the same do the same.

    Raises:
        WhetError: The pass that failed is one example, and the model keeps the least already.
    """
    number, phase = trainer.at
    failed = passes[number]
    step, wish = trainer.state.global_step + 1, min(wish for wish in wishes if wish != FITS)
    event: dict[str, Any] = {
        "step": step, "event": "out_of_memory", "phase": phase, "pass": number + 1,
        "passes": len(passes), "tokens": trainer.packing.num_entered(failed) if failed else 0,
        "reason": reason,
    }  # fmt: skip
    text = f"memory ran out in step {step}, pass {number + 1} of {len(passes)}, {phase}: "
    if len(wishes) > 1:
        ranks = [rank for rank, wish in enumerate(wishes) if wish != FITS]
        event["ranks"] = ranks
        text = f"memory ran out in step {step}, in process {', '.join(map(str, ranks))}: "
    if wish != KEEP_LESS:
        trainer.packing = replace(trainer.packing, tokens_per_pass=wish)
        event["tokens_per_pass"] = wish
        text += f"the step runs again in passes of {wish:,} tokens"
    elif eased := trainer.settings.ease():
        trainer.times_eased += 1
        event["policy"] = eased
        text += f"the step runs again with saved tensors {eased}"
    elif failed:
        raise does_not_fit(failed[0], reason)
    else:
        raise cannot_step_again(trainer.world.rank, reason)
    trainer.settings.tell(event, text)


def check_one_pass(num_passes: int, reason: str = "") -> None:
    """Refuse what an optimizer that steps inside the backward pass (LOMO) cannot do.

    Args:
        num_passes: Of the step: each would be a step of its own.
        reason: Why the step would be run again: weights have been changed already.

    Raises:
        WhetError: There are several passes, or a reason.
    """
    if num_passes > 1 or reason:
        raise WhetError(
            "this optimizer steps inside the backward pass, so that a step must be one pass",
            reason or f"{num_passes} passes",
            "lower train.batch_size or model.max_length, or take another train.optimizer",
        )


@dataclass(frozen=True, slots=True)
class RandomState:
    """The state of torch's random generators, on the CPU and on every GPU."""

    cpu: torch.Tensor
    cuda: list[torch.Tensor]

    @classmethod
    def take(cls) -> RandomState:
        """Remember the state."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Set the generators back to it."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


def step_again_when_out_of_memory_(
    optimizer: torch.optim.Optimizer, tell: Callable[[str], None]
) -> None:
    """Have an optimizer's step try again after memory ran out, while nothing was changed yet.

    The first step makes the moments, after all passes: the likeliest place for an optimizer to run
    out. torch counts writes to a tensor (`_version`), so a step that failed before it wrote is known.

    Args:
        optimizer: Its `step` is replaced, on this instance.
        tell: Called with a sentence for each time.
    """
    step: Any = optimizer.step

    @functools.wraps(step.__func__)
    def patient_step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        for left in reversed(range(MOST_TRIES)):
            before = _versions(self)
            try:
                return step(*args, **kwargs)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                now = _versions(self)
                if not left or any(now[key] != version for key, version in before.items()):
                    raise WhetError(
                        "memory ran out in the optimizer's step",
                        str(error).split("\n")[0],
                        "set train.optimizer: adamw_8bit, or train fewer parameters; then go on "
                        "with --resume from the last checkpoint",
                    ) from error
            free_memory()
            tell("memory ran out in the optimizer's step; freed what could be, and stepping again")
        raise AssertionError("unreachable")

    optimizer.step = types.MethodType(patient_step, optimizer)


def _versions(optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """Return how often each parameter and each tensor of the optimizer's state was written."""
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return {id(tensor): tensor._version for tensor in tensors}
