"""The requests that OpenAI's clients send, checked, and the shape of errors.

What would change an answer and is not done here is refused by name, never passed over; what changes
nothing (`user`, `metadata`, ...) is let through.
"""

from __future__ import annotations

import random
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from whet.errors import InputError, did_you_mean
from whet.sampling import Sampling

# Most log-probabilities beside each token, and most stop texts, of one request.
MOST_TOP = 20
MOST_STOPS = 16
# Longest answer of a chat that asks for no length, in tokens, if the model has so much room.
CHAT_TOKENS = 1024

# Arguments that change no answer.
WITHOUT_EFFECT = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "parallel_tool_calls", "prompt_cache_retention",
)  # fmt: skip
# Arguments that would, with the values that ask for nothing.
NOT_DONE: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "logit_bias": ({}, None),
    "tools": ([], None),
    "tool_choice": ("none", "auto", None),
    "functions": ([], None),
    "function_call": ("none", "auto", None),
    "response_format": ({"type": "text"}, None),
    "modalities": (["text"], None),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "suffix": ("", None),
    "best_of": (1, None),
}


class ApiError(Exception):
    """An answer with an error, in OpenAI's shape.

    Args:
        status: HTTP status.
        message: One sentence for a person.
        code: A word for a program, or None.
        param: The argument that is wrong, or None.
        headers: More headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """Return the answer's body."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class StreamOptions(BaseModel):
    """What a stream tells besides its pieces."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Common(BaseModel):
    """What both kinds of requests have. `top_k`, `min_p` and `repetition_penalty` are not OpenAI's."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] = 1
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _nothing_is_passed_over(self) -> Common:
        for name, value in (self.model_extra or {}).items():
            if name in WITHOUT_EFFECT or (name in NOT_DONE and value in NOT_DONE[name]):
                continue
            if name in NOT_DONE:
                raise ValueError(f"'{name}' is not supported by this server")
            guess = did_you_mean(name, type(self).model_fields)
            hint = f"; did you mean '{guess}'?" if guess else ""
            raise ValueError(f"there is no argument '{name}'{hint}")
        return self

    @property
    def usage_in_stream(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_new_tokens: int) -> Sampling:
        """Return how tokens are chosen; without a seed, by one that nobody knows.

        Args:
            max_new_tokens: Longest answer.

        Raises:
            ApiError: A value is wrong.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        try:
            return Sampling(
                max_new_tokens=max_new_tokens,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p,
                seed=random.SystemRandom().getrandbits(63) if self.seed is None else self.seed,
                top_k=self.top_k,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                stop=tuple(stop),
            )
        except InputError as error:
            raise ApiError(400, str(error)) from error


class Part(BaseModel):
    """A piece of a message; text is the only kind a text model reads."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None
    refusal: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def turn(self) -> dict[str, str]:
        """Return the turn as chat templates know it."""
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Common):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are told; None tells no log-probability."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def asked_tokens(self) -> int | None:
        """The length that is asked for."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Common):
    """The body of /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    echo: bool | None = None

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are told; None tells no log-probability."""
        return self.logprobs

    @property
    def asked_tokens(self) -> int:
        """The length that is asked for; OpenAI's is 16 when it is not."""
        return self.max_tokens or 16

    def prompts(self) -> list[str] | list[list[int]]:
        """Return every prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


Body = TypeVar("Body", ChatRequest, CompletionRequest)


def parse(kind: type[Body], body: bytes) -> Body:
    """Read a request's body.

    Args:
        kind: Which request.
        body: JSON.

    Raises:
        ApiError: It is not JSON, or an argument is wrong; all mistakes are told.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        told, first = [], None
        for one in error.errors(include_url=False):
            where = ".".join(str(part) for part in one["loc"] if not _is_variant(part))
            first = first or where or None
            message = one["msg"].removeprefix("Value error, ")
            line = f"{where}: {message}" if where else message
            if line not in told:
                told.append(line)
        raise ApiError(400, "; ".join(told), "invalid_value", first) from error


def _is_variant(part: int | str) -> bool:
    """Tell whether a place in an error names a branch of a union, which is no place in the body."""
    return isinstance(part, str) and (part in ("str", "int") or "[" in part)
