"""One answer while it grows: its tokens, its text, and when it ends."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from whet.model import Tokenizer
from whet.sampling import Sampling, choose

if TYPE_CHECKING:
    import torch

# What a decoder writes for the bytes of a character that is not complete yet.
INCOMPLETE = "\ufffd"
# Of a UTF-8 character up to three bytes may be there without the last one.
LONGEST_INCOMPLETE = 3

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its natural-log probability given all before it.

    Args:
        token: Its text.
        logprob: Of the plain logits, before temperature and filters; None for a text's first token.
        top: The likeliest tokens in its place with theirs, as many as were asked for.
        id: Its number.
    """

    token: str
    logprob: float | None
    top: tuple[tuple[str, float], ...] = ()
    id: int = -1


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for.

    Args:
        prompt: Token ids.
        sampling: How tokens are chosen.
        choice: Which of several answers to one prompt: each draws numbers of its own.
        logprobs: How many of the likeliest tokens are told beside each token; None tells nothing.
        echo: Tell the prompt's log-probabilities too.
        pieces: Make the text as it grows, for a reader that does not wait.
    """

    prompt: list[int]
    sampling: Sampling
    choice: int = 0
    logprobs: int | None = None
    echo: bool = False
    pieces: bool = False


class GrowingText:
    """Token ids turned into text piece by piece; the pieces together are the whole text.

    Args:
        tokenizer: Which decodes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # where the tokens begin that are decoded together
        self._whole = 0  # behind which token the last whole character ended
        self._told = 0  # characters of those tokens' text that are told

    def push(self, token: int) -> str:
        """Add a token and return the text that is certain now.

        A character of several tokens is held back until it is complete. Tokens are decoded together
        with those of the piece before, because many decoders write a word's blank by what stands in
        front of it.

        Args:
            token: Its id.
        """
        self._ids.append(token)
        text = self._decode(self._ids[self._start :])
        held = len(text) - len(text.rstrip(INCOMPLETE))
        if len(self._ids) - self._whole > LONGEST_INCOMPLETE:  # most of it will stay as it is
            held = min(held, LONGEST_INCOMPLETE)
        end = len(text) - held
        piece, self._told = text[self._told : end], max(self._told, end)
        if piece and not held:
            self._start, self._whole = self._whole, len(self._ids)
            self._told = len(self._decode(self._ids[self._start :]))
        return piece

    def rest(self) -> str:
        """Return what was held back."""
        return self._decode(self._ids[self._start :])[self._told :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class Answer:
    """An answer to one request.

    Args:
        request: What was asked for.
        tokenizer: Turns tokens into text.
        ends: Tokens that end a turn.

    Attributes:
        tokens: Generated so far, with the one that ended it.
        text: Without special tokens; behind a stop text it is cut.
        finish: Why it ended; None while it grows.
        stop: The stop text that ended it, if one did.
        prompt_logprobs: With `echo`.
        logprobs: Of the tokens that belong to `text`, and of the end.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, ends: frozenset[int]) -> None:
        self.request, self.tokenizer, self.ends = request, tokenizer, ends
        self.tokens: list[int] = []
        self.text = ""
        self.finish: Finish | None = None
        self.stop: str | None = None
        self.prompt_logprobs: list[TokenLogprob] = []
        self.logprobs: list[TokenLogprob] = []
        seed = request.sampling.seed
        self._draws = random.Random(f"{seed}/{request.choice}" if request.choice else seed)
        self._growing = GrowingText(tokenizer) if request.pieces or request.sampling.stop else None
        self._told = self._told_logprobs = 0
        self._starts: list[int] = []  # where in the text each token begins

    def take(self, logits_V: torch.Tensor, greedy: int | None = None) -> None:
        """Choose the next token.

        Args:
            logits_V: The model's, behind the last token.
            greedy: The likeliest token, where the caller has found it for a whole batch.
        """
        request, sampling = self.request, self.request.sampling
        plain = sampling.temperature == 0 and sampling.repetition_penalty in (None, 1.0)
        if plain and greedy is not None:
            token = greedy
        else:
            uniform = self._draws.random() if sampling.temperature else 0.0
            token = choose(logits_V, sampling, [*request.prompt, *self.tokens], uniform)
        self.tokens.append(token)
        if request.logprobs is not None:
            self.logprobs.append(score(logits_V, token, self.tokenizer, request.logprobs))
        ended = token in self.ends
        if self._growing is not None:
            self._starts.append(len(self.text))
            self.text += self._growing.push(token)
            self._cut_at_stop()
        if self.finish is None and (ended or len(self.tokens) == sampling.max_new_tokens):
            self.finish = "stop" if ended else "length"
            self._complete()

    def _complete(self) -> None:
        if self._growing is None:
            self.text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        else:
            self.text += self._growing.rest()
            self._cut_at_stop()

    def _cut_at_stop(self) -> None:
        longest = max(map(len, self.request.sampling.stop), default=0)
        begin = max(0, self._told - longest)
        found = [
            (place, stop)
            for stop in self.request.sampling.stop
            if (place := self.text.find(stop, begin)) >= 0
        ]
        if not found:
            return
        place, self.stop = min(found)
        self.text, self.finish = self.text[:place], "stop"
        kept = sum(start < place for start in self._starts)
        del self.logprobs[kept:]

    @property
    def _certain(self) -> int:
        """How much of the text can no longer become part of a stop text."""
        if self.finish is not None:
            return len(self.text)
        longest = max(map(len, self.request.sampling.stop), default=0)
        for start in range(max(0, len(self.text) - longest + 1), len(self.text)):
            if any(stop.startswith(self.text[start:]) for stop in self.request.sampling.stop):
                return start
        return len(self.text)

    def take_piece(self) -> tuple[str, list[TokenLogprob]]:
        """Return the text that is certain and was not told yet, and the tokens that begin in it."""
        end = self._certain
        piece = self.text[self._told : end]
        self._told = end
        done = self.finish is not None
        kept = len(self.logprobs) if done else sum(start < end for start in self._starts)
        fresh = self.logprobs[self._told_logprobs : kept]
        self._told_logprobs = max(kept, self._told_logprobs)
        return piece, fresh


def score(logits_V: torch.Tensor, token: int, tokenizer: Tokenizer, num_top: int) -> TokenLogprob:
    """Return a token's log-probability, and those of the likeliest in its place.

    Args:
        logits_V: As the model made them.
        token: Its id.
        tokenizer: Names tokens.
        num_top: How many of the likeliest.
    """
    logprob_V = logits_V.float().log_softmax(-1)
    top = ()
    if num_top:
        values, ids = logprob_V.topk(num_top)
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        top = tuple((tokenizer.decode([i]), value) for i, value in pairs)
    return TokenLogprob(tokenizer.decode([token]), float(logprob_V[token]), top, token)


def score_prompt(
    logits_TV: torch.Tensor, prompt: Sequence[int], tokenizer: Tokenizer, num_top: int
) -> list[TokenLogprob]:
    """Score a prompt's tokens; its first has no probability.

    Args:
        logits_TV: Behind each of its tokens.
        prompt: Token ids.
        tokenizer: Names tokens.
        num_top: How many of the likeliest.
    """
    first = TokenLogprob(tokenizer.decode([prompt[0]]), None, id=prompt[0])
    pairs = zip(logits_TV, prompt[1:], strict=False)
    return [first, *(score(logits_V, token, tokenizer, num_top) for logits_V, token in pairs)]
