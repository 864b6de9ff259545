"""Passes recorded as CUDA graphs: forward and backward of one shape, launched all at once.

A layer of a small model is done before the host has launched the next one's kernels, so the GPU waits. A
CUDA graph is a pass recorded once, kernel by kernel with all its addresses, and launched as one. It
asks for shapes that repeat (`PackedPass.rounded`), for inputs, gradients and loss that stay where they
are, and for a host that decides nothing by what the GPU computed. Where that does not hold, passes run as
ever, and the reason is said once. The optimizer's step is not recorded: it is few kernels already.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from whet.engine import swap
from whet.engine.held import HostWeight
from whet.engine.passes import PackedPass

# Graphs that are kept, the one unused for longest dropped first. Each takes a few MB beside the tensors.
MOST_GRAPHS = 16
# Share of the device's memory that the graphs' tensors may take together: those of the largest pass. The
# plan knows of one pass at a time, and a pass that is not recorded has its tensors elsewhere.
MOST_MEMORY = 0.25
# Launches dominate where one layer's forward kernels take less than this: about 20 launches in each half
# of a layer with adapters, of 3 to 5 microseconds each. An assumption, not measured.
LAUNCH_SECONDS = 100e-6

RunPass = Callable[[PackedPass, torch.Tensor], torch.Tensor]


class Recorder(Protocol):
    """What runs work for the first time, records it, and knows the memory that this takes."""

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run work as it will be recorded, so that kernels are compiled and buffers made."""
        ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record work without running it; return what replays it."""
        ...

    def release(self) -> None:
        """Forget the memory of what was recorded, all of which is gone."""
        ...

    @property
    def num_bytes(self) -> int:
        """Memory that recorded work holds."""
        ...

    @property
    def most_bytes(self) -> int:
        """Memory that it may hold."""
        ...


class CudaRecorder:
    """Records CUDA graphs that share one memory pool.

    Nothing that a pass allocates outlives it: gradients, loss and inputs are outside of the pool. So
    graphs may use the same memory and be replayed in any order, one after the other.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, None
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run work on the stream that will record, as torch's notes on CUDA graphs ask."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record work into a graph."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            # What other threads do meanwhile, such as pinning memory, must not end the recording.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                work()
        finally:
            # torch 2.13's `graph` stays on its stream when ending a failed recording raises.
            torch.cuda.set_stream(current)
        return graph.replay

    def release(self) -> None:
        """Let the next graph begin a pool of its own."""
        self._pool = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the pool."""
        segments = torch.cuda.memory_snapshot() if self._pool else []
        return sum(s["total_size"] for s in segments if s["segment_pool_id"] == self._pool)

    @property
    def most_bytes(self) -> int:
        """The share of the GPU's memory that the pool may grow to."""
        return int(MOST_MEMORY * torch.cuda.get_device_properties(self._device).total_memory)


@dataclass(frozen=True, slots=True)
class RecordedPass:
    """A pass that was recorded: where it reads its inputs, and what replays it."""

    batch: PackedPass
    replay: Callable[[], None]


