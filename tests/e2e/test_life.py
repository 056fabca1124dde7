"""Start and end of `baton serve`: restarts, drains, and what is left after the worst end."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.checkpoints import make_checkpoint
from tests.e2e.cluster import STOP_DEADLINE_S, Cluster, wait_until
from tests.patience import patient


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("life") / "model", seed=2, eos=False)


def complete(cluster: Cluster, max_tokens: int = 4) -> httpx.Response:
    body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": max_tokens, "temperature": 0}
    return cluster.http.post("/v1/completions", json=body)


def pid_of(cluster: Cluster, role: str, name: str) -> int:
    pid: int = cluster.worker(role)["status"][name]
    return pid


@pytest.fixture(scope="module")
def shared(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """For tests that leave it serving; the last of them stops it."""
    flags = ("--served-model-name", "tiny", "--max-chunk-tokens", "64", "--drain-timeout", "20")
    with Cluster(model_dir, tmp_path_factory.mktemp("shared"), *flags) as cluster:
        yield cluster


def test_a_client_that_leaves_frees_everything_in_every_phase(shared: Cluster) -> None:
    for prompt_tokens, events in ((900, 0), (900, 1), (5, 0), (5, 1), (5, 20)):
        body = {
            "model": "tiny",
            "prompt": [7] * prompt_tokens,
            "max_tokens": 100,
            "ignore_eos": True,
            "stream": True,
            "n": 2,
        }
        if events == 0:
            gone = threading.Thread(target=_hang_up_early, args=(shared.url, body))
            gone.start()
            gone.join()
        else:
            with shared.http.stream("POST", "/v1/completions", json=body) as answer:
                stream = answer.iter_lines()
                for _ in range(events):
                    next(stream)
        shared.assert_at_rest()


def _hang_up_early(url: str, body: dict[str, object]) -> None:
    """Send a request and close the connection without reading anything."""
    import socket

    host, port = url.removeprefix("http://").split(":")
    payload = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)


@pytest.mark.parametrize(
    ("role", "which"),
    [("decode", "pid"), ("prefill", "pid"), ("decode", "transfer_pid"), ("prefill", "transfer_pid")],
)
def test_a_killed_child_comes_back_and_serves(role: str, which: str, shared: Cluster) -> None:
    before = complete(shared).json()["choices"][0]["text"]
    old_pid = pid_of(shared, role, which)
    psutil.Process(old_pid).kill()

    def reborn() -> bool:
        try:
            return pid_of(shared, role, which) not in (old_pid, None)
        except (AssertionError, TypeError):
            return False

    wait_until("the child is back", reborn, 60)
    wait_until("ready again", lambda: shared.http.get("/ready").status_code == 200, 60)
    texts: list[str] = []

    def serves() -> bool:
        """A request that meets the gap may fail, but only as one that can be tried again."""
        answer = complete(shared)
        assert answer.status_code in (200, 503), answer.text
        if answer.status_code == 200:
            texts.append(answer.json()["choices"][0]["text"])
        return bool(texts)

    assert shared.worker(role)["status"]["mover"] == "nixl"
    wait_until("a request is answered again", serves, 20)
    assert texts == [before]
    shared.assert_at_rest()


def test_sigterm_lets_a_running_stream_finish(shared: Cluster) -> None:
    """The last test of the shared cluster, which ends."""
    children = shared.processes()
    body = {"model": "tiny", "prompt": [5] * 9, "max_tokens": 300, "ignore_eos": True, "stream": True}
    lines: list[str] = []
    with shared.http.stream("POST", "/v1/completions", json=body) as answer:
        stream = answer.iter_lines()
        lines.append(next(stream))
        shared.launcher.send_signal(signal.SIGTERM)
        lines += list(stream)
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
    assert shared.launcher.wait(STOP_DEADLINE_S) == 0
    shared.assert_nothing_left(children)


def test_sigkill_of_the_launcher_leaves_nothing(model_dir: Path, tmp_path: Path) -> None:
    cluster = Cluster(model_dir, tmp_path, "--served-model-name", "tiny")
    try:
        cluster.wait_ready()
        assert complete(cluster).status_code == 200
        children = cluster.processes()
        assert len(children) >= 5
        cluster.launcher.kill()
        cluster.launcher.wait(patient(20))
        cluster.assert_nothing_left(children)
    finally:
        cluster.kill()


def test_a_broken_checkpoint_is_one_clear_message(model_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model_dir.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "model.safetensors").write_bytes(b"\xff" * 64)
    ended = subprocess.run(
        [sys.executable, "-m", "deploy", "serve", str(broken), "--device", "cpu", "--port", "0"],
        capture_output=True,
        text=True,
        timeout=patient(60),
    )
    assert ended.returncode == 2
    assert "model.safetensors" in ended.stderr and "Traceback" not in ended.stderr
