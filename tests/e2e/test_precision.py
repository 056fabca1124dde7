"""A KV cache and linear layers of fp8 through all processes; and two sides that do not agree on it."""

from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

import deploy.demo
from tests.e2e.cluster import Cluster, wait_until
from tests.e2e.test_alone import running
from tests.e2e.test_tokens import ask, prompt_of, tokens_of
from tests.engine.harness import Sequence, run_together, start_engine
from tests.patience import patient
from tests.ports import free_port

DEMO = Path(deploy.demo.__file__).parent / "model"
PROMPTS = [prompt_of(length, 9) for length in (1, 15, 16, 33, 200)]
NEW_TOKENS = 24
NAME = ("--served-model-name", "tiny")
DEMO_TOKEN_BYTES = 5 * 2 * 2 * 32
"""Layers, keys and values, KV heads, head_dim; one byte a number."""


@pytest.mark.parametrize("quantization", ["none", "fp8"], ids=["kv", "kv-and-linear"])
def test_prefill_and_decode_give_the_tokens_of_one_engine(quantization: str, tmp_path: Path) -> None:
    flags = ("--kv-dtype", "fp8", "--quantization", quantization, "--staging-slot-bytes", "32KiB")
    with Cluster(DEMO, tmp_path, *NAME, *flags) as cluster:
        apart = [tokens_of(ask(cluster, prompt, NEW_TOKENS)) for prompt in PROMPTS]
        cluster.assert_at_rest()
        counters = cluster.worker("prefill")["status"]["counters"]
    engine = start_engine(DEMO, kv_dtype="fp8", quantization=quantization, max_chunk_tokens=512)
    pages = list(range(128))
    assert apart == [run_together(engine, [Sequence(prompt, pages)], NEW_TOKENS)[0] for prompt in PROMPTS]
    assert all(len(tokens) == NEW_TOKENS for tokens in apart)
    assert counters["transfer_bytes"] == sum(map(len, PROMPTS)) * DEMO_TOKEN_BYTES


def test_two_sides_that_keep_kv_differently_are_told_apart(tmp_path: Path) -> None:
    sockets = tmp_path / "s"
    sockets.mkdir(mode=0o700)
    port = free_port()
    router = ["router", str(DEMO), "--port", str(port), *NAME]
    with ExitStack() as stack:
        for role, kv_dtype in (("prefill", "fp8"), ("decode", "auto")):
            control, transfer = f"ipc://{sockets}/{role}", f"ipc://{sockets}/{role}-t"
            beside = ["transfer", "--name", f"{role}-t", "--listen", transfer, "--device", "cpu"]
            beside += ["--peer-listen", f"ipc://{sockets}/{role}-p"]
            beside += ["--staging-socket", f"{sockets}/{role}-s"]
            stack.enter_context(running(*beside, log=tmp_path / f"{role}-t.log"))
            worker = ["worker", str(DEMO), "--role", role, "--listen", control, "--transfer", transfer]
            worker += ["--device", "cpu", "--dtype", "float32", "--kv-dtype", kv_dtype]
            stack.enter_context(running(*worker, log=tmp_path / f"{role}.log"))
            router += ["--worker", control]
        stack.enter_context(running(*router, log=tmp_path / "router.log"))
        client = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=patient(60)))

        def ready() -> bool:
            try:
                return client.get("/ready").status_code == 200
            except httpx.TransportError:
                return False

        wait_until("the router is ready", ready, 60)
        body = {"prompt": PROMPTS[1], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 503
        message = answer.json()["error"]["message"]
        assert message.endswith("dtype differs: 'float32' here, 'float8_e4m3fn' there")
