"""The checks of a chaos run see what they are there for. No process is started but one that sleeps."""

import asyncio
import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.chaos.client import Answer, Choice
from tests.chaos.leaks import DESCRIPTORS, Watched
from tests.chaos.load import Load
from tests.chaos.outages import Outages
from tests.chaos.reference import difference
from tests.chaos.report import Report
from tests.chaos.requests import Plan, draw_plans

PLAN = Plan(0, {"n": 1})
RIGHT = Answer(200, {0: Choice([1, 2, 3], "abc", "length")}, (4, 3))
BODY = {
    "choices": [{"index": 0, "token_ids": [1, 2, 3], "text": "abc", "finish_reason": "length"}],
    "usage": {"prompt_tokens": 4, "completion_tokens": 3},
}
REFUSAL = httpx.Response(503, headers={"retry-after": "1"}, json={"error": {"code": "no_workers"}})
LOST = httpx.Response(503, headers={"retry-after": "1"}, json={"error": {"code": "worker_lost"}})


def test_an_answer_like_the_reference_is_right() -> None:
    assert difference(PLAN, deepcopy(RIGHT), RIGHT) is None


@pytest.mark.parametrize(
    ("choices", "usage"),
    [
        ({0: Choice([1, 2, 4], "abc", "length")}, (4, 3)),
        ({0: Choice([1, 2], "abc", "length")}, (4, 3)),
        ({0: Choice([1, 2, 3], "abc", "stop")}, (4, 3)),
        ({0: Choice([1, 2, 3], "ab", "length")}, (4, 3)),
        ({0: Choice([1, 2, 3], "abc", "length")}, (4, 4)),
        ({}, (4, 3)),
    ],
)
def test_any_difference_is_wrong(choices: dict[int, Choice], usage: tuple[int, int]) -> None:
    assert difference(PLAN, Answer(200, choices, usage), RIGHT) is not None


def test_what_was_cut_off_must_begin_like_the_reference() -> None:
    cut = Answer(200, {0: Choice([1, 2], "ab")}, cut=True)
    assert difference(PLAN, cut, RIGHT) is None
    cut.choices[0].tokens[1] = 9
    assert difference(PLAN, cut, RIGHT) is not None


def attempted(reply: httpx.Response | httpx.TransportError, outages: Outages) -> Report:
    async def answer(request: httpx.Request) -> httpx.Response:
        if isinstance(reply, httpx.TransportError):
            raise reply
        return reply

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://test") as http:
            await Load("", [], {0: RIGHT}, outages, report).attempt(http, PLAN)

    report = Report(seed=0)
    asyncio.run(run())
    return report


def broken(router_dies: bool) -> Outages:
    outages = Outages()
    outages.begin(0.0, router_dies)
    return outages


def changed(**changes: Any) -> httpx.Response:
    values = json.loads(json.dumps(BODY))
    values["choices"][0] |= changes
    return httpx.Response(200, json=values)


def test_a_refusal_is_allowed_while_something_is_broken() -> None:
    assert attempted(REFUSAL, broken(router_dies=False)).refused == 1
    assert attempted(REFUSAL, Outages()).count("failed") == 1


def test_a_lost_connection_is_allowed_while_the_router_is_gone() -> None:
    error = httpx.ReadError("cut")
    assert attempted(error, broken(router_dies=True)).cut == 1
    assert attempted(error, broken(router_dies=False)).count("failed") == 1


def test_other_errors_are_failures_and_other_tokens_wrong() -> None:
    outages = broken(router_dies=True)
    assert attempted(LOST, outages).count("failed") == 1
    assert attempted(changed(token_ids=[1, 2, 4]), outages).count("wrong") == 1
    assert attempted(changed(), outages).violations == []


def test_an_outage_counts_for_what_began_before_its_end() -> None:
    outages = broken(router_dies=False)
    outages.end(5.0)
    assert outages.any_since(4.0) and not outages.any_since(6.0) and not outages.router_since(4.0)


def test_leaks_are_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        watched = Watched()
        watched.meet([psutil.Process(child.pid)])
        watched.look({"me": psutil.Process()})
        read, write = os.pipe()
        kept = [read, write, *(os.dup(read) for _ in range(DESCRIPTORS))]
        watched.look({"me": psutil.Process()})
        for one in kept:
            os.close(one)
        assert len(watched.grown()) == 1 and len(watched.left()) == 1
        child.communicate(b"\n")
    assert watched.left() == []
    watched.shared.add(Path(__file__))
    assert len(watched.left()) == 1


def test_the_same_seed_draws_the_same_requests() -> None:
    assert draw_plans(3, 40) == draw_plans(3, 40) != draw_plans(4, 40)
