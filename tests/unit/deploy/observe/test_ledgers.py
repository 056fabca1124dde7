"""`baton memory` against an HTTP server that answers as the router does."""

import http.server
import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from deploy.cli import run
from deploy.launcher.readiness import Welcome, is_ready
from tests.unit.deploy.fake_child import Answers


@contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Locked(Answers):
    def do_GET(self) -> None:
        if self.headers.get("Authorization") == "Bearer secret":
            super().do_GET()
        else:
            self.send_error(401)


class Other(Answers):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"workers": [{"name": 1}]}')


def test_prints_planned_measured_and_difference(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Answers) as port:
        assert run(["memory", "--url", f"http://127.0.0.1:{port}/"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("fake-0\ncpu: 1000 B, mem_fraction 0.5 (budget 500 B)\n")
    weights = next(line for line in text.splitlines() if line.startswith("worker"))
    assert weights.split() == ["worker", "weights", "400", "B", "410", "B", "10", "B"]
    assert "| mem_fraction" in text


def test_a_key_is_asked_for_and_sent(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Locked) as port:
        url = f"http://127.0.0.1:{port}"
        assert run(["memory", "--url", url]) == 2
        assert "answered 401; give --api-key" in capsys.readouterr().err
        assert run(["memory", "--url", url, "--api-key", "secret"]) == 0
        assert is_ready(Welcome("127.0.0.1", port, "m", "secret"))
        assert not is_ready(Welcome("127.0.0.1", port, "m"))


def test_somebody_else_answers(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Other) as port:
        assert run(["memory", "--url", f"http://127.0.0.1:{port}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "did not answer with ledgers" in line


def test_the_request_to_try() -> None:
    everywhere = Welcome("0.0.0.0", 8000, "tales", "secret")
    assert everywhere.url == "http://127.0.0.1:8000"
    assert "secret" not in everywhere.text()
    assert "BATON_API_KEY" not in Welcome("::1", 80, "m").text()
    assert Welcome("::1", 80, "m").url == "http://[::1]:80"


def test_the_request_to_try_is_what_a_shell_makes_of_it() -> None:
    """Whatever the model's name, and with the key from the variable that the note names."""
    name = 'it\'s "a" $HOME model'
    lines = Welcome("::1", 80, name, "secret").text().splitlines()
    command = next(line for line in lines if line.startswith("try: ")).removeprefix("try: ")
    assert "# BATON_API_KEY: your key" in lines
    shown = f"curl() {{ printf '%s\\0' \"$@\"; }}; {command}"
    done = subprocess.run(
        ["sh", "-c", shown], env={"BATON_API_KEY": "secret"}, capture_output=True, text=True, check=True
    )
    url, *options, body = done.stdout.split("\0")[:-1]
    assert url == "http://[::1]:80/v1/chat/completions"
    assert "Authorization: Bearer secret" in options
    assert json.loads(body)["model"] == name
