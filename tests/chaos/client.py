"""One request over HTTP and everything that came back, in a form that can be compared."""

import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.chaos.requests import Plan


class BadAnswer(Exception):
    """The answer breaks the API's own rules, whatever was asked."""


class Refused(Exception):
    """429 or 503 before anything was answered, with how long to wait."""

    def __init__(self, status: int, code: str, retry_after_s: float) -> None:
        super().__init__(f"{status} {code}")
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class Choice:
    """`tokens` are ids, or in a stream the tokens' texts."""

    tokens: list[int | str] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None

    def begins(self, other: "Choice") -> bool:
        """Whether the other one could go on from here."""
        return other.tokens[: len(self.tokens)] == self.tokens and other.text.startswith(self.text)


@dataclass(slots=True)
class Answer:
    """`arrivals_s` are the times of the events of a stream, by `time.monotonic`."""

    status: int
    choices: dict[int, Choice] = field(default_factory=dict)
    usage: tuple[int, int] | None = None
    cut: bool = False
    arrivals_s: list[float] = field(default_factory=list)


async def ask(http: httpx.AsyncClient, plan: Plan, answer: Answer) -> None:
    """Fills `answer`. Raises Refused, BadAnswer or httpx.TransportError."""
    if plan.streams:
        async with http.stream("POST", "/v1/completions", json=plan.body) as reply:
            answer.status = reply.status_code
            if reply.status_code == 200:
                await _read_stream(reply, plan, answer)
                return
            await reply.aread()
    else:
        reply = await http.post("/v1/completions", json=plan.body)
        answer.status = reply.status_code
    if reply.status_code == 200:
        _read_whole(reply.json(), answer)
    elif reply.status_code != plan.expect_status:
        _raise_error(reply)


def _raise_error(reply: httpx.Response) -> None:
    try:
        code = str(reply.json()["error"]["code"])
    except (ValueError, KeyError, TypeError):
        raise BadAnswer(f"{reply.status_code} without an error object: {reply.text[:200]}") from None
    refused = reply.status_code == 429 or (reply.status_code == 503 and code == "no_workers")
    if not refused or "retry-after" not in reply.headers:
        raise BadAnswer(f"{reply.status_code} {code}: {reply.text[:200]}")
    raise Refused(reply.status_code, code, float(reply.headers["retry-after"]))


def _read_whole(values: dict[str, Any], answer: Answer) -> None:
    for one in values["choices"]:
        answer.choices[one["index"]] = Choice(one["token_ids"], one["text"], one["finish_reason"])
    answer.usage = _usage(values["usage"])


async def _read_stream(reply: httpx.Response, plan: Plan, answer: Answer) -> None:
    done = False
    async for line in reply.aiter_lines():
        if not line.startswith("data: "):
            continue
        if done:
            raise BadAnswer("an event after [DONE]")
        if line == "data: [DONE]":
            done = True
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise BadAnswer(f"an error event: {event['error']}")
        answer.arrivals_s.append(time.monotonic())
        answer.usage = _usage(event["usage"]) if event.get("usage") else answer.usage
        for one in event["choices"]:
            _add(answer, one)
        if plan.cut_after is not None and len(answer.arrivals_s) >= plan.cut_after:
            answer.cut = True
            return
    if not done:
        raise BadAnswer("the stream ended without [DONE]")


def _add(answer: Answer, one: dict[str, Any]) -> None:
    choice = answer.choices.setdefault(one["index"], Choice())
    if choice.finish_reason is not None:
        raise BadAnswer(f"choice {one['index']} goes on after its end")
    choice.text += one["text"]
    if one["logprobs"]:
        choice.tokens += one["logprobs"]["tokens"]
    choice.finish_reason = one["finish_reason"]


def _usage(values: dict[str, int]) -> tuple[int, int]:
    return values["prompt_tokens"], values["completion_tokens"]
