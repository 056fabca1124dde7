"""What a client gets when something is wrong, and what the workers are told when it leaves."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from services.protocol.messages import Cancel, Failed, Prefill
from tests.e2e.router.harness import MESSAGES, Cluster, open_request, until
from tests.fake_worker import Script

ROUTE_ERRORS = [
    ("GET", "/v1/nothing", 404, "not_found"),
    ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
    ("POST", "/v1/models", 405, "method_not_allowed"),
    ("DELETE", "/health", 405, "method_not_allowed"),
    ("GET", "/v1/models/other", 404, "model_not_found"),
    ("GET", "/docs", 404, "not_found"),
]


@pytest.mark.parametrize(("method", "path", "status", "code"), ROUTE_ERRORS)
def test_wrong_routes_have_openais_body(
    cluster: Cluster, method: str, path: str, status: int, code: str
) -> None:
    with cluster.router.http() as http:
        answer = http.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.json()["error"]["code"] == code
    assert answer.headers["x-request-id"]


def test_bodies_over_the_limit_are_not_read(cluster: Cluster) -> None:
    with cluster.router.http() as http:
        declared = http.post("/v1/completions", content=b"x" * 100_001)

        def pieces() -> Iterator[bytes]:
            for _ in range(11):
                yield b"x" * 10_000

        chunked = http.post("/v1/completions", content=pieces())
    for answer in (declared, chunked):
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"


def test_validation_errors_reach_the_client_library(cluster: Cluster) -> None:
    client = cluster.router.client()
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=[1] * 1024)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=[320])
    assert caught.value.param == "prompt"
    assert not cluster.prefill.of(Prefill)


FAILURES = [("invalid", 400), ("overloaded", 429), ("transfer", 503), ("draining", 503), ("internal", 500)]


@pytest.mark.parametrize(("code", "status"), FAILURES)
@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_token_has_its_status(
    cluster: Cluster, code: Any, status: int, side: str, stream: bool
) -> None:
    failed = Failed(1, code, "no room", False)
    if side == "prefill":
        cluster.use(Script(fail_prefill=failed))
    else:
        cluster.use(Script(fail_reserve=failed, hold_prefill=True))
    with cluster.router.http() as http:
        answer = http.post("/v1/completions", json={"prompt": "a", "stream": stream})
    assert answer.status_code == status
    assert answer.json()["error"]["message"] == "no room"
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    other = cluster.decode if side == "prefill" else cluster.prefill
    other.wait_for(Cancel)


def test_a_failure_in_the_middle_ends_the_stream_with_an_error(cluster: Cluster) -> None:
    cluster.says("Hello", decode_limit=2, fail_decode=Failed(1, "internal", "broken", False))
    with cluster.router.http() as http:
        answer = http.post("/v1/completions", json={"prompt": "a", "stream": True})
    assert answer.status_code == 200
    frames = [frame for frame in answer.text.split("\n\n") if frame]
    assert json.loads(frames[-1][6:])["error"]["message"] == "broken"
    assert "[DONE]" not in answer.text
    stream = cluster.router.client(strict=False).completions.create(model="tiny", prompt="a", stream=True)
    texts = []
    with pytest.raises(openai.APIError, match="broken"):
        for chunk in stream:
            texts.append(chunk.choices[0].text)
    assert "".join(texts) == "Hel"


def test_a_failure_in_the_middle_of_a_whole_answer_is_not_to_be_retried(cluster: Cluster) -> None:
    cluster.says("Hello", decode_limit=2, fail_decode=Failed(1, "transfer", "lost", False))
    with cluster.router.http() as http:
        answer = http.post("/v1/completions", json={"prompt": "a"})
    assert answer.status_code == 503
    assert answer.headers["x-should-retry"] == "false"


PHASES = {
    "prefilling": Script(hold_prefill=True),
    "joining": Script(hold_decode=True),
    "decoding": Script(decode_limit=1),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", PHASES)
def test_a_client_that_leaves_frees_its_workers(cluster: Cluster, phase: str, stream: bool) -> None:
    cluster.use(PHASES[phase])
    connection = open_request(cluster.router, {"prompt": "a", "stream": stream, "n": 2})
    cluster.prefill.wait_for(Prefill)
    until(lambda: cluster.router.get("/cluster")["router"]["phases"].get(phase), f"a request {phase}")
    if stream and phase != "prefilling":
        assert b"200 OK" in connection.recv(1 << 16)
    connection.close()
    assert cluster.decode.wait_for(Cancel)[0].choice is None
    if phase != "decoding":
        cluster.prefill.wait_for(Cancel)


def test_a_client_that_leaves_one_of_many_prompts_frees_them_all(cluster: Cluster) -> None:
    cluster.use(Script(hold_prefill=True))
    connection = open_request(cluster.router, {"prompt": ["a", "b", "c"]})
    cluster.prefill.wait_for(Prefill, 3)
    connection.close()
    cluster.prefill.wait_for(Cancel, 3)
    cluster.decode.wait_for(Cancel, 3)


def test_a_failing_prompt_ends_its_siblings(cluster: Cluster) -> None:
    cluster.use(Script(hold_prefill=True))
    connection = open_request(cluster.router, {"prompt": ["a", "b"]})
    prefills = cluster.prefill.wait_for(Prefill, 2)
    cluster.prefill.say([Failed(prefills[0].work.request_id, "overloaded", "full", True)])
    assert b" 429 " in connection.recv(1 << 16)
    cluster.prefill.wait_for(Cancel)
    cluster.decode.wait_for(Cancel, 2)
    connection.close()
