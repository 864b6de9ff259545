"""The thread that decodes: requests wait in a line, join the batch when there is room, and leave it.

Event loop and thread meet in two places: a line of jobs, under one lock, and each job's own queue of
pieces, which the thread fills through the loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from whet.answer import Answer, Finish, Request, TokenLogprob
from whet.decoding import Batch
from whet.serving.protocol import ApiError

logger = logging.getLogger(__name__)

# Prompt tokens that are read in one pass between two steps of those who are being answered: they wait
# for it. A prompt that is longer by itself is read alone.
PROMPT_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Piece:
    """News of one answer.

    Args:
        index: Which of the job's answers.
        text: What is new in its text.
        logprobs: Of the tokens that begin in it.
        finish: Why it ended, with the last piece.
        num_tokens: Generated so far.
        prompt_logprobs: With the first piece, where they were asked for.
    """

    index: int
    text: str
    logprobs: list[TokenLogprob]
    finish: Finish | None
    num_tokens: int
    prompt_logprobs: list[TokenLogprob]


@dataclass(eq=False)
class Job:
    """What one HTTP request asks for: one or more answers, which start together.

    Args:
        requests: One an answer.
        loop: Where the handler runs.
        answers: The answers, once they have begun.
        left: Nobody waits for it any more.
        ended: Answers whose end was told.
    """

    requests: Sequence[Request]
    loop: asyncio.AbstractEventLoop
    answers: list[Answer] = field(default_factory=list)
    left: bool = False
    ended: set[int] = field(default_factory=set)
    _news: asyncio.Queue[Piece | ApiError] = field(default_factory=asyncio.Queue)

    @property
    def num_tokens(self) -> int:
        """Tokens of all its prompts."""
        return sum(len(request.prompt) for request in self.requests)

    def put(self, news: Piece | ApiError) -> None:
        """Hand news to the handler, from the thread."""
        self.loop.call_soon_threadsafe(self._news.put_nowait, news)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield the news of all answers until the last has ended.

        Raises:
            ApiError: The model failed.
        """
        open_answers = len(self.requests)
        while open_answers:
            news = await self._news.get()
            if isinstance(news, ApiError):
                raise news
            open_answers -= news.finish is not None
            yield news


class Worker:
    """Answers jobs, as many together as there are slots.

    Args:
        batch: An empty batch.
        num_slots: Answers at work together.
        num_waiting: Jobs that may wait for a slot.
    """

    def __init__(self, batch: Batch, num_slots: int, num_waiting: int) -> None:
        self.batch, self.num_slots, self.num_waiting = batch, num_slots, num_waiting
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._news = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="whet decoding", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread; jobs that are left get an error."""
        with self._news:
            self._closing = True
            self._news.notify()
        self._thread.join()

    def submit(self, job: Job) -> None:
        """Put a job into the line.

        Raises:
            ApiError: It is too many answers for this server, or the line is full.
        """
        if len(job.requests) > self.num_slots:
            raise ApiError(
                400, f"{len(job.requests)} answers were asked for, and this server gives at most "
                f"{self.num_slots} to one request", "too_many_answers", "n",
            )  # fmt: skip
        with self._news:
            if self._closing:
                raise ApiError(503, "the server is shutting down")
            self._waiting.append(job)
            if self._num_kept_waiting() > self.num_waiting:
                self._waiting.pop()
                raise ApiError(
                    429, f"{self.num_waiting} requests are waiting already; try again later",
                    "queue_full", headers={"Retry-After": "1"},
                )  # fmt: skip
            self._news.notify()

    def leave(self, job: Job) -> None:
        """Forget a job that nobody waits for."""
        with self._news:
            job.left = True
            self._news.notify()

    def load(self) -> tuple[int, int]:
        """Return how many answers are at work and how many jobs wait."""
        with self._news:
            return sum(len(job.requests) for job in self._running), len(self._waiting)

    def _num_busy(self) -> int:
        """Count the slots that are taken; an admitted job has no answers until they begin."""
        ended = sum(bool(answer.finish) for job in self._running for answer in job.answers)
        return sum(len(job.requests) for job in self._running) - ended

    def _num_kept_waiting(self) -> int:
        """Count the jobs in the line but those at its head for which slots are free."""
        busy = self._num_busy()
        for place, job in enumerate(self._waiting):
            busy += len(job.requests)
            if busy > self.num_slots:
                return len(self._waiting) - place
        return 0

    def _work(self) -> None:
        while True:
            with self._news:
                while not (self._waiting or self._running or self._closing):
                    self._news.wait()
                if self._closing:
                    self._fail([*self._running, *self._waiting], 503, "the server is shutting down")
                    return
                self._forget_left()
                fresh = self._admit()
            try:
                if fresh:
                    self._begin(fresh)
                self.batch.step()
            except Exception:  # whatever it was, no client may wait for ever
                logger.exception("decoding failed")
                with self._news:
                    self._fail(self._running, 500, "the model failed; the server's log says how")
                    self._running = []
                    for answer in list(self.batch.answers):
                        self.batch.cancel(answer)
                continue
            self._tell()

    def _forget_left(self) -> None:
        self._waiting = deque(job for job in self._waiting if not job.left)
        for job in [job for job in self._running if job.left]:
            self._running.remove(job)
            for answer in job.answers:
                self.batch.cancel(answer)

    def _admit(self) -> list[Job]:
        """Take the jobs from the line for which there is room."""
        fresh: list[Job] = []
        busy, tokens = self._num_busy(), 0
        while self._waiting:
            job = self._waiting[0]
            busy, tokens = busy + len(job.requests), tokens + job.num_tokens
            if busy > self.num_slots or (fresh and tokens > PROMPT_TOKENS):
                break
            fresh.append(self._waiting.popleft())
        self._running += fresh
        return fresh

    def _begin(self, fresh: list[Job]) -> None:
        answers = iter(self.batch.add([request for job in fresh for request in job.requests]))
        for job in fresh:
            job.answers = [next(answers) for _ in job.requests]

    def _tell(self) -> None:
        """Hand out what is new, and let go of jobs that are done."""
        for job in list(self._running):
            for index, answer in enumerate(job.answers):
                if index in job.ended:
                    continue
                if answer.finish:
                    job.ended.add(index)
                text, logprobs = answer.take_piece()
                first, answer.prompt_logprobs = answer.prompt_logprobs, []
                if text or logprobs or first or answer.finish:
                    job.put(Piece(
                        index, text, logprobs, answer.finish, len(answer.tokens), first
                    ))  # fmt: skip
            if all(answer.finish for answer in job.answers):
                with self._news:
                    self._running.remove(job)

    def _fail(self, jobs: Sequence[Job], status: int, message: str) -> None:
        for job in jobs:
            job.put(ApiError(status, message))
