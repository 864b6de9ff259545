"""Answers in the shape OpenAI's clients read, whole or piece by piece."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from whet.answer import TokenLogprob
from whet.serving.worker import Piece


@dataclass
class Shape:
    """What all answers to one request share.

    Args:
        model: The name it is served by.
        ends: Tokens that end a turn, which are no part of an answer.
        num_prompt_tokens: Tokens of all prompts, each counted once.
        id: Of the answer.
        created: Seconds since 1970.
    """

    model: str
    ends: frozenset[int]
    num_prompt_tokens: int
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    prefix = ""
    whole = ""
    chunk = ""

    def __post_init__(self) -> None:
        self.id = self.id or f"{self.prefix}-{uuid.uuid4().hex}"

    def head(self, kind: str) -> dict[str, Any]:
        """Return the fields that every answer and chunk begins with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def usage(self, num_tokens: int) -> dict[str, int]:
        """Return the counts of tokens."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": num_tokens,
            "total_tokens": self.num_prompt_tokens + num_tokens,
        }

    def choice(self, piece: Piece) -> dict[str, Any]:
        """Return a whole answer's choice."""
        raise NotImplementedError

    def delta(self, piece: Piece) -> dict[str, Any]:
        """Return a chunk's choice."""
        raise NotImplementedError

    def first(self, index: int) -> dict[str, Any] | None:
        """Return the choice of a chunk that goes ahead of an answer's text, if there is one."""
        return None

    async def collect(self, pieces: AsyncIterator[Piece], num: int) -> dict[str, Any]:
        """Wait for all answers and return the body.

        Args:
            pieces: Of all answers.
            num: How many answers.
        """
        wholes = [Piece(index, "", [], None, 0, []) for index in range(num)]
        async for piece in pieces:
            wholes[piece.index] = _joined(wholes[piece.index], piece)
        count = sum(piece.num_tokens for piece in wholes)
        choices = [self.choice(piece) for piece in wholes]
        return {**self.head(self.whole), "choices": choices, "usage": self.usage(count)}

    async def stream(
        self, pieces: AsyncIterator[Piece], num: int, usage: bool
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield chunks.

        Args:
            pieces: Of all answers.
            num: How many answers.
            usage: Whether the last chunk tells the counts of tokens.
        """
        counts = [0] * num
        more = {"usage": None} if usage else {}
        for index in range(num):
            first = self.first(index)
            if first is not None:
                yield {**self.head(self.chunk), "choices": [first], **more}
        async for piece in pieces:
            counts[piece.index] = piece.num_tokens
            yield {**self.head(self.chunk), "choices": [self.delta(piece)], **more}
        if usage:
            yield {**self.head(self.chunk), "choices": [], "usage": self.usage(sum(counts))}

    def _inside(self, logprobs: Sequence[TokenLogprob]) -> list[TokenLogprob]:
        return [item for item in logprobs if item.id not in self.ends]


class ChatShape(Shape):
    """/v1/chat/completions."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"
    tells = False  # whether log-probabilities were asked for

    def choice(self, piece: Piece) -> dict[str, Any]:
        """Return a whole answer's choice."""
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {
            "index": piece.index, "message": message, "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish,
        }  # fmt: skip

    def delta(self, piece: Piece) -> dict[str, Any]:
        """Return a chunk's choice."""
        return {
            "index": piece.index, "delta": {"content": piece.text} if piece.text else {},
            "logprobs": self._logprobs(piece), "finish_reason": piece.finish,
        }  # fmt: skip

    def first(self, index: int) -> dict[str, Any]:
        """Return the chunk's choice that tells who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self.tells:
            return None
        content = [
            {**_token(item.token, item.logprob), "top_logprobs": [_token(*one) for one in item.top]}
            for item in self._inside(piece.logprobs)
        ]
        return {"content": content, "refusal": None}


class CompletionShape(Shape):
    """/v1/completions.

    Attributes:
        echoes: Each answer's prompt, where it is to be told in front of it.
    """

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"
    tells = False
    echoes: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._begun: dict[int, int] = {}  # characters told of each answer, for the offsets

    def choice(self, piece: Piece) -> dict[str, Any]:
        """Return a whole answer's choice."""
        return self.delta(piece)

    def delta(self, piece: Piece) -> dict[str, Any]:
        """Return a chunk's choice."""
        echo = self.echoes[piece.index] if self.echoes and piece.index not in self._begun else ""
        text = echo + piece.text
        offset = self._begun.get(piece.index, 0)
        self._begun[piece.index] = offset + len(text)
        found = None
        if self.tells:
            tokens = [*piece.prompt_logprobs, *self._inside(piece.logprobs)]
            offsets = []
            for item in tokens:
                offsets.append(offset)
                offset += len(item.token)
            found = {
                "tokens": [item.token for item in tokens],
                "token_logprobs": [item.logprob for item in tokens],
                # Bytes of unfinished characters have one name: the likeliest is told.
                "top_logprobs": [dict(reversed(item.top)) or None for item in tokens],
                "text_offset": offsets,
            }
        return {
            "index": piece.index, "text": text, "logprobs": found, "finish_reason": piece.finish,
        }  # fmt: skip


def _joined(whole: Piece, piece: Piece) -> Piece:
    return Piece(
        whole.index, whole.text + piece.text, [*whole.logprobs, *piece.logprobs], piece.finish,
        piece.num_tokens, [*whole.prompt_logprobs, *piece.prompt_logprobs],
    )  # fmt: skip


def _token(token: str, logprob: float | None) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}
