"""Each process started by its own command, as on a cluster; the two sides have pages of different sizes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from tests.checkpoints import make_checkpoint
from tests.e2e.cluster import wait_until
from tests.e2e.test_tokens import prompt_of, reference
from tests.ports import free_port

PROMPTS = [prompt_of(length, 4) for length in (1, 7, 16, 33, 150)]


@contextmanager
def running(*arguments: str, log: Path) -> Iterator[None]:
    """`baton ARGUMENTS`, ended by SIGTERM; it must then end well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        yield
        process.terminate()
        assert process.wait(30) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_pages_of_different_sizes_and_processes_of_their_own(tmp_path: Path) -> None:
    model_dir = make_checkpoint("llama", tmp_path / "model", seed=6, eos=False)
    wanted = reference(model_dir, PROMPTS, 8)
    sockets = tmp_path / "s"
    sockets.mkdir(mode=0o700)
    port = free_port()
    router = ["router", str(model_dir), "--port", str(port), "--served-model-name", "tiny"]
    with ExitStack() as stack:
        for role, page_size in (("prefill", "16"), ("decode", "4")):
            control, transfer = f"ipc://{sockets}/{role}", f"ipc://{sockets}/{role}-t"
            beside = ["transfer", "--name", f"{role}-t", "--listen", transfer]
            beside += ["--peer-listen", f"ipc://{sockets}/{role}-p", "--checksum"]
            beside += ["--staging-socket", f"{sockets}/{role}-s", "--staging-slot-bytes", "16KiB"]
            stack.enter_context(running(*beside, "--device", "cpu", log=tmp_path / f"{role}-t.log"))
            worker = ["worker", str(model_dir), "--role", role, "--listen", control, "--transfer", transfer]
            worker += ["--device", "cpu", "--dtype", "float32", "--page-size", page_size]
            worker += ["--staging-slot-bytes", "16KiB", "--mem-fraction", "0.2"]
            stack.enter_context(running(*worker, log=tmp_path / f"{role}.log"))
            router += ["--worker", control]
        stack.enter_context(running(*router, log=tmp_path / "router.log"))
        client = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60))

        def ready() -> bool:
            try:
                return client.get("/ready").status_code == 200
            except httpx.TransportError:
                return False

        wait_until("the router is ready", ready, 60)
        for prompt, tokens in zip(PROMPTS, wanted, strict=True):
            body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["token_ids"] == tokens
    assert list(sockets.iterdir()) == [], "sockets are removed by who made them"
