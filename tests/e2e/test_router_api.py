"""The router as a client sees it: the real process over HTTP, the openai client in strict mode, and fake
workers that answer from a script (tests/fake_worker.py)."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tokenizers import Tokenizer

from services.messages import Cancel, Failed, Generate, Join, Prefill, Reserve
from tests.checkpoints import IM_END, write_tokenizer
from tests.fake_worker import FakeWorker, Script

DEADLINE_S = 20.0
START = """
import sys, json, pathlib
from router.config import RouterConfig
from router.process import run
given = json.loads(sys.argv[1])
given["workers"], given["model_dir"] = tuple(given["workers"]), pathlib.Path(given["model_dir"])
given["api_keys"] = tuple(given.get("api_keys", ()))
run(RouterConfig(**given))
"""


def until(condition: Callable[[], Any], what: str) -> Any:
    """Polls a state with a deadline."""
    end_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < end_s:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError(f"never came: {what}")


@dataclass
class Router:
    process: subprocess.Popen[str]
    url: str
    api_key: str = "none"

    def client(self, strict: bool = True) -> openai.OpenAI:
        """Strict for everything but streamed completions: the library has no type of its own for their
        chunks, and takes them for whole answers, whose `finish_reason` is never null."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=self.api_key,
            max_retries=0,
            timeout=DEADLINE_S,
            _strict_response_validation=strict,
        )

    def http(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.api_key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=DEADLINE_S)

    def get(self, path: str) -> Any:
        with self.http() as http:
            return http.get(path).json()

    def ready(self) -> bool:
        with self.http() as http:
            return http.get("/ready").status_code == 200

    def at_rest(self) -> bool:
        values = self.get("/cluster")
        views = [worker["router_view"] for worker in values["workers"]]
        return values["router"]["live_requests"] == 0 and all(not any(view.values()) for view in views)


