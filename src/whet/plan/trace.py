"""What one pass keeps and needs, found by running the engine itself on shapes.

A fake tensor has a shape and no memory. Layers run forward and backward on such tensors, with the run's
own code: its saved tensors are counted by kind, and its peak by the storages that are made and let go.
So there is no second description of the engine that could fall behind it. Layers that keep their own code
are counted in the same way.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from whet.engine.layer import LayerRecord
from whet.engine.memory import Policy, SavedTensors, planned_workspaces
from whet.engine.model import decoder_of
from whet.engine.swap import base_of, decoder_layers, set_policies
from whet.engine.unpad import from_lengths
from whet.plan.count import AllocationCounter, storages_of
from whet.plan.shape import ShapedModel, first_layers

# The kinds of saved tensors, by the names the halves save them under.
KINDS = {
    "x": "hidden", "h": "hidden", "qkv": "qkv", "out": "attention", "lse": "attention",
    "z": "attention", "gate_up": "gate_up", "u": "other",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PassTrace:
    """Bytes of one pass.

    Args:
        layers: Saved until the backward pass, by kind, layer by layer: `hidden`, `qkv`, `attention`,
            `gate_up`, and `other` for what no policy moves.
        outside: Saved by what is around the layers: embeddings, the last norm.
        around: Alive all through the pass, and not for the backward pass: angles of the rotation.
        working: The most that one layer needs on top, forward or backward.
    """

    layers: tuple[dict[str, int], ...]
    outside: int
    around: int
    working: int

    @property
    def saved(self) -> Counter[str]:
        """Bytes by kind over all layers."""
        total: Counter[str] = Counter()
        for layer in self.layers:
            total.update(layer)
        return total


def trace_pass(
    shaped: ShapedModel, lengths: Sequence[int], policy: Policy, device: str
) -> PassTrace:
    """Trace a pass over packed documents.

    Args:
        shaped: A model in shapes, with the engine in it.
        lengths: Tokens of each document.
        policy: Of every layer; `offload` is counted like `keep` here, see `memory.py`.
        device: What is planned for, `cpu` or `cuda`.
    """
    base = base_of(shaped.model)
    decoder = decoder_of(base)
    everything = decoder_layers(decoder)
    set_policies(base, [_without_offload(policy)] * len(everything))
    alike = _alike(everything)
    shown = max(alike) + 1  # the first layers, until every kind was there
    counter = AllocationCounter()
    with shaped.mode, first_layers(decoder, shown) as blocks, _as_in_training(base):
        layers = _LayerCounts(base, blocks, shaped.halved)
        packed, weight = from_lengths(list(lengths)), base.get_input_embeddings().weight
        # Where nothing is trained in front, nothing is saved until something is.
        trained = weight.requires_grad or any(p.requires_grad for p in blocks[0].parameters())
        with planned_workspaces(device) as workspaces, layers, counter:
            # What a layer in the middle is handed: a gradient goes back through it.
            x = torch.empty(
                (1, sum(lengths), weight.shape[1]), dtype=weight.dtype, requires_grad=trained
            )
            output = decoder(inputs_embeds=x, whet_packed=packed, use_cache=False)
            hidden = output.last_hidden_state
            kept = counter.now - sum(buffer.numel() for buffer in workspaces.values())
            peak_forward = counter.peak - kept
            counter.peak = counter.now
            if hidden.requires_grad:
                hidden.backward(torch.empty_like(hidden))
    scale = 2 if shaped.halved else 1
    working = scale * max(peak_forward, counter.peak - kept, 0)
    found, outside = layers.found, layers.outside
    around = scale * kept - outside - sum(sum(layer.values()) for layer in found)
    return PassTrace(tuple(found[n] for n in alike), outside, max(0, around), working)


def guess_pass(shaped: ShapedModel, num_tokens: int) -> PassTrace:
    """Guess what a pass saves in layers that transformers computes: inputs and outputs of every matrix.

    For models that the engine is not in, or that do not run on shapes. With gradient checkpointing the
    layers' inputs alone are kept, so all else counts as `gate_up`, which can be recomputed.

    Args:
        shaped: The model.
        num_tokens: Of the pass, padding included.
    """
    base = base_of(shaped.model)
    size = base.dtype.itemsize * (2 if shaped.halved else 1)
    width = base.config.get_text_config().hidden_size
    layers, largest = [], 0
    for block in decoder_layers(decoder_of(base)):
        sides = [
            sum(getattr(getattr(p, "quant_state", None), "shape", p.shape)[-2:])
            for p in block.parameters()
            if p.ndim >= 2
        ]
        inside = num_tokens * size * (sum(sides) + 4 * width)
        largest = max(largest, inside)
        layers.append(
            {"hidden": num_tokens * size * width, "qkv": 0, "attention": 0, "gate_up": inside, "other": 0}
        )  # fmt: skip
    return PassTrace(tuple(layers), 2 * num_tokens * size * width, 0, largest)


def _alike(blocks: Sequence[nn.Module]) -> list[int]:
    """Return, for each layer, the first one that saves as much: of the same structure and training."""
    first: dict[Any, int] = {}
    found, reached = [], False  # whether a layer before has something to train
    for number, block in enumerate(blocks):
        record = vars(block).get("_whet")
        spec = record.spec if isinstance(record, LayerRecord) else type(block)
        shapes = tuple((n, p.shape, p.requires_grad) for n, p in block.named_parameters())
        policy = record.policy if isinstance(record, LayerRecord) else None
        reached = reached or any(p.requires_grad for p in block.parameters())
        found.append(first.setdefault((spec, policy, shapes, reached), number))
    return found


def _without_offload(policy: Policy) -> Policy:
    """Return a policy that keeps what would be offloaded: its bytes are told apart by kind."""
    there = {
        name: "keep" if getattr(policy, name) == "offload" else getattr(policy, name)
        for name in ("hidden", "qkv", "attention", "gate_up")
    }
    return Policy(**there)  # type: ignore[arg-type]


@contextlib.contextmanager
def _as_in_training(base: nn.Module) -> Iterator[None]:
    """Put a model into the state of a second pass: training, with gradients there already."""
    modes = [(module, module.training) for module in base.modules()]
    base.train()
    trained = [p for p in base.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.grad = None
        for module, mode in modes:
            module.training = mode


class _LayerCounts(contextlib.AbstractContextManager["_LayerCounts"]):
    """Collects what each layer saves: by name where its halves are fused, else by torch's hooks."""

    def __init__(self, base: nn.Module, blocks: Sequence[nn.Module], halved: bool) -> None:
        self.blocks, self.halved = blocks, halved
        self.found: list[dict[str, int]] = []
        self._stack = contextlib.ExitStack()
        self._seen = storages_of(base)  # and those that some layer saved already
        self.outside = 0
        self._bytes = 0
        self._input: Any = None

    def __enter__(self) -> _LayerCounts:
        self._stack.enter_context(
            torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        )
        for block in self.blocks:
            self._stack.enter_context(
                block.register_forward_pre_hook(self._begin, with_kwargs=True)
            )
            self._stack.enter_context(block.register_forward_hook(self._end))
        return self

    def __exit__(self, *_: Any) -> None:
        self.outside += self._bytes
        self._stack.close()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            # Its place may be given to another storage, once nobody holds it.
            weakref.finalize(storage, self._seen.discard, storage._cdata).atexit = False
            self._bytes += storage.nbytes() * self._scale(tensor.dtype)
        return tensor

    def _scale(self, dtype: torch.dtype) -> int:
        return 2 if self.halved and dtype is torch.bfloat16 else 1

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.outside += self._bytes
        self._bytes = 0
        self._input = (args[0] if args else kwargs["hidden_states"]).grad_fn

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        kinds: dict[str, int] = dict.fromkeys(("hidden", "qkv", "attention", "gate_up", "other"), 0)
        y = output[0] if isinstance(output, tuple) else output
        record = vars(module).get("_whet")
        if isinstance(record, LayerRecord):
            for saved in _halves(y.grad_fn, self._input):
                for name, num_bytes in saved.sizes.items():
                    scale = 1 if name == "lse" else self._scale(torch.bfloat16)
                    kinds[KINDS[name]] += num_bytes * scale
        kinds["other"] += max(0, self._bytes - sum(kinds.values()))
        self.found.append(kinds)
        self._bytes = 0


def _halves(node: Any, stop: Any) -> Iterator[SavedTensors]:
    """Yield what the fused halves of one layer saved, back from its output to its input."""
    while node is not None and node is not stop:
        if type(node).__name__ in ("MlpHalfBackward", "AttentionHalfBackward"):
            yield node.saved
        node = next((n for n, _ in node.next_functions if n is not None), None)
