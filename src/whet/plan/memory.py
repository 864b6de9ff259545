"""The memory of a run, item by item: what is there all the time, and what one pass adds.

Static items are counted on the meta model, tensor by tensor. A pass is traced (trace.py). Both are bytes
of tensors; what an allocator loses between them and what the process needs besides have their own items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from whet.engine.head import CHUNK_ROWS
from whet.engine.held import TILE_ROWS
from whet.engine.memory import Policy
from whet.engine.swap import base_of
from whet.plan.count import quantisation_tensors
from whet.plan.shape import ShapedModel
from whet.plan.trace import PassTrace, guess_pass, trace_pass

Where = Literal["device", "host", "disk"]
POLICY_KINDS = ("hidden", "qkv", "attention", "gate_up")
# What an allocator keeps between tensors of a pass, as a share of them: an assumption, which the probe
# corrects. On the CPU glibc gives large blocks back.
SLACK = {"cuda": 0.05, "cpu": 0.02}


@dataclass(frozen=True, slots=True)
class Item:
    """One line of the plan.

    Args:
        name: What it is.
        num_bytes: How much.
        where: On the device, in host memory or on the disk.
    """

    name: str
    num_bytes: int
    where: Where = "device"


@dataclass(frozen=True)
class Static:
    """Bytes that are there from the first step on.

    Args:
        weights: Dense weights of the layers.
        quantised: 4-bit weights with their scales.
        embeddings: Input embeddings and head, tied ones once.
        embeddings_where: Where they are.
        adapters: Trained adapter weights.
        gradients: Of everything that is trained.
        states: Of the optimizer.
        states_where: In host memory for paged optimizers.
        step: What the optimizer's step needs besides.
    """

    weights: int
    quantised: int
    embeddings: int
    embeddings_where: Where
    adapters: int
    gradients: int
    states: int
    states_where: Where
    step: int

    @cached_property
    def items(self) -> list[Item]:
        """The items, empty ones left out."""
        found = [
            Item("weights", self.weights),
            Item("quantised weights", self.quantised),
            Item("embeddings and head", self.embeddings, self.embeddings_where),
            Item("adapters", self.adapters),
            Item("gradients", self.gradients),
            Item("optimizer states", self.states, self.states_where),
        ]
        return [item for item in found if item.num_bytes]


def num_bytes(module: nn.Module) -> int:
    """Count the bytes of a module's parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def static_memory(
    model: Any, optimizer: str, embeddings: str = "device", device: str = "cpu"
) -> Static:
    """Count what a model needs besides its passes.

    Args:
        model: The meta model (or a real one), adapted and frozen.
        optimizer: By its name in transformers.
        embeddings: As in `plan.embeddings`.
        device: What is planned for.
    """
    base = base_of(model)
    tables = {
        id(module.weight)
        for module in (base.get_input_embeddings(), base.get_output_embeddings())
        if isinstance(getattr(module, "weight", None), torch.Tensor)
    }
    weights = quantised = table_bytes = adapters = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel() * parameter.element_size()
        scales = sum(t.numel() * t.element_size() for *_, t in quantisation_tensors(parameter))
        if id(parameter) in tables:
            table_bytes += _placed(parameter, embeddings)
        elif "lora_" in name:
            adapters += size
        elif scales:
            quantised += size + scales
        else:
            weights += size
    trained = [p for p in model.parameters() if p.requires_grad]
    # It steps in the backward pass, gradient by gradient.
    fused_step = optimizer in ("lomo", "adalomo") or optimizer.endswith("_layerwise")
    largest = max((4 * p.numel() for p in trained), default=0)
    return Static(
        weights=weights,
        quantised=quantised,
        embeddings=table_bytes,
        embeddings_where="host" if embeddings == "cpu" and device == "cuda" else "device",
        adapters=adapters,
        gradients=largest if fused_step else sum(p.numel() * p.element_size() for p in trained),
        states=sum(state_bytes(optimizer, p) for p in trained),
        states_where="host" if optimizer.startswith("paged") and device == "cuda" else "device",
        # torch's AdamW takes all parameters at once on CUDA, one after the other on the CPU.
        step=sum(4 * p.numel() for p in trained) if device == "cuda" else 2 * largest,
    )