@contextlib.contextmanager
def running_router(model_dir: Path, workers: list[str], **settings: Any) -> Iterator[Router]:
    given = {
        "workers": workers,
        "model_dir": str(model_dir),
        "served_model_name": "tiny",
        "port": 0,
        "heartbeat_s": 0.1,
        **settings,
    }
    process = subprocess.Popen(
        [sys.executable, "-c", START, json.dumps(given)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "ready" in line, line
        yield Router(process, line.split()[-1], (settings.get("api_keys") or ["none"])[0])
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("s")
    directory.chmod(0o700)
    return directory


@dataclass
class Cluster:
    router: Router
    prefill: FakeWorker
    decode: FakeWorker
    script: Script
    encode: Callable[[str], list[int]]

    def says(self, *texts: str, **changes: Any) -> None:
        """What the choices answer from now on; one token for each character."""
        answers = [[token for character in text for token in self.encode(character)] for text in texts]
        self.use(Script(answers=answers, **changes))

    def use(self, script: Script) -> None:
        self.prefill.script = self.decode.script = self.script = script


@pytest.fixture(scope="module")
def shared_cluster(model_dir: Path, sockets: Path) -> Iterator[Cluster]:
    script = Script()
    endpoints = [f"ipc://{sockets}/p", f"ipc://{sockets}/d"]
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    with (
        FakeWorker(endpoints[0], "prefill", script) as prefill,
        FakeWorker(endpoints[1], "decode", script) as decode,
        running_router(model_dir, endpoints, max_body_bytes=100_000) as router,
    ):
        until(router.ready, "a ready router")
        yield Cluster(router, prefill, decode, script, lambda text: list(tokenizer.encode(text).ids))


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    """The shared one, as new; and at rest again at the end."""
    shared_cluster.says("Hello")
    shared_cluster.prefill.forget()
    shared_cluster.decode.forget()
    yield shared_cluster
    until(shared_cluster.router.at_rest, "a router at rest")


MESSAGES: Any = [{"role": "user", "content": "Hi there"}]


# ---------------------------------------------------------------- answers


def test_chat(cluster: Cluster) -> None:
    cluster.says("Hello", end_token=cluster.encode(IM_END)[0], cached_tokens=3)
    answer = cluster.router.client().chat.completions.create(model="tiny", messages=MESSAGES)
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    work = cluster.prefill.wait_for(Prefill)[0].work
    expected = "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
    assert work.prompt == cluster.encode(expected)
    assert work.sampling.max_tokens == 1024 - len(work.prompt)
    assert answer.usage.prompt_tokens == len(work.prompt)


def test_the_two_workers_are_told_the_same(cluster: Cluster) -> None:
    cluster.router.client().completions.create(model="tiny", prompt="abc", max_tokens=3, seed=7, n=2)
    prefill = cluster.prefill.wait_for(Prefill)[0]
    reserve = cluster.decode.wait_for(Reserve)[0]
    assert prefill.work == reserve.work
    assert prefill.transfer_id == reserve.transfer_id
    assert reserve.source.endpoint == "ipc:///fake/prefill"
    assert (prefill.work.choices, prefill.work.sampling.seed, prefill.work.salt) == (2, 7, b"")
    assert [first.choice for first in cluster.decode.wait_for(Join)[0].first_tokens] == [0, 1]


def test_streamed_chat_with_several_choices_and_usage(cluster: Cluster) -> None:
    cluster.says("Hello", "By")
    stream = cluster.router.client().chat.completions.create(
        model="tiny", messages=MESSAGES, n=3, stream=True, stream_options={"include_usage": True}
    )
    texts, finishes, roles = ["", "", ""], {}, []
    usages = []
    for chunk in stream:
        if chunk.usage is not None:
            usages.append(chunk.usage)
            assert chunk.choices == []
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles += [choice.index] if choice.delta.role else []
            if choice.finish_reason is not None:
                assert choice.index not in finishes, "a second finish_reason"
                finishes[choice.index] = choice.finish_reason
    assert texts == ["Hello", "By", "By"]
    assert finishes == {0: "length", 1: "length", 2: "length"}
    assert sorted(roles) == [0, 1, 2]
    assert [usage.completion_tokens for usage in usages] == [9]


def test_the_stream_ends_as_clients_expect(cluster: Cluster) -> None:
    with cluster.router.http() as http:
        body = {"prompt": "a", "stream": True, "max_tokens": 5}
        answer = http.post("/v1/completions", json=body, headers={"x-request-id": "my\tlabel<1>"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-request-id"] == "mylabel1"
    frames = answer.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    assert all(frame.startswith("data: {") for frame in frames[:-2])
    assert "".join(json.loads(frame[6:])["choices"][0]["text"] for frame in frames[:-2]) == "Hello"


def test_completions_of_many_prompts(cluster: Cluster) -> None:
    cluster.says("x", "y")
    client = cluster.router.client()
    answer = client.completions.create(model="tiny", prompt=["a", "bb"], n=2, max_tokens=4)
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (0, "x"),
        (1, "y"),
        (2, "x"),
        (3, "y"),
    ]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 4)
    answer = client.completions.create(model="tiny", prompt=[[1, 2, 3], [4]], echo=True, max_tokens=1)
    assert [work.work.prompt for work in cluster.prefill.wait_for(Prefill, 4)[2:]] == [[1, 2, 3], [4]]


def test_one_token_needs_no_decode_worker(cluster: Cluster) -> None:
    answer = cluster.router.client().completions.create(model="tiny", prompt="a", max_tokens=1)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("H", "length")
    cluster.decode.wait_for(Cancel)
    assert not cluster.decode.of(Join)
    assert not cluster.prefill.of(Cancel)


def test_logprobs(cluster: Cluster) -> None:
    cluster.says("Hey", end_token=cluster.encode(IM_END)[0])
    client = cluster.router.client()
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2)
    content = chat.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    assert "".join(entry.token for entry in content.content) == "Hey" + IM_END
    assert [len(entry.top_logprobs) for entry in content.content] == [2] * 4
    assert content.content[0].logprob == -cluster.encode("H")[0] / 100
    streamed = client.chat.completions.create(
        model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2, stream=True
    )
    entries = [
        entry
        for chunk in streamed
        for choice in chunk.choices
        if choice.logprobs is not None and choice.logprobs.content
        for entry in choice.logprobs.content
    ]
    assert [entry.model_dump() for entry in entries] == [entry.model_dump() for entry in content.content]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_as_evaluation_harnesses_ask(cluster: Cluster, stream: bool) -> None:
    prompt = cluster.encode("the cat")
    body = {"prompt": [prompt], "echo": True, "logprobs": 1, "max_tokens": 1, "stream": stream}
    with cluster.router.http() as http:
        answer = http.post("/v1/completions", json=body)
    if stream:
        first = json.loads(answer.text.split("\n\n")[0][6:])["choices"][0]
    else:
        first = answer.json()["choices"][0]
    assert first["text"] == "the catH"
    logprobs = first["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:-1] == [-token / 100 for token in prompt[1:]]
    assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == len(prompt) + 1
    assert "".join(logprobs["tokens"]) == "the catH"
    assert logprobs["text_offset"][-1] == len("the cat")
    assert cluster.prefill.of(Prefill)[0].work.sampling.prompt_logprobs == 1


def test_echo_alone_generates_nothing(cluster: Cluster) -> None:
    answer = cluster.router.client().completions.create(model="tiny", prompt="abc", echo=True, max_tokens=0)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("abc", "length")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_over_token_borders_ends_the_choice_and_the_work(
    cluster: Cluster, stream: bool
) -> None:
    cluster.says("one. STOP two", decode_limit=9)
    client = cluster.router.client(strict=not stream)
    if stream:
        chunks = list(
            client.completions.create(model="tiny", prompt="a", max_tokens=50, stop=["STOP"], stream=True)
        )
        text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
        finish = chunks[-1].choices[0].finish_reason
    else:
        answer = client.completions.create(model="tiny", prompt="a", max_tokens=50, stop="STOP")
        text, finish = answer.choices[0].text, answer.choices[0].finish_reason
    assert (text, finish) == ("one. ", "stop")
    assert cluster.decode.wait_for(Cancel)[0].choice is None


def test_one_choice_stops_while_the_other_goes_on(cluster: Cluster) -> None:
    cluster.says("ab!cdefgh", "abcdefghi")
    answer = cluster.router.client().completions.create(model="tiny", prompt="a", n=2, max_tokens=9, stop="!")
    assert [choice.text for choice in answer.choices] == ["ab", "abcdefghi"]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "length"]
    assert cluster.decode.wait_for(Cancel)[0].choice == 0


def test_a_stop_string_in_the_first_token_frees_both_sides(cluster: Cluster) -> None:
    answer = cluster.router.client().completions.create(model="tiny", prompt="a", stop="H", max_tokens=5)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")
    cluster.decode.wait_for(Cancel)
    cluster.prefill.wait_for(Cancel)


def test_characters_of_many_tokens_are_never_torn(cluster: Cluster) -> None:
    cluster.says("né 🙂!")
    stream = cluster.router.client(strict=False).completions.create(
        model="tiny", prompt="a", max_tokens=50, stream=True
    )
    pieces = [choice.text for chunk in stream for choice in chunk.choices]
    assert "".join(pieces) == "né 🙂!"
    assert "🙂" in "".join(pieces[-3:])


def test_models_and_tokens(cluster: Cluster) -> None:
    client = cluster.router.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with cluster.router.http() as http:
        tokens = http.post("/tokenize", json={"prompt": "the cat", "return_token_strs": True}).json()
        assert tokens["tokens"] == cluster.encode("the cat")
        assert tokens["count"] == len(tokens["tokens"])
        assert "".join(tokens["token_strs"]) == "the cat"
        assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "the cat"}
        chat = http.post("/tokenize", json={"messages": MESSAGES}).json()
        assert chat["tokens"][:1] == cluster.encode("<|im_start|>")


