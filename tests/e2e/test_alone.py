"""Each process started by its own command, as on a cluster; the two sides have pages of different sizes."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.protocol.messages import VERSION, Refusal, RouterHello
from tests.checkpoints import make_checkpoint
from tests.e2e.cluster import wait_until
from tests.e2e.test_tokens import prompt_of, reference
from tests.patience import patient
from tests.ports import free_port
from tests.router_peer import RouterPeer

PROMPTS = [prompt_of(length, 4) for length in (1, 7, 16, 33, 150)]
LONG = {"prompt": [5] * 40, "temperature": 0, "ignore_eos": True, "stream": True}


@contextmanager
def running(*arguments: str, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """`baton ARGUMENTS`, ended by SIGTERM; it must then end well, unless the test has ended it already."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        yield process
        if process.returncode is None:
            process.terminate()
            assert process.wait(patient(30)) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@dataclass
class System:
    """A prefill and a decode side, and routers that share them."""

    model_dir: Path
    directory: Path
    stack: ExitStack
    decode: "subprocess.Popen[bytes] | None" = None

    @property
    def sockets(self) -> Path:
        return self.directory / "s"

    def start(self, *arguments: str, log: str) -> "subprocess.Popen[bytes]":
        return self.stack.enter_context(running(*arguments, log=self.directory / log))

    def start_transfer(self, role: str) -> None:
        beside = ["transfer", "--name", f"{role}-t", "--listen", f"ipc://{self.sockets}/{role}-t"]
        beside += ["--peer-listen", f"ipc://{self.sockets}/{role}-p", "--checksum", "--device", "cpu"]
        beside += ["--staging-socket", f"{self.sockets}/{role}-s", "--staging-slot-bytes", "16KiB"]
        self.start(*beside, log=f"{role}-t.log")

    def start_worker(self, role: str, page_size: str) -> "subprocess.Popen[bytes]":
        worker = ["worker", str(self.model_dir), "--role", role, "--listen", f"ipc://{self.sockets}/{role}"]
        worker += ["--transfer", f"ipc://{self.sockets}/{role}-t", "--page-size", page_size]
        worker += ["--device", "cpu", "--dtype", "float32", "--mem-fraction", "0.1"]
        return self.start(*worker, "--staging-slot-bytes", "16KiB", log=f"{role}.log")

    def start_router(self, name: str) -> "tuple[subprocess.Popen[bytes], httpx.Client]":
        port = free_port()
        router = ["router", str(self.model_dir), "--port", str(port), "--served-model-name", "tiny"]
        for role in ("prefill", "decode"):
            router += ["--worker", f"ipc://{self.sockets}/{role}"]
        process = self.start(*router, log=f"{name}.log")
        http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=patient(60))
        self.stack.enter_context(http)
        return process, http


def is_ready(http: httpx.Client) -> bool:
    try:
        return http.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def at_rest(http: httpx.Client) -> bool:
    """Nothing runs, no page is used, no slot is taken, on any worker."""
    names = ("queued", "running", "reserved", "holding", "open_sends", "open_receives")
    for worker in http.get("/cluster").json()["workers"]:
        status: dict[str, Any] | None = worker["status"]
        if status is None or any(status[name] for name in names) or status["pages"]["used"]:
            return False
        if status["slots"]["free"] != status["slots"]["total"]:
            return False
    return True


class Stream:
    """A long completion that a thread reads to its end."""

    def __init__(self, http: httpx.Client, max_tokens: int = 300) -> None:
        self._body = {**LONG, "max_tokens": max_tokens}
        self.events: list[str] = []
        self.begun = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(http,), daemon=True)
        self._thread.start()
        assert self.begun.wait(patient(60)), "no first token"

    def _read(self, http: httpx.Client) -> None:
        try:
            with http.stream("POST", "/v1/completions", json=self._body) as answer:
                for line in answer.iter_lines():
                    if line:
                        self.events.append(line.removeprefix("data: "))
                        self.begun.set()
        except httpx.TransportError:
            self.events.append("cut")

    def end(self) -> list[str]:
        self._thread.join(patient(60))
        assert not self._thread.is_alive()
        return self.events


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    directory = tmp_path_factory.mktemp("alone")
    model_dir = make_checkpoint("llama", directory / "model", seed=6, eos=False)
    with ExitStack() as stack:
        system = System(model_dir, directory, stack)
        system.sockets.mkdir(mode=0o700)
        for role in ("prefill", "decode"):
            system.start_transfer(role)
        system.start_worker("prefill", "16")
        system.decode = system.start_worker("decode", "4")
        yield system
    assert list(system.sockets.iterdir()) == [], "sockets are removed by who made them"


@pytest.fixture(scope="module")
def http(system: System) -> httpx.Client:
    """Of a router that lives as long as the workers."""
    _, http = system.start_router("router")
    wait_until("the router is ready", lambda: is_ready(http), 60)
    return http


def test_pages_of_different_sizes_and_processes_of_their_own(system: System, http: httpx.Client) -> None:
    for prompt, tokens in zip(PROMPTS, reference(system.model_dir, PROMPTS, 8), strict=True):
        body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["token_ids"] == tokens


def test_a_router_of_another_version_is_refused_with_both_named(system: System, http: httpx.Client) -> None:
    endpoint = f"ipc://{system.sockets}/decode"
    peer = RouterPeer(endpoint)
    try:
        peer.send([RouterHello("0.0.9", 1)])
        assert peer.wait() == [Refusal(f"this worker is version {VERSION}, the router is 0.0.9")]
    finally:
        peer.close()


def test_a_router_that_dies_takes_only_its_own_requests_along(system: System, http: httpx.Client) -> None:
    other, other_http = system.start_router("other")
    wait_until("the second router is ready", lambda: is_ready(other_http), 60)
    lost, kept = Stream(other_http, max_tokens=900), Stream(http)
    other.kill()
    other.wait()
    assert lost.end()[-1] == "cut"
    events = kept.end()
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
    wait_until("all is at rest", lambda: at_rest(http))
    # It would have had hundreds of tokens to go.
    assert "is gone with 1 requests" in (system.directory / "decode.log").read_text()


def test_a_decode_worker_is_replaced_under_load(system: System, http: httpx.Client) -> None:
    old = system.decode
    assert old is not None
    running_now = Stream(http)
    old.terminate()
    wait_until("the router sees that it drains", lambda: not is_ready(http))
    refused = http.post("/v1/completions", json={"prompt": [5], "max_tokens": 2})
    assert refused.status_code == 503 and "retry-after" in refused.headers
    events = running_now.end()
    assert events[-1] == "[DONE]", events[-3:]
    assert old.wait(patient(30)) == 0
    system.decode = system.start_worker("decode", "4")
    wait_until("the router has found its successor", lambda: is_ready(http), 60)
    answer = http.post("/v1/completions", json={"prompt": [5], "max_tokens": 2})
    assert answer.status_code == 200
    wait_until("all is at rest", lambda: at_rest(http))
