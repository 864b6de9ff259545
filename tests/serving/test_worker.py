"""The line before the slots: who starts at once, who waits, who is told to come again.

The worker's thread is not started, so that nobody leaves the line while it is looked at.
"""

import asyncio

import pytest

pytest.importorskip("fastapi")

from whet.answer import Request  # noqa: E402
from whet.generate import Sampling  # noqa: E402
from whet.serving.protocol import ApiError  # noqa: E402
from whet.serving.worker import Job, Worker  # noqa: E402


def job(num_answers=1):
    requests = [Request([1, 2], Sampling(max_new_tokens=4))] * num_answers
    return Job(requests, asyncio.new_event_loop())


def accepted(worker, jobs):
    """Submit jobs; return for each whether the line took it."""
    found = []
    for one in jobs:
        try:
            worker.submit(one)
        except ApiError as error:
            assert error.status == 429
            found.append(False)
        else:
            found.append(True)
    return found


@pytest.mark.parametrize(("num_slots", "num_waiting"), [(2, 3), (1, 0), (4, 1)])
def test_slots_and_line_are_filled_before_anyone_is_refused(num_slots, num_waiting):
    worker = Worker(batch=None, num_slots=num_slots, num_waiting=num_waiting)
    room = num_slots + num_waiting
    assert accepted(worker, [job() for _ in range(room + 2)]) == [True] * room + [False] * 2


def test_those_about_to_start_do_not_wait_and_those_behind_a_big_one_do():
    worker = Worker(batch=None, num_slots=4, num_waiting=1)
    assert accepted(worker, [job(3), job(2), job(1)]) == [True, True, False]


def test_an_admitted_job_keeps_its_slots_before_its_answers_begin():
    worker = Worker(batch=None, num_slots=2, num_waiting=0)
    assert accepted(worker, [job(2)]) == [True]
    assert worker._admit() and worker.load() == (2, 0)
    assert accepted(worker, [job()]) == [False]