def test_views_of_the_cluster(cluster: Cluster) -> None:
    cluster.router.client().completions.create(model="tiny", prompt="abc", max_tokens=3)
    values = cluster.router.get("/cluster")
    assert values["ready"] is True
    assert [worker["status"]["role"] for worker in values["workers"]] == ["prefill", "decode"]
    assert values["workers"][0]["status"]["pages"] == {"total": 256, "free": 200, "cached": 36, "used": 20}
    assert set(values["last_request"]) == {"queue_s", "prefill_s", "transfer_s", "decode_s", "total_s"}
    memory = cluster.router.get("/memory")["workers"][0]["ledger"]
    assert memory["sums"]["outside"] == {"planned_bytes": 64 << 20, "measured_bytes": 64 << 20}
    with cluster.router.http() as http:
        metrics = http.get("/metrics").text
        assert 'baton_requests_total{outcome="completed"}' in metrics
        assert 'baton_worker_slots{role="decode",state="free",worker="decode"} 14.0' in metrics
        page = http.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert "http://" not in page.text.replace("http://www.w3.org/", "")
        assert "innerHTML" not in page.text
        assert http.get("/version").json()["version"]


# ---------------------------------------------------------------- errors


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
    assert not cluster.prefill.received


FAILURES = [("invalid", 400), ("overloaded", 429), ("transfer", 503), ("draining", 503), ("internal", 500)]


@pytest.mark.parametrize(("code", "status"), FAILURES)
@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_token_has_its_status(
    cluster: Cluster, code: Any, status: int, side: str, stream: bool
) -> None:
    failed = Failed(1, code, "no room", True)
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
    cluster.says("Hello", decode_limit=2, fail_decode=Failed(1, "transfer", "lost", True))
    with cluster.router.http() as http:
        answer = http.post("/v1/completions", json={"prompt": "a"})
    assert answer.status_code == 503
    assert answer.headers["x-should-retry"] == "false"


