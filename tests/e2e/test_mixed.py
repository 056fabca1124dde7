"""200 mixed requests at once: every one ends as it should, and the whole cluster is at rest afterwards."""

import asyncio
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.e2e.cluster import Cluster
from tests.patience import patient

REQUESTS = 200
MAX_MODEL_LEN = 2048
WRONG: list[dict[str, Any]] = [
    {"prompt": []},
    {"prompt": [VOCAB_SIZE]},
    {"prompt": [1] * MAX_MODEL_LEN},
    {"n": 0},
    {"max_tokens": -1},
    {"top_p": 2.0},
]


@dataclass(frozen=True)
class Plan:
    """One client's behaviour. `cut_after` is the number of stream events it reads before it hangs up."""

    body: dict[str, Any]
    expect_status: int = 200
    cut_after: int | None = None


def make_plans(seed: int, max_tokens: list[int], requests: int = REQUESTS) -> list[Plan]:
    random_ = random.Random(seed)
    plans: list[Plan] = []
    for index in range(requests):
        length = random_.choice([1, 2, 15, 16, 17, random_.randint(3, 200), random_.randint(200, 1500)])
        body: dict[str, Any] = {
            "model": "tiny",
            "prompt": [random_.randrange(VOCAB_SIZE) for _ in range(length)],
            "max_tokens": random_.choice(max_tokens),
            "temperature": random_.choice([0, 0.7, 1.3]),
            "n": random_.choice([1, 1, 1, 2, 3]),
            "seed": index,
        }
        match index % 10:
            case 0:
                endless = {"stream": True, "max_tokens": 200, "ignore_eos": True}
                plans.append(Plan(body | endless, cut_after=3))
            case 1:
                plans.append(Plan(body | random_.choice(WRONG), expect_status=400))
            case 2 | 3 | 4:
                options = {"stream": True, "stream_options": {"include_usage": True}}
                plans.append(Plan(body | options))
            case 5:
                plans.append(Plan(body | {"logprobs": 3, "presence_penalty": 0.5, "top_k": 20}))
            case _:
                plans.append(Plan(body))
    return plans


async def run_plan(client: httpx.AsyncClient, plan: Plan) -> None:
    if not plan.body.get("stream"):
        answer = await client.post("/v1/completions", json=plan.body)
        assert answer.status_code == plan.expect_status, answer.text
        if plan.expect_status != 200:
            assert set(answer.json()["error"]) >= {"message", "type", "param", "code"}
            return
        choices = answer.json()["choices"]
        assert sorted(choice["index"] for choice in choices) == list(range(plan.body["n"]))
        assert all(choice["finish_reason"] in ("stop", "length") for choice in choices)
        assert answer.json()["usage"]["prompt_tokens"] == len(plan.body["prompt"])
        return
    await run_stream(client, plan)


async def run_stream(client: httpx.AsyncClient, plan: Plan) -> None:
    finished: dict[int, str] = {}
    usage: dict[str, Any] | None = None
    events = 0
    done = False
    async with client.stream("POST", "/v1/completions", json=plan.body) as answer:
        assert answer.status_code == plan.expect_status
        async for line in answer.aiter_lines():
            if not line.startswith("data: "):
                continue
            assert not done, "nothing follows [DONE]"
            if line == "data: [DONE]":
                done = True
                continue
            events += 1
            if plan.cut_after is not None and events >= plan.cut_after:
                return
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                assert choice["index"] not in finished, "text after the finish reason"
                if choice["finish_reason"] is not None:
                    finished[choice["index"]] = choice["finish_reason"]
    assert done and sorted(finished) == list(range(plan.body["n"]))
    if plan.cut_after is None:
        assert usage is not None and usage["prompt_tokens"] == len(plan.body["prompt"])


async def run_all(url: str, plans: list[Plan], at_once: int) -> list[BaseException]:
    gate = asyncio.Semaphore(at_once)

    async def guarded(plan: Plan) -> None:
        async with gate:
            await run_plan(client, plan)

    limits = httpx.Limits(max_connections=at_once)
    async with httpx.AsyncClient(base_url=url, timeout=patient(120), limits=limits) as client:
        outcomes = await asyncio.gather(*map(guarded, plans), return_exceptions=True)
    return [one for one in outcomes if one is not None]


@pytest.mark.parametrize("size", ["roomy", "tight"])
def test_two_hundred_mixed_requests_end_as_they_should(size: str, tmp_path: Path) -> None:
    """`tight` has a pool and staging so small that reservations wait and choices are preempted."""
    model_dir = make_checkpoint("qwen3", tmp_path / "model", seed=5, max_model_len=MAX_MODEL_LEN)
    flags = ("--served-model-name", "tiny", "--max-chunk-tokens", "256")
    max_tokens = [1, 2, 5, 20, 40]
    if size == "tight":
        flags += ("--mem-fraction", _fraction_for_pages(model_dir, pages=MAX_MODEL_LEN // 16))
        flags += ("--staging-slots", "3", "--staging-slot-bytes", "16384", "--max-batch", "24")
        max_tokens = [1, 2, 100, 200]
    with Cluster(model_dir, tmp_path, *flags) as cluster:
        failures = asyncio.run(run_all(cluster.url, make_plans(7, max_tokens), at_once=48))
        assert not failures, failures[:3]
        cluster.assert_at_rest()
        status = cluster.worker("decode")["status"]
        if size == "tight":
            assert status["counters"]["preemptions"] > 0, "the pool was not tight enough to mean anything"
        assert status["counters"].get("transfer_dropped_total", 0) == 0
        assert 0 < status["measured_steps"] <= status["counters"]["steps"]
        assert status["measured_steps_s"] > 0 and status["step_costs"]["base_s"] >= 0
        assert cluster.worker("prefill")["status"]["measured_steps"] is None


def _fraction_for_pages(model_dir: Path, pages: int) -> str:
    """The --mem-fraction that leaves about so many pages of a 2 GiB device."""
    from services.engine.models.model_config import read_model_config

    model = read_model_config(model_dir)
    needed = model.parameter_bytes("float32") + (pages + 1) * 16 * model.kv_token_bytes("float32")
    return f"{needed / (2 << 30):.6f}"