class GraphedPasses:
    """Runs passes of a model: the first of a shape as ever, the second recorded, then replayed.

    Args:
        model: The model, with the engine in it.
        recorder: Records; CudaRecorder but in tests.
        tell: Called with each reason for which passes run as ever, once.
        most_graphs: Graphs that are kept.
    """

    def __init__(
        self,
        model: Any,
        recorder: Recorder,
        tell: Callable[[str], None] = lambda reason: None,
        most_graphs: int = MOST_GRAPHS,
    ) -> None:
        self.model, self.recorder, self.most_graphs = model, recorder, most_graphs
        self._tell, self._told = tell, set()
        self._state: Any = None  # of the model, when its graphs were recorded
        self._against = self._failed = ""
        self._graphs: OrderedDict[Any, RecordedPass] = OrderedDict()
        self._warm: set[Any] = set()
        self._gradients: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._loss = self._num_items = torch.empty(0)

    @property
    def reason(self) -> str:
        """Why nothing is recorded at the moment; empty where it is."""
        return self._failed or self._against

    def begin_step(self) -> bool:
        """Make ready for the passes of one optimizer step: gradients go where graphs write them.

        Gradients that are None count as zero, as in eager passes; others are added to.

        Returns:
            Whether passes may be recorded; when not, see `reason`.
        """
        if self._failed:
            return False
        state = state_of(self.model)
        if state != self._state:
            self.clear()
            self._state, self._against = state, reason_against(self.model)
            self._say(self._against)
        stale = []
        for parameter, gradient in self._gradients:
            if parameter.grad is None:
                stale.append(gradient)
            elif parameter.grad is not gradient:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient
        if stale:
            torch._foreach_zero_(stale)  # type: ignore[attr-defined]
        return not self.reason

    def run(
        self, batch: PackedPass, num_items: torch.Tensor, run_pass: RunPass
    ) -> torch.Tensor | None:
        """Run a pass forward and backward, adding to the gradients; `begin_step` came before.

        Args:
            batch: The pass, on the device; shapes repeat where it is `rounded`.
            num_items: What the loss is divided by, a scalar tensor.
            run_pass: Computes loss and gradients of a pass, and returns the loss detached. It always
                computes the same: what the first one of a shape did is what is replayed.

        Returns:
            The loss; None when the caller must run the pass itself.
        """
        if self.reason:
            return None
        if batch.key not in self._graphs:
            if batch.key not in self._warm:
                return self._warm_up(batch, num_items, run_pass)
            if not self._record(batch, num_items, run_pass):
                return None
        self._graphs.move_to_end(batch.key)
        recorded = self._graphs[batch.key]
        recorded.batch.flat.copy_(batch.flat)
        self._num_items.copy_(num_items)
        recorded.replay()
        return self._loss.clone()  # the next replay writes over it

    def clear(self) -> None:
        """Forget every graph, its memory, and where gradients were; those that are there stay."""
        self._graphs.clear()
        self._warm.clear()
        self._gradients = []
        self.recorder.release()

    def _warm_up(
        self, batch: PackedPass, num_items: torch.Tensor, run_pass: RunPass
    ) -> torch.Tensor:
        losses = []
        self.recorder.warm_up(lambda: losses.append(run_pass(batch, num_items)))
        fallbacks = swap.met(self.model)["fallbacks"]
        if fallbacks:
            self._stop(f"not fused while training: {fallbacks[0]}")
            return losses[0]
        self._warm.add(batch.key)
        # Only now is known which parameters get a gradient at all: a zero in place of None would make an
        # optimizer decay the others.
        known = {id(parameter) for parameter, _ in self._gradients}
        for parameter in self.model.parameters():
            if parameter.grad is not None and id(parameter) not in known:
                gradient = torch.empty_like(parameter).copy_(parameter.grad)
                parameter.grad = gradient
                self._gradients.append((parameter, gradient))
        return losses[0]

    def _record(self, batch: PackedPass, num_items: torch.Tensor, run_pass: RunPass) -> bool:
        """Record a pass; tell whether it can be replayed."""
        static = replace(batch, flat=batch.flat.clone())
        if self._loss.device != batch.flat.device or not self._loss.numel():
            self._loss = torch.zeros((), device=batch.flat.device)
            self._num_items = num_items.clone()

        def work() -> None:
            self._loss.copy_(run_pass(static, self._num_items))

        failed = ""
        try:
            self._graphs[batch.key] = RecordedPass(static, self.recorder.record(work))
        except RuntimeError as error:  # out of memory, or what may not be recorded
            failed = str(error).strip().split("\n")[0]
        # Outside of the handler, whose traceback holds the tensors of the failed pass.
        if failed:
            self._stop(f"a pass could not be recorded: {failed}")
            return False
        if self.recorder.num_bytes > self.recorder.most_bytes:
            sizes = (self.recorder.num_bytes / 2**30, self.recorder.most_bytes / 2**30)
            self._stop("recorded passes hold {:.1f} GiB, of {:.1f} they may".format(*sizes))
            return False
        if len(self._graphs) > self.most_graphs:
            self._graphs.popitem(last=False)
        return True

    def _stop(self, reason: str) -> None:
        """Record nothing from now on."""
        self._failed = reason
        self.clear()
        self._say(reason)

    def _say(self, reason: str) -> None:
        if reason and reason not in self._told:
            self._told.add(reason)
            self._tell(reason)


def state_of(model: Any) -> Any:
    """Return what graphs of a model depend on besides the pass; they are void when it changes.

    Args:
        model: A model with the engine in it.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    where = tuple((id(p), p.data_ptr()) for p in trained)
    return id(swap.report_of(model)), swap.current_policies(model), where


def reason_against(model: Any) -> str:
    """Say why passes of a model cannot be recorded; nothing when they can, as far as can be seen.

    Args:
        model: A model, or a peft or parallel wrapper of one.
    """
    report, modules = swap.report_of(model), list(model.modules())
    parameters = list(model.parameters())
    if report is None:
        return "the engine is not in the model"
    if report.kept:
        return f"not fused, {next(iter(report.kept))}"
    fallbacks = swap.met(model)["fallbacks"]
    if fallbacks:
        return f"not fused while training: {fallbacks[0]}"
    if any(isinstance(m, nn.Dropout) and m.p for m in modules):
        return "dropout would need its random state recorded too"
    if any("offload" in astuple(policy) for policy in swap.current_policies(model)):
        return "saved tensors go to host memory (plan.policy)"
    if any(isinstance(getattr(m, "held", None), HostWeight) for m in modules):
        return "embeddings are in host memory (plan.embeddings)"
    if vars(swap.base_of(model))["_whet"].debug:
        return "engine.debug looks at every value"
    if any(p.dtype == torch.float16 for p in parameters):
        return "float16 needs a loss scale that changes"
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters):
        return "something takes gradients while they are made"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if torch.distributed.get_world_size() > 1:
            return "several processes share the gradients"
    return ""
