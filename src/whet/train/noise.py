"""Noise on the embeddings while a model learns (NEFTune, arXiv 2310.05914).

The paper adds uniform noise of magnitude alpha / sqrt(L D) to what the embeddings give: L tokens of width
D. Here L is the example's own length, without padding, and an example's draws are seeded by the run's
seed, the step and its tokens: they are the same however a step is cut into passes, shared between
processes, run again after memory ran out, or resumed.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from whet.data.tokenize import Tokens
from whet.model import CausalLM


@contextlib.contextmanager
def noisy_embeddings(
    model: CausalLM, rows: Sequence[Tokens], alpha: float, seed: int, step: int
) -> Iterator[None]:
    """Add noise to the embeddings of the passes that are run in the body.

    Args:
        model: The model, not wrapped for several processes.
        rows: The rows of the pass: one behind the other, (1, T), or one a row, padded on the right.
        alpha: The paper's alpha; 5 to 15 there.
        seed: The run's.
        step: Number of the step.
    """
    embeddings: Any = model.get_input_embeddings()

    def add_noise(module: Any, inputs: Any, hidden_BLD: torch.Tensor) -> torch.Tensor:
        noise_BLD = torch.zeros_like(hidden_BLD)
        generator = torch.Generator(hidden_BLD.device)
        for tokens, part_LD in zip(rows, _parts(noise_BLD, rows), strict=True):
            most = alpha / math.sqrt(part_LD.numel())
            generator.manual_seed(_seed_of(tokens, seed, step))
            part_LD.uniform_(-most, most, generator=generator)
        return hidden_BLD + noise_BLD

    handle = embeddings.register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()


def _parts(noise_BLD: torch.Tensor, rows: Sequence[Tokens]) -> Iterator[torch.Tensor]:
    """Yield each row's part of a batch; what is left is padding."""
    lengths = [len(tokens.input_ids) for tokens in rows]
    if len(noise_BLD) > 1:
        for noise_LD, length in zip(noise_BLD, lengths, strict=True):
            yield noise_LD[:length]
    else:
        num_padding = noise_BLD.shape[1] - sum(lengths)
        yield from noise_BLD[0].split([*lengths, num_padding])[: len(rows)]


def _seed_of(tokens: Tokens, seed: int, step: int) -> int:
    """Return a seed, below 2^63, that an example has in one step of a run."""
    words = np.array([seed, step, *tokens.input_ids], dtype=np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little") >> 1
