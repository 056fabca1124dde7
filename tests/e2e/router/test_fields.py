"""Fields of requests over HTTP: what they reach, what is counted, and what an overflow is called."""

import json
import re
from typing import Any

import pytest

from services.protocol.messages import Prefill
from tests.e2e.router.harness import MESSAGES, Cluster

TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": " you"}]},
    {"role": "assistant", "content": "The answer"},
]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
        {"add_special_tokens": True},
        {"chat_template_kwargs": {"a": [1]}, "reasoning_effort": "none"},
    ],
    ids=str,
)
def test_tokenize_counts_what_a_chat_counts(cluster: Cluster, fields: dict[str, Any]) -> None:
    with cluster.router.http() as http:
        counted = http.post("/tokenize", json={"messages": TURNS, **fields}).json()
        answer = http.post("/v1/chat/completions", json={"messages": TURNS, "max_tokens": 2, **fields}).json()
    assert counted["tokens"] == cluster.prefill.wait_for(Prefill)[0].work.prompt
    assert counted["count"] == answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template": "{{ 1 }}"},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"documents": [{"text": "x"}]},
        {"tool_choice": "required"},
        {"messages": [{"role": "user", "content": "x", "audio": {}}]},
    ],
    ids=str,
)
def test_tokenize_refuses_what_a_chat_refuses(cluster: Cluster, fields: dict[str, Any]) -> None:
    with cluster.router.http() as http:
        bodies = [
            http.post(path, json={"messages": MESSAGES, **fields}).json()
            for path in ("/tokenize", "/v1/chat/completions")
        ]
    assert bodies[0] == bodies[1]
    assert bodies[0]["error"]["code"] == "unsupported_parameter"
    assert not cluster.prefill.of(Prefill)


def test_a_salt_is_a_prefix_cache_of_its_own(cluster: Cluster) -> None:
    asked: list[dict[str, Any]] = [
        {},
        {"cache_salt": "a"},
        {"cache_salt": "a"},
        {"cache_salt": "b"},
        {"extra_key": "a"},
        {"cache_salt": "a", "extra_key": "b"},
    ]
    with cluster.router.http() as http:
        for fields in asked:
            body = {"prompt": "abc", "max_tokens": 1, **fields}
            assert http.post("/v1/completions", json=body).status_code == 200
    salts = [prefill.work.salt for prefill in cluster.prefill.wait_for(Prefill, len(asked))]
    assert salts[0] == b""
    assert salts[1] == salts[2]
    assert len(set(salts)) == 5


def test_special_tokens_of_a_prompt_are_the_clients_choice(cluster: Cluster) -> None:
    with cluster.router.http() as http:
        for fields in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}):
            http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 1, **fields})
            http.post("/tokenize", json={"prompt": "abc", **fields})
    default, given, without = (one.work.prompt for one in cluster.prefill.wait_for(Prefill, 3))
    assert default == given
    assert default[len(default) - len(without) :] == without


@pytest.mark.parametrize("chat", [False, True])
def test_ids_and_usage_are_streamed(cluster: Cluster, chat: bool) -> None:
    cluster.says("né 🙂", "xyz")
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body: dict[str, Any] = {"messages": MESSAGES} if chat else {"prompt": "abc"}
    body |= {"n": 2, "max_tokens": 20, "return_token_ids": True, "request_id": "mine"}
    with cluster.router.http() as http:
        whole = http.post(path, json=body).json()
        options = {"include_usage": True, "continuous_usage_stats": True}
        streamed = http.post(path, json={**body, "stream": True, "stream_options": options}).text
    frames = [json.loads(line[6:]) for line in streamed.split("\n\n") if line.startswith("data: {")]
    assert all(frame["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"] for frame in frames)
    assert frames[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert whole["id"] == frames[0]["id"] == ("chatcmpl-mine" if chat else "cmpl-mine")
    prompt = cluster.prefill.wait_for(Prefill)[0].work.prompt
    for index, choice in enumerate(whole["choices"]):
        mine = [frame for frame in frames for one in frame["choices"] if one["index"] == index]
        ids = [token for frame in mine for token in frame["choices"][0].get("token_ids", [])]
        assert ids == choice["token_ids"]
        shown = [frame if chat else frame["choices"][0] for frame in mine]
        assert [one["prompt_token_ids"] for one in shown if "prompt_token_ids" in one] == [prompt]
        assert "prompt_token_ids" in shown[0]
        assert (whole if chat else choice)["prompt_token_ids"] == prompt


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [1] * 1024}),
        ("/v1/completions", {"prompt": [[1], [1] * 2000], "max_tokens": 0, "echo": True}),
        ("/v1/completions", {"prompt": "z " * 2000, "max_tokens": 5000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "z " * 2000}]}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "z " * 2000}], "max_completion_tokens": 1},
        ),
    ],
    ids=["ids", "lists of ids", "text", "chat", "chat with a length"],
)
def test_clients_know_an_overflow_by_its_words(cluster: Cluster, path: str, body: dict[str, Any]) -> None:
    with cluster.router.http() as http:
        answer = http.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    pattern = (
        r"This model's maximum context length is 1024 tokens\. However, your \w+ resulted in (\d+) tokens"
    )
    found = re.match(pattern, error["message"])
    assert found is not None and int(found[1]) >= 1024
    assert not cluster.prefill.of(Prefill)


def test_the_metric_is_the_sum_of_what_was_answered(cluster: Cluster) -> None:
    def counted(http: Any, name: str) -> float:
        return float(re.search(rf"^{name} (\S+)$", http.get("/metrics").text, re.M)[1])  # type: ignore[index]

    cluster.says("one. STOP two", "Hello", decode_limit=20)
    asked: list[dict[str, Any]] = [
        {"max_tokens": 0, "echo": True, "logprobs": 1},
        {"max_tokens": 20, "n": 2, "stop": "STOP"},
        {"prompt": ["a", "bc"], "max_tokens": 3, "n": 2},
        {"max_tokens": 1},
    ]
    names = ("baton_prompt_tokens_total", "baton_generation_tokens_total")
    with cluster.router.http() as http:
        before = [counted(http, name) for name in names]
        usages = []
        for fields in asked:
            answer = http.post("/v1/completions", json={"prompt": "abc", **fields})
            usages.append(answer.json()["usage"])
        after = [counted(http, name) for name in names]
    assert usages[0]["completion_tokens"] == 0
    assert after[0] - before[0] == sum(usage["prompt_tokens"] for usage in usages)
    assert after[1] - before[1] == sum(usage["completion_tokens"] for usage in usages)
