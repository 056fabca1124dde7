"""A cluster under faults, as the tests of faults see it: its accounts, and answers that can be compared."""

import json
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import httpx

from tests.e2e.cluster import Accounts, wait_until
from tests.e2e.test_tokens import prompt_of
from tests.patience import patient

PROMPT = prompt_of(150, 9)
BACK_S = patient(60.0)
System = TypeVar("System", bound=Accounts)


class Served(Generic[System]):
    """`wanted` are the greedy tokens of `PROMPT`; `count` is how many workers there are."""

    def __init__(self, cluster: System, wanted: list[int], count: int) -> None:
        self.cluster, self.wanted, self.count = cluster, wanted, count

    def workers(self) -> dict[str, dict[str, Any]]:
        """By name, those that have a status."""
        return {one["status"]["name"]: one for one in self.cluster.cluster()["workers"] if one["status"]}

    def status(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.workers()[name]["status"]
        return found

    def busy(self, role: str) -> str | None:
        """A worker of the role on which the router has requests."""
        for name, worker in self.workers().items():
            if worker["status"]["role"] == role and any(worker["router_view"].values()):
                return name
        return None

    def metric(self, name: str) -> float:
        for line in self.cluster.http.get("/metrics").text.splitlines():
            if line.startswith(name):
                return float(line.split()[-1])
        return 0.0

    def prefilled(self, counter: str) -> float:
        """A counter of all prefill workers, by accounts that are made after this call."""
        asked_s = time.monotonic()
        total: list[float] = []

        def fresh() -> bool:
            workers = [one for name, one in self.workers().items() if name.startswith("prefill")]
            if any(one["status_age_s"] > time.monotonic() - asked_s for one in workers):
                return False
            total.append(sum(one["status"]["counters"].get(counter, 0) for one in workers))
            return True

        wait_until("fresh counters", fresh)
        return total[-1]

    def wait_complete(self) -> None:
        def complete() -> bool:
            workers = self.workers().values()
            return len(workers) == self.count and all(one["status"]["state"] == "ready" for one in workers)

        wait_until(f"{self.count} workers are ready", complete, BACK_S)

    def whole(self, **changes: Any) -> dict[str, Any]:
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": len(self.wanted), "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True, **changes}
        with httpx.Client(base_url=self.cluster.url, timeout=patient(120)) as http:
            answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        values: dict[str, Any] = answer.json()
        return values

    def check(self, answer: dict[str, Any], choices: int = 1) -> None:
        assert len(answer["choices"]) == choices
        for choice in answer["choices"]:
            assert choice["token_ids"] == self.wanted
            assert choice["finish_reason"] == "length"
        usage = answer["usage"]
        counts = (usage["prompt_tokens"], usage["completion_tokens"])
        assert counts == (len(PROMPT), choices * len(self.wanted))


def stream(served: "Served[Any]", on_token: Callable[[int], None]) -> tuple[str, list[float], dict[str, int]]:
    """Text, log probabilities and usage of a streamed answer; `on_token` gets how many tokens there are."""
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": len(served.wanted), "temperature": 0}
    body |= {"ignore_eos": True}
    body |= {"stream": True, "logprobs": 0, "stream_options": {"include_usage": True}}
    text, logprobs, usage, done = "", [], {}, False
    with served.cluster.http.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            done |= line == "data: [DONE]"
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            usage = event["usage"] or usage
            for choice in event["choices"]:
                text += choice["text"]
                if choice["logprobs"]:
                    logprobs += choice["logprobs"]["token_logprobs"]
            on_token(len(logprobs))
    assert done
    return text, logprobs, usage