def _placed(parameter: nn.Parameter, where: str) -> int:
    """Return the bytes of an embedding table, in 8 bit with a float32 scale a row where that is asked."""
    if where == "8bit":
        return parameter.numel() + 4 * parameter.shape[0]
    return parameter.numel() * parameter.element_size()


def state_bytes(optimizer: str, parameter: torch.Tensor) -> int:
    """Return the bytes an optimizer keeps for one parameter.

    Args:
        optimizer: By its name in transformers; one that is not known counts like AdamW.
        parameter: Its shape and dtype count.
    """
    num, size = parameter.numel(), parameter.element_size()
    if optimizer in ("sgd", "lomo", "adalomo"):
        return 0
    if optimizer == "adafactor" and parameter.ndim == 2:
        return 4 * (parameter.shape[0] + parameter.shape[1])
    single = optimizer in ("adagrad", "rmsprop", "schedule_free_sgd")
    single |= "lion" in optimizer or (optimizer == "muon" and parameter.ndim == 2)
    moments = 1 if single else 2
    moments += "ademamix" in optimizer or "grok" in optimizer
    if "8bit" in optimizer:
        # bitsandbytes keeps parameters below 4096 elements in 32 bits; a scale for 256 elements.
        return moments * (num + -(-num // 256) * 4 if num >= 4096 else 4 * num)
    if "4bit" in optimizer:
        return moments * (num // 2 + -(-num // 128) * 4 if num >= 4096 else 4 * num)
    return moments * num * (4 if "bnb" in optimizer or "paged" in optimizer else size)


@dataclass(frozen=True)
class PassMemory:
    """Bytes of one pass under given policies.

    Args:
        saved: Stay on the device until the backward pass, by kind.
        away: Go to host memory (on the CPU to a scratch file), by kind.
        working: One layer's working set.
        head: The loss: a chunk of logits, and the labelled hidden states with their gradient.
        around: What the pass has besides.
        slack: What the allocator loses.
        device: What was planned for.
    """

    saved: dict[str, int]
    away: dict[str, int]
    working: int
    head: int
    around: int
    slack: int
    device: str

    @cached_property
    def peak(self) -> int:
        """The most that is on the device at once.

        The loss and a layer follow each other on CUDA; the CPU keeps the buffers of both.
        """
        top = max(self.working, self.head) if self.device == "cuda" else self.working + self.head
        return sum(self.saved.values()) + top + self.around + self.slack

    @cached_property
    def items(self) -> list[Item]:
        """The items, empty ones left out."""
        host: Where = "host" if self.device == "cuda" else "disk"
        found = [
            Item("saved tensors", sum(self.saved.values())),
            Item("one layer's working set", self.working),
            Item("loss chunk", self.head),
            Item("angles and masks", self.around),
            Item("allocator slack", self.slack),
            Item(
                "pinned host memory" if host == "host" else "scratch file",
                sum(self.away.values()),
                host,
            ),
        ]
        return [item for item in found if item.num_bytes]


class PassModel:
    """Answers what a pass of any size needs under any policies; each trace is made once.

    Args:
        shaped: The model in shapes.
        device: `cpu` or `cuda`.
        head_rows: Rows of a chunk of logits; None takes the device's default.
        label_share: Share of the tokens that are learned.
        embeddings: As in `plan.embeddings`.
    """

    def __init__(
        self,
        shaped: ShapedModel,
        device: str,
        head_rows: int | None,
        label_share: float,
        embeddings: str = "device",
    ) -> None:
        self.shaped, self.device, self.label_share = shaped, device, label_share
        self.embeddings = embeddings
        self.head_rows = head_rows or CHUNK_ROWS[device]
        self._traces: dict[tuple[int, int, bool], PassTrace] = {}

    def trace(self, num_tokens: int, longest: int, lean: bool) -> PassTrace:
        """Trace a pass of documents as long as the longest, everything kept or (lean) recomputed."""
        key = (num_tokens, longest, lean)
        if key not in self._traces and not self.traced:
            self._traces[key] = guess_pass(self.shaped, num_tokens)
        if key not in self._traces:
            longest = min(longest, num_tokens)
            lengths = [longest] * (num_tokens // longest)
            lengths += [num_tokens % longest] if num_tokens % longest else []
            policy = LEAST if lean else Policy()
            self._traces[key] = trace_pass(self.shaped, lengths, policy, self.device)
        return self._traces[key]

    @property
    def traced(self) -> bool:
        """Whether passes are run on shapes; else what they save is guessed."""
        return self.shaped.traced

    @cached_property
    def num_layers(self) -> int:
        """How many decoder layers there are."""
        from whet.engine.model import decoder_of
        from whet.engine.swap import decoder_layers

        return len(decoder_layers(decoder_of(base_of(self.shaped.model))))

    def needs(self, num_tokens: int, longest: int, policies: Sequence[Policy]) -> PassMemory:
        """Return what a pass needs.

        Args:
            num_tokens: Of the pass.
            longest: Of its longest document.
            policies: One for each layer.
        """
        recomputes = any("recompute" in (p.qkv, p.gate_up) for p in policies)
        traced = self.trace(num_tokens, longest, lean=recomputes)
        layers = self._layers(traced, num_tokens, longest) if recomputes else traced.layers
        working = traced.working
        saved = {"hidden": traced.outside, **dict.fromkeys(POLICY_KINDS[1:], 0), "other": 0}
        away: dict[str, int] = {kind: 0 for kind in POLICY_KINDS}
        largest_away = 0
        for layer, policy in zip(layers, policies, strict=True):
            saved["other"] += layer["other"]
            for kind in POLICY_KINDS:
                choice = getattr(policy, kind)
                target = {"keep": saved, "offload": away}.get(choice)
                if target is not None:
                    target[kind] += layer[kind]
            moved = sum(layer[k] for k in POLICY_KINDS if getattr(policy, k) == "offload")
            largest_away = max(largest_away, moved)
        if self.device == "cuda":  # one layer's come back while the one behind it is at work
            working += 2 * largest_away
        head = self.head_bytes(num_tokens)
        tensors = sum(saved.values()) + working + head
        slack = round(SLACK[self.device] * tensors)
        return PassMemory(saved, away, working, head, traced.around, slack, self.device)

    def _layers(self, lean: PassTrace, num_tokens: int, longest: int) -> tuple[dict[str, int], ...]:
        """Add to a lean trace what it would save where nothing is recomputed: so much a token."""
        size = min(num_tokens, 1024)
        kept = self.trace(size, min(longest, size), lean=False)
        return tuple(
            {**less, **{kind: more[kind] * num_tokens // size for kind in ("qkv", "gate_up")}}
            for less, more in zip(lean.layers, kept.layers, strict=True)
        )

    def head_bytes(self, num_tokens: int) -> int:
        """Return what the loss needs: logits of a chunk, and labelled rows of hidden states, twice."""
        base = base_of(self.shaped.model)
        weight = base.get_output_embeddings().weight
        size = weight.element_size() * (2 if self.shaped.halved else 1)
        vocab, width = weight.shape
        rows = max(1, round(num_tokens * self.label_share))
        trained = (
            4 * weight.numel() if weight.requires_grad else 0
        )  # its gradient, summed in float32
        # A tile of the head as it is computed with; two more are under way from the host to a GPU.
        tiles = {"device": 0, "8bit": 1, "cpu": 3 if self.device == "cuda" else 1}[self.embeddings]
        tile = tiles * min(vocab, TILE_ROWS) * width
        return size * (min(rows, self.head_rows) * vocab + 2 * rows * width + tile) + trained


LEAST = Policy(qkv="recompute", gate_up="recompute")