def open_request(router: Router, body: dict[str, Any]) -> socket.socket:
    """A request on a plain connection, so that the test can drop it when it likes."""
    host, port = router.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=DEADLINE_S)
    raw = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(raw)}\r\n\r\n"
    connection.sendall(head.encode() + raw)
    return connection


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


# ---------------------------------------------------------------- clusters of their own


@contextlib.contextmanager
def small_cluster(model_dir: Path, tmp_path: Path, **settings: Any) -> Iterator[Cluster]:
    tmp_path.chmod(0o700)
    script = Script()
    endpoints = [f"ipc://{tmp_path}/p", f"ipc://{tmp_path}/d"]
    with (
        FakeWorker(endpoints[0], "prefill", script) as prefill,
        FakeWorker(endpoints[1], "decode", script) as decode,
        running_router(model_dir, endpoints, **settings) as router,
    ):
        until(router.ready, "a ready router")
        yield Cluster(router, prefill, decode, script, lambda text: [])


@pytest.mark.parametrize("how", ["connection closed", "silent"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_lost_worker_is_an_error_and_its_return_is_noticed(
    model_dir: Path, tmp_path: Path, how: str, stream: bool
) -> None:
    with small_cluster(model_dir, tmp_path, worker_timeout_s=0.5 if how == "silent" else 60.0) as cluster:
        cluster.use(Script(decode_limit=1))
        connection = open_request(cluster.router, {"prompt": "a", "stream": stream})
        cluster.decode.wait_for(Join)
        until(lambda: cluster.router.get("/cluster")["router"]["phases"].get("decoding"), "decoding")
        if how == "silent":
            cluster.decode.mute = True
        else:
            cluster.decode.stop()
        received = b""
        while b"worker_lost" not in received:
            part = connection.recv(1 << 16)
            assert part, received
            received += part
        assert (b"503" in received) == (not stream)
        assert b"[DONE]" not in received
        connection.close()
        until(lambda: not cluster.router.ready(), "a router that is not ready")
        with pytest.raises(openai.InternalServerError) as caught:
            cluster.router.client().completions.create(model="tiny", prompt="a")
        assert caught.value.status_code == 503
        until(cluster.router.at_rest, "a router at rest")
        if how == "silent":
            cluster.decode.stop()
        cluster.use(Script())
        with FakeWorker(cluster.decode.endpoint, "decode", cluster.script, epoch=2):
            until(cluster.router.ready, "a router that has found the new worker")
            answer = cluster.router.client().completions.create(model="tiny", prompt="a", max_tokens=4)
            assert answer.choices[0].finish_reason == "length"


def test_a_new_epoch_on_the_same_connection_ends_the_old_life(model_dir: Path, tmp_path: Path) -> None:
    with small_cluster(model_dir, tmp_path) as cluster:
        cluster.use(Script(hold_prefill=True))
        connection = open_request(cluster.router, {"prompt": "a"})
        cluster.prefill.wait_for(Prefill)
        cluster.prefill.epoch = 2
        received = b""
        while b"worker_lost" not in received:
            part = connection.recv(1 << 16)
            assert part, received
            received += part
        connection.close()
        cluster.decode.wait_for(Cancel)
        until(cluster.router.ready, "a greeted new life")


def test_a_refused_router_says_why(model_dir: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    endpoint = f"ipc://{tmp_path}/u"
    with (
        FakeWorker(endpoint, "unified", Script(refuse="another version")),
        running_router(model_dir, [endpoint]) as router,
    ):
        worker = until(
            lambda: [one for one in router.get("/cluster")["workers"] if one["connection"] == "refused"],
            "a refusal",
        )[0]
        assert worker["message"] == "another version"
        assert not router.ready()


def test_a_unified_worker_and_draining_workers(model_dir: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    endpoint = f"ipc://{tmp_path}/u"
    script = Script(answers=[[39, 40, 41]])
    with FakeWorker(endpoint, "unified", script) as worker, running_router(model_dir, [endpoint]) as router:
        until(router.ready, "a ready router")
        stream = router.client(strict=False).completions.create(model="tiny", prompt="a", n=2, stream=True)
        assert [choice.finish_reason for chunk in stream for choice in chunk.choices].count("length") == 2
        assert len(worker.wait_for(Generate)) == 1
        worker.script.state = "draining"
        until(lambda: not router.ready(), "a router without a worker that takes work")


def test_keys_are_asked_for_everywhere_but_health(model_dir: Path, tmp_path: Path) -> None:
    with small_cluster(model_dir, tmp_path, api_keys=["sk-one", "sk-two"]) as cluster:
        bare = httpx.Client(base_url=cluster.router.url, timeout=DEADLINE_S)
        with bare:
            assert bare.get("/health").status_code == 200
            for path in (
                "/",
                "/ready",
                "/metrics",
                "/cluster",
                "/memory",
                "/v1/models",
                "/version",
                "/nothing",
            ):
                for value in (None, "Bearer", "Bearer sk-onf", "Basic sk-one", "Bearer sk-one2"):
                    headers = {} if value is None else {"authorization": value}
                    answer = bare.get(path, headers=headers)
                    assert answer.status_code == 401, (path, value)
                    assert answer.json()["error"]["code"] == "invalid_api_key"
            answer = bare.get("/v1/models", headers={"authorization": "Bearer sk-two"})
            assert answer.status_code == 200
        for key in ("sk-one", "sk-two", "sk-one"):
            cluster.router.api_key = key
            cluster.router.client().completions.create(model="tiny", prompt="a", max_tokens=1)
        salts = [prefill.work.salt for prefill in cluster.prefill.wait_for(Prefill, 3)]
        assert salts[0] == salts[2] != salts[1]
        assert all(len(salt) == 32 for salt in salts)


def test_a_deadline_frees_the_workers(model_dir: Path, tmp_path: Path) -> None:
    with small_cluster(model_dir, tmp_path, request_timeout_s=0.3) as cluster:
        cluster.use(Script(hold_decode=True))
        with cluster.router.http() as http:
            answer = http.post("/v1/completions", json={"prompt": "a"})
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        cluster.prefill.wait_for(Cancel)
        cluster.decode.wait_for(Cancel)


def test_too_much_at_once_is_refused(model_dir: Path, tmp_path: Path) -> None:
    with small_cluster(model_dir, tmp_path, max_running=2, retry_after_s=3) as cluster:
        cluster.use(Script(hold_prefill=True))
        connection = open_request(cluster.router, {"prompt": ["a", "b"]})
        cluster.prefill.wait_for(Prefill, 2)
        with cluster.router.http() as http:
            answer = http.post("/v1/completions", json={"prompt": "a"})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
        connection.close()
        until(cluster.router.at_rest, "a router at rest")


def test_a_drain_lets_what_runs_finish_and_refuses_the_rest(model_dir: Path, tmp_path: Path) -> None:
    with small_cluster(model_dir, tmp_path, drain_timeout_s=60.0) as cluster:
        cluster.use(Script(answers=[[39, 40, 41]], hold_prefill=True))
        bodies: list[str] = []

        def ask() -> None:
            with cluster.router.http() as http:
                bodies.append(http.post("/v1/completions", json={"prompt": "a"}).text)

        asking = threading.Thread(target=ask)
        asking.start()
        work = cluster.prefill.wait_for(Prefill)[0].work
        os.kill(cluster.router.process.pid, signal.SIGTERM)
        with cluster.router.http() as http:
            until(
                lambda: http.get("/ready").json().get("error", {}).get("code") == "draining",
                "a draining router",
            )
            assert http.get("/health").status_code == 200
            refused = http.post("/v1/completions", json={"prompt": "b"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert cluster.router.process.poll() is None
        cluster.prefill.act(lambda: cluster.prefill.prefill(work) and None)
        asking.join(DEADLINE_S)
        assert json.loads(bodies[0])["choices"][0]["finish_reason"] == "length"
        assert cluster.router.process.wait(DEADLINE_S) == 0


def test_a_drain_out_of_time_ends_what_is_left_with_an_error(model_dir: Path, tmp_path: Path) -> None:
    with small_cluster(model_dir, tmp_path, drain_timeout_s=0.2) as cluster:
        cluster.use(Script(decode_limit=1))
        connection = open_request(cluster.router, {"prompt": "a", "stream": True})
        cluster.decode.wait_for(Join)
        os.kill(cluster.router.process.pid, signal.SIGTERM)
        received = b""
        while part := connection.recv(1 << 16):
            received += part
        assert b'"code":"draining"' in received
        assert b"[DONE]" not in received
        connection.close()
        cluster.decode.wait_for(Cancel)
        assert cluster.router.process.wait(DEADLINE_S) == 0


def test_a_bad_start_is_one_message(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    given = {
        "workers": [f"ipc://{tmp_path}/x"],
        "model_dir": str(tmp_path),
        "served_model_name": "m",
        "port": 0,
    }
    done = subprocess.run([sys.executable, "-c", START, json.dumps(given)], capture_output=True, text=True)
    assert done.returncode != 0
    assert f"RouterConfigError: {tmp_path}/tokenizer.json does not exist" in done.stderr
