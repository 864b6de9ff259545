"""Generate text: a batch of prompts, or one answer piece by piece; log-probabilities on request."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from whet.answer import Answer, Request, TokenLogprob
from whet.data.template import stop_token_ids
from whet.decoding import Batch, TokenDecoder, make_decoder
from whet.errors import InputError
from whet.model import CausalLM, Tokenizer
from whet.sampling import Sampling

__all__ = [
    "Completion", "Sampling", "TokenLogprob", "complete", "encode", "end_token_ids", "generate",
    "perplexity_of", "stream", "with_model_defaults",
]  # fmt: skip

logger = logging.getLogger(__name__)

# Settings of a model's generation config that change what transformers' `generate` answers, with the
# values that change nothing. whet says so where a model sets one.
OTHER_SETTINGS = {
    "no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "bad_words_ids": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "min_new_tokens": (None, 0),
    "min_length": (None, 0),
    "sequence_bias": (None,),
    "num_beams": (None, 1),
}


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer.

    Args:
        prompt: The text the model read, special tokens included.
        text: The answer, without special tokens.
        num_tokens: Tokens generated.
        finished: Whether the answer came to its end: the model ended its turn, or a stop text came.
        logprobs: Per token, when asked for; those of the prompt come first with `echo`.
        stop: The stop text that ended it, if one did.
    """

    prompt: str
    text: str
    num_tokens: int
    finished: bool
    logprobs: tuple[TokenLogprob, ...] = ()
    stop: str | None = None


def generate(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    batch_size: int = 40,
    logprobs: bool | int = False,
    echo: bool = False,
    engine: bool = True,
) -> list[Completion]:
    """Complete a list of prompts.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Texts as the model is to read them: a chat template has been applied already.
        sampling: How tokens are chosen. Every prompt draws from the seed anew, so that an answer does
            not depend on the other prompts.
        batch_size: Prompts decoded together; as one is done, the next takes its place.
        logprobs: Also tell each answer token's log-probability (from the plain, unscaled logits); a
            number tells so many of the likeliest tokens beside it.
        echo: With `logprobs`, also those of the prompt's tokens.
        engine: Decode with the engine where it is proven to answer as the model; False leaves all to
            transformers' code, and takes neither a check nor a copy of the weights.

    Returns:
        One completion a prompt, in the order of the prompts.

    Raises:
        InputError: A prompt leaves no room for an answer.
    """
    encoded = [encode(model, tokenizer, prompt, sampling) for prompt in prompts]
    sampling = with_model_defaults(model, sampling)
    num_top = None if logprobs is False else int(logprobs) if logprobs is not True else 0
    requests = [Request(ids, sampling, 0, num_top, echo and num_top is not None) for ids in encoded]
    decoder = make_decoder(model, tokenizer, engine)
    answers = complete(
        Batch(decoder, tokenizer, end_token_ids(model, tokenizer)), requests, batch_size
    )
    return [_completion(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def complete(batch: Batch, requests: Sequence[Request], batch_size: int) -> list[Answer]:
    """Answer requests, so many at a time.

    Args:
        batch: An empty batch.
        requests: Any number.
        batch_size: Answers at work together.

    Returns:
        The answers, in the order of the requests.
    """
    # Prompts of like length together: less padding, where the decoder pads.
    waiting = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
    done: dict[int, Answer] = {}
    while waiting or batch.answers:
        free = batch_size - len(batch.answers)
        # A few at once, so that they are read in one pass; at the start that is all of them.
        if waiting and free >= min(len(waiting), max(1, batch_size // 4)):
            chosen, waiting = waiting[:free], waiting[free:]
            done.update(zip(chosen, batch.add([requests[i] for i in chosen]), strict=True))
        batch.step()
    return [done[index] for index in range(len(requests))]


def stream(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    decoder: TokenDecoder | None = None,
) -> Iterator[str]:
    """Yield an answer piece by piece, as it is generated.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompt: The text the model is to go on from.
        sampling: How tokens are chosen.
        decoder: What `make_decoder` gave for this model, for a caller with more than one prompt.

    Raises:
        InputError: The prompt leaves no room for an answer.
    """
    ids = encode(model, tokenizer, prompt, sampling)
    decoder = decoder or make_decoder(model, tokenizer)
    batch = Batch(decoder, tokenizer, end_token_ids(model, tokenizer))
    request = Request(ids, with_model_defaults(model, sampling), pieces=True)
    (answer,) = batch.add([request])
    try:
        while True:
            piece, _ = answer.take_piece()
            if piece:
                yield piece
            if answer.finish:
                return
            batch.step()
    finally:
        batch.cancel(answer)  # nobody reads any more


def encode(model: CausalLM, tokenizer: Tokenizer, prompt: str, sampling: Sampling) -> list[int]:
    """Return a prompt's token ids; its special tokens are in its text.

    Args:
        model: A causal language model, for its longest text.
        tokenizer: Its tokenizer.
        prompt: The text.
        sampling: For the room of an answer.

    Raises:
        InputError: The prompt is empty, or leaves no room for an answer.
    """
    ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not ids:
        raise InputError("the prompt is empty", fix="give some text with -p")
    if limit and len(ids) + sampling.max_new_tokens > limit:
        raise InputError(
            f"the prompt and the answer together are longer than the model can take ({limit} tokens)",
            f"{len(ids)} + {sampling.max_new_tokens}",
            "shorten the prompt or lower max_new_tokens",
        )
    return ids


def end_token_ids(model: CausalLM, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that end a turn: the model's own, the chat template's and the tokenizer's."""
    own = getattr(model, "generation_config", None)
    ids = getattr(own, "eos_token_id", None)
    found = [ids] if isinstance(ids, int) else list(ids or [])
    return [*found, *(i for i in stop_token_ids(tokenizer) if i not in found)]


def with_model_defaults(model: CausalLM, sampling: Sampling) -> Sampling:
    """Fill in what was left to the model, and say what else its generation config asks for in vain.

    Args:
        model: A causal language model.
        sampling: As it was asked for.
    """
    own = getattr(model, "generation_config", None)
    ignored = [
        f"{name}={value!r}"
        for name, nothing in OTHER_SETTINGS.items()
        if (value := getattr(own, name, None)) not in nothing
    ]
    if ignored:
        logger.warning("the model's generation config is not followed in %s", ", ".join(ignored))
    if sampling.repetition_penalty is not None:
        return sampling
    return replace(sampling, repetition_penalty=getattr(own, "repetition_penalty", None) or 1.0)


def _completion(prompt: str, answer: Answer) -> Completion:
    return Completion(
        prompt, answer.text, len(answer.tokens), answer.finish == "stop",
        (*answer.prompt_logprobs, *answer.logprobs), answer.stop,
    )  # fmt: skip


def perplexity_of(logprobs: Sequence[TokenLogprob]) -> float:
    """Return exp(-mean log-probability) of scored tokens, the first of a text left out."""
    known = [item.logprob for item in logprobs if item.logprob is not None]
    return math.exp(-sum(known) / len(known)) if known else math.nan
