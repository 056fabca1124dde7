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
import torch

from services.engine.sampling.counter_rng import uniform
from tests.chaos.borders import CLOSE, Borders, WrongReference
from tests.chaos.client import Answer, Choice
from tests.chaos.evidence import COUNTS, record, restless, tail
from tests.chaos.leaks import DESCRIPTORS, Watched
from tests.chaos.load import Load
from tests.chaos.outages import Outages
from tests.chaos.reference import difference
from tests.chaos.report import Report
from tests.chaos.requests import Plan, sample_plans
from tests.checkpoints import make_checkpoint

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


def test_draws_on_a_border_are_seen(tmp_path: Path) -> None:
    model_dir = make_checkpoint("qwen3", tmp_path / "model", seed=5)
    borders = Borders(model_dir)
    prompt, seed = [5, 9, 17], 3
    with torch.no_grad():
        row = borders._model(torch.tensor([prompt])).logits[0, -1]
    upto = row.softmax(-1).cumsum(-1)
    chance = uniform(seed, 0, len(prompt))
    right = int((upto <= chance).sum())
    body = {"prompt": prompt, "seed": seed, "temperature": 1.0, "n": 1}
    assert not borders.is_close(Plan(0, body), {0: [right]})
    with pytest.raises(WrongReference, match="token 0 is"):
        borders.is_close(Plan(0, body), {0: [right + 1]})
    # With another temperature the same chance lies wherever one likes: here, on the border above `right`.
    low, high = (1.0, 8.0) if _upto(row, 8.0, right) < chance else (1.0, 0.05)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _upto(row, middle, right) > chance else (low, middle)
    assert abs(_upto(row, low, right) - chance) < CLOSE
    assert borders.is_close(Plan(0, body | {"temperature": low}), {0: [right]})
    greedy = int(row.argmax())
    assert not borders.is_close(Plan(0, body | {"temperature": 0}), {0: [greedy]})


def _upto(row: torch.Tensor, temperature: float, token: int) -> float:
    return float((row / temperature).softmax(-1)[: token + 1].sum())


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
        assert len(watched.grown()) == 1 and len(watched.left(ends_s=0.0)) == 1
        child.communicate(b"\n")
    assert watched.left(ends_s=0.0) == []
    watched.shared.add(Path(__file__))
    assert len(watched.left(ends_s=0.0)) == 1


class Ending(psutil.Process):
    """This process, which says after two looks that it has ended."""

    looks = 0

    def is_running(self) -> bool:
        self.looks += 1
        return self.looks <= 2


def test_what_is_still_ending_is_no_leak() -> None:
    watched = Watched()
    watched.meet([Ending()])
    assert len(watched.left(ends_s=0.0)) == 1
    watched.seen.clear()
    watched.meet([Ending()])
    assert watched.left() == []


def test_of_a_cluster_without_rest_the_record_and_the_logs_are_shown() -> None:
    taken = {"free": 7, "total": 8}
    status = {name: 0 for name in COUNTS} | {"pages": {"used": 0}, "slots": taken, "ledger": {}}
    rest = {"connection": "ready", "router_view": {"live_requests": 0}, "hello": None}
    assert restless(rest | {"status": status})
    assert restless(rest | {"status": None})
    assert not restless(rest | {"status": status | {"slots": None}})
    assert "ledger" not in record(rest | {"status": status})["status"]
    log = ["[decode-1] a", "[decode-10] b", "decode-1 started (pid 1)", "[decode-1-transfer] c", "[router] d"]
    assert tail(log, "decode-1") == [log[0], log[2], log[3]]


def test_recovery_is_told_by_kind_of_fault() -> None:
    report = Report(seed=0)
    report.faults["kill decode"] = 2
    report.pauses_s["kill decode"] += [0.5, 3.0, 1.0]
    report.spared_s["kill decode"].append(0.5)
    report.outages_s["kill decode"].append(4.0)
    assert report.details() == [
        "kill decode: 2; streams stood still 3 times, p50/p99/max 1.00/3.00/3.00 s; "
        "all ready again 1 times, p50/p99/max 4.00/4.00/4.00 s",
        "kill decode, another being ready: streams stood still 1 times, p50/p99/max 0.50/0.50/0.50 s",
    ]
    assert "recovery p50/max 1.00/3.00 s" in report.summary()


def test_the_same_seed_draws_the_same_requests() -> None:
    assert sample_plans(3, 40) == sample_plans(3, 40) != sample_plans(4, 40)
