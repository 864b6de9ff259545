"""The web application: routes, who may ask, and how much. Needs FastAPI: import it inside a function."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from whet.answer import Request as Asked
from whet.data.template import render_prompt
from whet.errors import InputError
from whet.generate import end_token_ids, with_model_defaults
from whet.model import CausalLM, Tokenizer
from whet.serving.limits import Limits
from whet.serving.protocol import CHAT_TOKENS, ApiError, ChatRequest, CompletionRequest, parse
from whet.serving.shape import ChatShape, CompletionShape, Shape
from whet.serving.worker import Job, Worker


@dataclass(frozen=True, slots=True)
class Served:
    """The model behind the routes.

    Args:
        name: What clients call it.
        model: A causal language model.
        tokenizer: With a chat template.
        worker: Which decodes.
        limits: What is taken.
        system: A system prompt for conversations that bring none, or None.
    """

    name: str
    model: CausalLM
    tokenizer: Tokenizer
    worker: Worker
    limits: Limits
    system: str | None = None

    def encode(self, prompt: str | list[int], asked: int | None) -> tuple[list[int], int]:
        """Return a prompt's token ids and how long its answer may be.

        Args:
            prompt: Text with its special tokens, or token ids.
            asked: The length that is asked for, or None.

        Raises:
            ApiError: It is empty, too long, or names a token that is not there.
        """
        ids = prompt
        if isinstance(prompt, str):
            ids = list(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        vocab = self.model.get_input_embeddings().weight.shape[0]
        if not ids or any(not 0 <= i < vocab for i in ids):  # type: ignore[operator]
            what = f"token ids must be 0 to {vocab - 1}" if ids else "the prompt is empty"
            raise ApiError(400, what, "invalid_value", "prompt")
        most = self.limits.prompt_tokens
        if most is not None and len(ids) > most:
            raise ApiError(
                400, f"the prompt has {len(ids)} tokens, and this server takes {most}",
                "context_length_exceeded", "prompt",
            )  # fmt: skip
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = limit - len(ids) if limit else CHAT_TOKENS
        if limit and room < (asked or 1):
            raise ApiError(
                400, f"the model takes {limit} tokens; the prompt has {len(ids)}, and "
                f"{asked or 1} more were asked for", "context_length_exceeded", "prompt",
            )  # fmt: skip
        return list(ids), asked or min(room, CHAT_TOKENS)  # type: ignore[arg-type]


def make_app(served: Served, api_key: str | None, hosts: Sequence[str] = ("*",)) -> FastAPI:
    """Make the application.

    Args:
        served: The model.
        api_key: What clients must show, or None.
        hosts: Names by which the server may be called. A page in a browser that has had its own name
            point to 127.0.0.1 is none of them.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        served.worker.start()
        yield
        served.worker.close()

    app = FastAPI(title="whet", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    created = int(time.time())
    card = {"id": served.name, "object": "model", "created": created, "owned_by": "whet"}

    @app.exception_handler(ApiError)
    async def _told(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def _not_there(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).body(), error.status_code)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        running, waiting = served.worker.load()
        return {"status": "ok", "running": running, "waiting": waiting}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        check_key(request, api_key)
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        check_key(request, api_key)
        _check_name(name, served)
        return card

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        check_key(request, api_key)
        asked = parse(ChatRequest, await read_body(request, served.limits.body_bytes))
        job, shape = chat_job(served, asked)
        return await answer(request, served, job, shape, bool(asked.stream), asked.usage_in_stream)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        check_key(request, api_key)
        asked = parse(CompletionRequest, await read_body(request, served.limits.body_bytes))
        job, shape = completion_job(served, asked)
        return await answer(request, served, job, shape, bool(asked.stream), asked.usage_in_stream)

    return app


def check_key(request: Request, api_key: str | None) -> None:
    """Refuse a request without the key.

    Raises:
        ApiError: The key is missing or wrong.
    """
    if api_key is None:
        return
    given = request.headers.get("authorization", "")
    if not secrets.compare_digest(given.encode(), f"Bearer {api_key}".encode()):
        raise ApiError(
            401, "the API key is missing or wrong", "invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )  # fmt: skip


async def read_body(request: Request, most: int) -> bytes:
    """Read a request's body, no further than the limit.

    A body that is not called JSON is refused: a page of another site may send any other without asking.

    Raises:
        ApiError: It is too long, or not JSON by its own word.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be application/json")
    too_long = ApiError(413, f"the body is longer than {most} bytes", "body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > most:
        raise too_long
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise too_long
    return bytes(body)


def chat_job(served: Served, asked: ChatRequest) -> tuple[Job, Shape]:
    """Turn a conversation into a job.

    Raises:
        ApiError: The model is another, the template refuses the turns, or they are too long.
    """
    _check_name(asked.model, served)
    turns = [message.turn() for message in asked.messages]
    if served.system and all(turn["role"] != "system" for turn in turns):
        turns.insert(0, {"role": "system", "content": served.system})
    try:
        text = render_prompt(served.tokenizer, turns)
    except InputError as error:
        raise ApiError(400, str(error), "invalid_value", "messages") from error
    ids, longest = served.encode(text, asked.asked_tokens)
    sampling = with_model_defaults(served.model, asked.sampling(longest))
    requests = [
        Asked(ids, sampling, choice, asked.num_logprobs, pieces=True) for choice in range(asked.n)
    ]
    shape = ChatShape(served.name, _ends(served), len(ids))
    shape.tells = asked.num_logprobs is not None
    return Job(requests, asyncio.get_running_loop()), shape


def completion_job(served: Served, asked: CompletionRequest) -> tuple[Job, Shape]:
    """Turn prompts into a job; answers to one prompt stand side by side.

    Raises:
        ApiError: The model is another, or a prompt is empty or too long.
    """
    _check_name(asked.model, served)
    encoded = [served.encode(prompt, asked.asked_tokens) for prompt in asked.prompts()]
    if not encoded:
        raise ApiError(400, "there is no prompt", "invalid_value", "prompt")
    sampling = with_model_defaults(served.model, asked.sampling(asked.asked_tokens))
    requests = [
        Asked(ids, sampling, choice, asked.num_logprobs, bool(asked.echo), pieces=True)
        for ids, _ in encoded
        for choice in range(asked.n)
    ]
    shape = CompletionShape(served.name, _ends(served), sum(len(ids) for ids, _ in encoded))
    shape.tells = asked.num_logprobs is not None
    if asked.echo:
        shape.echoes = [served.tokenizer.decode(request.prompt) for request in requests]
    return Job(requests, asyncio.get_running_loop()), shape


async def answer(
    request: Request, served: Served, job: Job, shape: Shape, streams: bool, usage: bool
) -> Response:
    """Put a job into the line and answer when it is done, or piece by piece.

    Args:
        request: Whose client may leave, which frees the slot.
        served: The model.
        job: What is asked for.
        shape: Of the answer.
        streams: Piece by piece.
        usage: Tell the counts of tokens at a stream's end.

    Raises:
        ApiError: The line is full, or the model failed.
    """
    served.worker.submit(job)
    num = len(job.requests)
    if streams:
        events = _events(served.worker, job, shape.stream(job.pieces(), num, usage))
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    collect = asyncio.ensure_future(shape.collect(job.pieces(), num))
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait((collect, gone), return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(collect.result()) if collect.done() else Response(status_code=499)
    finally:
        served.worker.leave(job)
        collect.cancel()
        gone.cancel()


async def _events(
    worker: Worker, job: Job, chunks: AsyncIterator[dict[str, Any]]
) -> AsyncIterator[str]:
    """Write chunks as server-sent events; a reader that leaves closes this, and frees the slot."""
    try:
        async for chunk in chunks:
            yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
        yield "data: [DONE]\n\n"
    except ApiError as error:  # the answer has begun: its status cannot be changed
        yield f"data: {json.dumps(error.body())}\n\n"
    finally:
        worker.leave(job)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check_name(name: str | None, served: Served) -> None:
    if name not in (None, served.name):
        raise ApiError(
            404, f"there is no model '{name}'; this server has '{served.name}'", "model_not_found",
            "model",
        )  # fmt: skip


def _ends(served: Served) -> frozenset[int]:
    return frozenset(end_token_ids(served.model, served.tokenizer))
