"""Generate text: a batch of prompts for evaluation, one stream for chat, log-probabilities on request.

Decoding itself is transformers' own `generate`; here are the prompts, the padding, the sampling
settings in the field's names, and what comes back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from whet.data.template import stop_token_ids
from whet.errors import InputError
from whet.model import CausalLM, Tokenizer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Args:
        max_new_tokens: Longest answer.
        temperature: 0 takes the most likely token (greedy); otherwise logits are divided by it.
        top_p: Sample among the most likely tokens that together reach this probability.
        seed: Seed of the sampling.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, ok, rule in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not ok:
                raise InputError(f"{name} must be {rule}", getattr(self, name))

    def options(self) -> dict[str, Any]:
        """Return the arguments of transformers' `generate`."""
        common = {"max_new_tokens": self.max_new_tokens, "use_cache": True, "top_k": None}
        if self.temperature == 0:
            return {**common, "do_sample": False, "temperature": None, "top_p": None}
        return {**common, "do_sample": True, "temperature": self.temperature, "top_p": self.top_p}


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its natural-log probability given all before it; None for the first token."""

    token: str
    logprob: float | None


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer.

    Args:
        prompt: The text the model read, special tokens included.
        text: The answer, without special tokens.
        num_tokens: Tokens generated.
        finished: Whether the model ended its turn itself.
        logprobs: Per token, when asked for; those of the prompt come first with `echo`.
    """

    prompt: str
    text: str
    num_tokens: int
    finished: bool
    logprobs: tuple[TokenLogprob, ...] = ()


def generate(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    batch_size: int = 40,
    logprobs: bool = False,
    echo: bool = False,
) -> list[Completion]:
    """Complete a list of prompts.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Texts as the model is to read them: a chat template has been applied already.
        sampling: How tokens are chosen.
        batch_size: Prompts decoded together, padded on the left.
        logprobs: Also compute each answer token's log-probability (from the plain, unscaled logits).
        echo: With `logprobs`, also those of the prompt's tokens.

    Returns:
        One completion a prompt, in the order of the prompts.

    Raises:
        InputError: A prompt leaves no room for an answer.
    """
    import torch

    torch.manual_seed(sampling.seed)
    encoded = [list(tokenizer(p, add_special_tokens=False)["input_ids"]) for p in prompts]
    for ids in encoded:
        _check_room(model, ids, sampling)
    done: dict[int, Completion] = {}
    # Prompts of like length together: less padding.
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    ends = end_token_ids(model, tokenizer)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs = _pad_left([encoded[i] for i in chosen], tokenizer, model)
        with torch.no_grad():
            output_BT = model.generate(
                **inputs,
                **sampling.options(),
                eos_token_id=ends,
                pad_token_id=tokenizer.pad_token_id,
            )
        for row, index in enumerate(chosen):
            answer = output_BT[row, inputs["input_ids"].shape[1] :].tolist()
            stop = next((n for n, token in enumerate(answer) if token in ends), None)
            kept = answer if stop is None else answer[: stop + 1]
            done[index] = Completion(
                prompts[index],
                tokenizer.decode(kept, skip_special_tokens=True),
                len(kept),
                stop is not None,
                _logprobs(model, tokenizer, encoded[index], kept, echo) if logprobs else (),
            )
    return [done[index] for index in range(len(prompts))]


def stream(model: CausalLM, tokenizer: Tokenizer, prompt: str, sampling: Sampling) -> Iterator[str]:
    """Yield an answer piece by piece, as it is generated.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompt: The text the model is to go on from.
        sampling: How tokens are chosen.

    Raises:
        InputError: The prompt leaves no room for an answer.
    """
    from threading import Event, Thread

    import torch
    from transformers import StoppingCriteria, TextIteratorStreamer

    class UserLeft(StoppingCriteria):
        """Ends generation when nobody reads the stream any more."""

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), left.is_set(), device=input_ids.device)

    left = Event()
    ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    _check_room(model, ids, sampling)
    torch.manual_seed(sampling.seed)
    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    arguments = {
        **_pad_left([ids], tokenizer, model),
        **sampling.options(),
        "eos_token_id": end_token_ids(model, tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "streamer": pieces,
        "stopping_criteria": [UserLeft()],
    }
    worker = Thread(target=model.generate, kwargs=arguments, daemon=True)
    worker.start()
    try:
        yield from pieces
    finally:
        left.set()
        worker.join()


def end_token_ids(model: CausalLM, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that end a turn: the model's own, the chat template's and the tokenizer's."""
    own = getattr(model, "generation_config", None)
    ids = getattr(own, "eos_token_id", None)
    found = [ids] if isinstance(ids, int) else list(ids or [])
    return [*found, *(i for i in stop_token_ids(tokenizer) if i not in found)]


def _check_room(model: CausalLM, ids: list[int], sampling: Sampling) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not ids:
        raise InputError("the prompt is empty", fix="give some text with -p")
    if limit and len(ids) + sampling.max_new_tokens > limit:
        raise InputError(
            f"the prompt and the answer together are longer than the model can take ({limit} tokens)",
            f"{len(ids)} + {sampling.max_new_tokens}",
            "shorten the prompt or lower max_new_tokens",
        )


def _pad_left(
    batch: list[list[int]], tokenizer: Tokenizer, model: CausalLM
) -> dict[str, torch.Tensor]:
    import torch

    longest = max(map(len, batch))
    pad = tokenizer.pad_token_id or 0
    return {
        "input_ids": torch.tensor(
            [[pad] * (longest - len(ids)) + ids for ids in batch], device=model.device
        ),
        "attention_mask": torch.tensor(
            [[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch], device=model.device
        ),
    }


def _logprobs(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: list[int],
    answer: list[int],
    echo: bool,
) -> tuple[TokenLogprob, ...]:
    """Score a prompt and its answer in one pass over both."""
    import torch

    ids = prompt + answer
    with torch.inference_mode():
        logits_TV = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    logprob_T = logits_TV.float().log_softmax(-1)[:-1].gather(1, _column(ids[1:], model))[:, 0]
    values: list[float | None] = [None, *logprob_T.tolist()]
    first = 0 if echo else len(prompt)
    return tuple(
        TokenLogprob(tokenizer.decode([ids[n]]), values[n]) for n in range(first, len(ids))
    )


def _column(ids: list[int], model: CausalLM) -> torch.Tensor:
    import torch

    return torch.tensor(ids, device=model.device)[:, None]


def perplexity_of(logprobs: Sequence[TokenLogprob]) -> float:
    """Return exp(-mean log-probability) of scored tokens, the first of a text left out."""
    known = [item.logprob for item in logprobs if item.logprob is not None]
    return math.exp(-sum(known) / len(known)) if known else math.nan
