"""How much a pass computes, and how fast a device is: measured here, or from its maker's data sheet.

Operations count multiplications and additions. Peaks of cards are those of dense products in 16 bits
with float32 sums, without sparsity, from NVIDIA's architecture papers (Turing, Ampere, Ada, Hopper) and
data sheets; a CPU has no such sheet, so its rate is measured on a product.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from whet.engine.memory import Policy
from whet.engine.model import decoder_of
from whet.engine.swap import base_of, decoder_layers

TERA = 1e12


@dataclass(frozen=True, slots=True)
class Speed:
    """What a device can do.

    Args:
        name: Of the device.
        flops: Operations a second of large products in the run's dtype.
        bytes_per_second: Of its memory.
        host_bytes_per_second: Between it and host memory, one way.
        efficiency: Share of `flops` that a whole training step reaches, as far as is known: an assumption
            that the probe corrects.
        measured: Whether `flops` was measured here, or is the maker's.
    """

    name: str
    flops: float
    bytes_per_second: float
    host_bytes_per_second: float
    efficiency: float
    measured: bool


# name in torch -> (16-bit TFLOP/s with float32 sums, GB/s of memory, GiB of memory)
CARDS = {
    "T4": (65, 320, 16),
    "RTX 2080 Ti": (53.8, 616, 11),
    "RTX 3060": (25.5, 360, 12),
    "RTX 3090": (71, 936, 24),
    "RTX 4060 Ti": (44.1, 288, 16),
    "RTX 4070": (58.3, 504, 12),
    "RTX 4080": (97.5, 717, 16),
    "RTX 4090": (165.2, 1008, 24),
    "RTX 5090": (209.5, 1792, 32),
    "A10": (125, 600, 24),
    "L4": (121, 300, 24),
    "L40S": (362, 864, 48),
    "A100": (312, 2039, 80),
    "H100": (989, 3350, 80),
    "H200": (989, 4800, 141),
}
PCIE = 12e9  # what pinned copies reach on PCIe 3 x16 or 4 x8; assumed
CUDA_EFFICIENCY, CPU_EFFICIENCY = 0.45, 0.4


def card_speed(name: str) -> Speed | None:
    """Return the data sheet's speed of a card by its name in torch, None for one that is not listed."""
    found = [key for key in CARDS if key.lower() in name.lower()]
    if not found:
        return None
    tflops, gigabytes, _ = CARDS[max(found, key=len)]
    return Speed(name, tflops * TERA, gigabytes * 1e9, PCIE, CUDA_EFFICIENCY, measured=False)


def card_with(memory_bytes: int) -> str:
    """Return the slowest listed card that has so much memory, as a stand-in for an unknown one."""
    fitting = [n for n, (_, _, gib) in CARDS.items() if gib * 2**30 >= 0.95 * memory_bytes]
    return min(fitting or ["H200"], key=lambda n: (CARDS[n][2], CARDS[n][0]))


def measure_speed(dtype: torch.dtype, device: torch.device) -> Speed:
    """Measure products and copies, for a third of a second.

    Args:
        dtype: Type of the products.
        device: Where.
    """
    rows = 512 if device.type == "cpu" else 8192
    a, b = (torch.ones((rows, 2048), dtype=dtype, device=device) for _ in range(2))
    once = _rate(lambda: torch.mm(a, b.t()), device)
    source = torch.ones(2**24, device=device)
    target = torch.empty_like(source)
    copies = _rate(lambda: target.copy_(source), device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    efficiency = CPU_EFFICIENCY if device.type == "cpu" else CUDA_EFFICIENCY
    return Speed(
        name, once * 2 * rows * rows * 2048, copies * 2**27, PCIE, efficiency, measured=True
    )


def _rate(work: Any, device: torch.device, seconds: float = 0.15) -> float:
    """Return how often a second a piece of work can be done, the fastest of a few rounds."""
    work()
    best, start = 0.0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        before = time.perf_counter()
        for _ in range(4):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 4 / (time.perf_counter() - before))
    return best


