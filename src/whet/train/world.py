"""The processes of a run: how many there are, which one this is, and how they wait for each other.

Whoever started them (whet's own `--nproc`, torchrun, accelerate launch, srun) said so in the environment,
and accelerate joins them: nothing is sent here but through its calls.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

# A process may wait this long for another that tokenises, measures or writes.
LONGEST_WAIT = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run, as one of them sees them.

    Args:
        size: Processes in all.
        rank: This one's number.
        local_rank: Its number on this machine.
        local_size: Processes on this machine.
        tensor: Processes that compute one replica of the model together.
    """

    size: int = 1
    rank: int = 0
    local_rank: int = 0
    local_size: int = 1
    tensor: int = 1

    @property
    def shares(self) -> int:
        """Parts that a step is cut into: the replicas of the model."""
        return self.size // self.tensor

    @property
    def share(self) -> int:
        """Which of them is this process's."""
        return self.rank // self.tensor

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reports and writes."""
        return self.rank == 0

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Run the body in rank 0, then in the others: what it makes is there by then."""
        if self.size == 1:
            yield
            return
        from accelerate import PartialState

        with PartialState().main_process_first():
            yield

    def agree(self, value: Any) -> Any:
        """Return rank 0's value in every process."""
        if self.size == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, in the order of the ranks."""
        if self.size == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])


def size_in_environment() -> int | None:
    """Return how many processes a launcher says there are, or None when there was no launcher."""
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if size.isdigit() and "RANK" in os.environ else None


def join(on_cuda: bool, deepspeed: bool = False, tensor: int = 1) -> World:
    """Join the processes that a launcher has started.

    Args:
        on_cuda: Each process drives a GPU; else they meet through gloo.
        deepspeed: DeepSpeed will run the optimizer, and must know of the group.
        tensor: Processes that compute one replica together.
    """
    size = size_in_environment()
    if size is None or size == 1:
        return World()
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # Of a run before this one, in the same processes; its ZeRO 3 would cut every model that is made.
    AcceleratorState._reset_state()
    unset_hf_deepspeed_config()
    if not PartialState._shared_state:
        if deepspeed:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # how accelerate is told
        # accelerate knows DeepSpeed only where it was not told that this is a CPU.
        backend = None if on_cuda else "gloo"
        PartialState(cpu=not (on_cuda or deepspeed), backend=backend, timeout=LONGEST_WAIT)
    state = PartialState()
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return World(
        state.num_processes, state.process_index, state.local_process_index, local_size, tensor
    )
