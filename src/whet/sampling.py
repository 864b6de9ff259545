"""How the next token is chosen: greedy, or drawn among the likely ones.

The filters are those of transformers, in its order: repetition penalty, temperature, top-k, top-p,
min-p. A draw depends on a request's seed and logits alone, never on what else is being decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from whet.errors import InputError

if TYPE_CHECKING:
    import torch

# Among how many of the likeliest tokens top-p is looked for before the whole vocabulary is sorted.
LIKELIEST = 512


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are generated.

    Args:
        max_new_tokens: Longest answer.
        temperature: 0 takes the most likely token (greedy); otherwise logits are divided by it.
        top_p: Sample among the most likely tokens that together reach this probability
            (arXiv 1904.09751).
        seed: Seed of the sampling.
        top_k: Sample among that many of the most likely tokens; 0 among all.
        min_p: Sample among tokens of at least this share of the likeliest one's probability
            (arXiv 2407.01082).
        repetition_penalty: Divides positive logits of tokens that are there already, and multiplies
            negative ones (arXiv 1909.05858); None is the model's own, mostly 1.
        stop: Texts that end an answer; they are not part of it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        penalty = self.repetition_penalty
        wrong = [
            f"{name} must be {rule}; got {getattr(self, name)!r}"
            for name, ok, rule in (
                ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
                ("temperature", self.temperature >= 0, "0 or more"),
                ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
                ("top_k", self.top_k >= 0, "0 or more"),
                ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
                ("repetition_penalty", penalty is None or penalty > 0, "above 0"),
                ("stop", all(self.stop), "a text that is not empty"),
            )
            if not ok
        ]
        if wrong:
            raise InputError("; ".join(wrong))


def choose(logits_V: torch.Tensor, sampling: Sampling, seen: Sequence[int], uniform: float) -> int:
    """Choose one sequence's next token.

    Args:
        logits_V: As the model made them.
        sampling: How; its repetition penalty is a number or None for none.
        seen: Tokens of the prompt and the answer so far.
        uniform: A random number in [0, 1), which decides the draw.

    Returns:
        A token id.
    """
    import torch

    logits_V = logits_V.float()
    if sampling.repetition_penalty not in (None, 1.0):
        logits_V = _penalised(logits_V, sampling.repetition_penalty, seen)
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probs_N, ids_N = _candidates(logits_V / sampling.temperature, sampling)
    if sampling.top_p < 1:  # sorted: a token stays while those before it have not reached top_p
        before_N = probs_N.cumsum(-1) - probs_N
        probs_N = torch.where(before_N < sampling.top_p, probs_N, 0.0)
    if sampling.min_p > 0:
        probs_N = torch.where(probs_N >= sampling.min_p * probs_N.max(), probs_N, 0.0)
    reached_N = probs_N.cumsum(-1)
    place = int(torch.searchsorted(reached_N, uniform * float(reached_N[-1]), right=True))
    place = min(place, int(probs_N.nonzero()[-1]))  # the sum's last bit
    return place if ids_N is None else int(ids_N[place])


def _penalised(logits_V: torch.Tensor, penalty: float | None, seen: Sequence[int]) -> torch.Tensor:
    import torch

    assert penalty is not None
    ids = torch.tensor(sorted(set(seen)), device=logits_V.device)
    found = logits_V[ids]
    changed = torch.where(found < 0, found * penalty, found / penalty)
    return logits_V.index_copy(0, ids, changed)


def _candidates(
    logits_V: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the probabilities a token is drawn by, sorted where a filter needs it, and their ids."""
    logits_V, num = logits_V.double(), logits_V.shape[-1]
    if 0 < sampling.top_k < num:
        values_N, ids_N = logits_V.topk(sampling.top_k)
        return values_N.softmax(-1), ids_N
    if sampling.top_p == 1:
        return logits_V.softmax(-1), None
    if num > LIKELIEST:
        values_N, ids_N = logits_V.topk(LIKELIEST)
        probs_N = (values_N - logits_V.logsumexp(-1)).exp()
        if float(probs_N.sum()) > sampling.top_p:  # the rest is out, and a full sort is dear
            return probs_N, ids_N
    probs_N, ids_N = logits_V.softmax(-1).sort(descending=True, stable=True)
    return probs_N, ids_N