class Work:
    """Operations of a pass, counted on a model's shapes.

    Args:
        model: The model, real or in shapes, adapted and frozen.
    """

    def __init__(self, model: Any) -> None:
        base = base_of(model)
        config = base.config.get_text_config()
        experts = getattr(config, "num_local_experts", None) or getattr(
            config, "n_routed_experts", getattr(config, "num_experts", None)
        )
        self.expert_share = getattr(config, "num_experts_per_tok", 1) / (experts or 1)
        self.blocks = decoder_layers(decoder_of(base))
        heads = getattr(config, "num_attention_heads", 1)
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.attention_width = heads * width
        windows = [getattr(m, "sliding_window", None) for b in self.blocks for m in b.modules()]
        self.window = next((w for w in windows if isinstance(w, int) and w > 0), None)
        head = base.get_output_embeddings()
        self.head = float(head.weight.numel())
        self.head_trained = bool(head.weight.requires_grad)
        flowing = [any(p.requires_grad for p in block.parameters()) for block in self.blocks]
        # Gradients flow back to the first layer with something to train, and through all behind it.
        self.first = flowing.index(True) if any(flowing) else len(self.blocks)
        if any(p.requires_grad for p in base.get_input_embeddings().parameters()):
            self.first = 0

    @cached_property
    def per_token(self) -> tuple[float, float]:
        """Operations of the layers' products for one token: (forward, forward and backward)."""
        forward = total = 0.0
        for number, block in enumerate(self.blocks):
            for parameter, num in _products(block, self.expert_share):
                forward += 2 * num
                total += 2 * num
                total += 2 * num if number >= self.first else 0.0
                total += 2 * num if parameter.requires_grad else 0.0
        return forward, total

    @cached_property
    def _again(self) -> list[dict[str, float]]:
        """Operations for one token of what each layer may compute again, by kind."""
        found = []
        for block in self.blocks:
            record: Any = vars(block).get("_whet")
            again = {"qkv": 0.0, "gate_up": 0.0}
            for kind, part, paths in (("qkv", "attention", "qkv"), ("gate_up", "mlp", "up")):
                spec = getattr(record.spec, part) if record is not None else "not fused"
                if not isinstance(spec, str):
                    modules = [block.get_submodule(path) for path in getattr(spec, paths)]
                    again[kind] = sum(
                        2 * num for m in modules for _, num in _products(m, self.expert_share)
                    )
            found.append(again)
        return found

    def recomputed(self, policies: Sequence[Policy]) -> float:
        """Operations for one token that policies make a second time."""
        return sum(
            again[kind]
            for again, policy in zip(self._again, policies, strict=False)
            for kind in again
            if getattr(policy, kind) == "recompute"
        )

    def of_pass(
        self, lengths: Sequence[int], num_labels: float, policies: Sequence[Policy] = ()
    ) -> tuple[float, float]:
        """Return a pass's operations, forward and backward: the model's, and with those made again.

        Args:
            lengths: Tokens of each document.
            num_labels: Tokens that are learned.
            policies: One for each layer.
        """
        num = sum(lengths)
        model = num * self.per_token[1] + 2 * num_labels * self.head * (2 + self.head_trained)
        model += self._attention(lengths)
        return model, model + num * self.recomputed(policies)

    def _attention(self, lengths: Sequence[int]) -> float:
        """Scores and their use: two products forward, five backward, each over half a square."""
        pairs = sum(
            length * length / 2
            if self.window is None or length <= self.window
            else length * self.window - self.window**2 / 2
            for length in lengths
        )
        layers, behind = len(self.blocks), len(self.blocks) - self.first
        return 2 * pairs * self.attention_width * (2 * layers + 5 * behind)


def _products(module: nn.Module, expert_share: float) -> list[tuple[torch.Tensor, float]]:
    """Return the matrices of a module, each with the multiplications it takes for one token."""
    found = []
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)
        num = float(state.shape.numel() if state is not None else parameter.numel())
        if parameter.ndim >= 2:
            found.append((parameter, num * (expert_share if parameter.ndim == 3 else 1.0)))
    return found
