"""The router's real process beside fake workers (tests/fake_worker.py), and clients for it."""

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.fake_worker import FakeWorker, Script
from tests.patience import patient

DEADLINE_S = patient(30.0)
START = """
import sys, json, pathlib
from router.config import RouterConfig
from router.process import run
given = json.loads(sys.argv[1])
given["workers"], given["model_dir"] = tuple(given["workers"]), pathlib.Path(given["model_dir"])
given["api_keys"] = tuple(given.get("api_keys", ()))
if "workers_file" in given:
    given["workers_file"] = pathlib.Path(given["workers_file"])
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


def open_request(router: Router, body: dict[str, Any]) -> socket.socket:
    """A request on a plain connection, so that the test can drop it when it likes."""
    host, port = router.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=DEADLINE_S)
    raw = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(raw)}\r\n\r\n"
    connection.sendall(head.encode() + raw)
    return connection


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


MESSAGES: Any = [{"role": "user", "content": "Hi there"}]
