"""The ledger of a running system beside what the driver says of its processes, and a dead worker's memory."""

import contextlib
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy.observe.ledgers import fetch_ledgers
from services.memory.devices import shared_devices
from services.memory.measure import NotMeasurable, gpu_count, gpu_process_bytes
from tests.checkpoints import make_checkpoint
from tests.e2e.cluster import Cluster, wait_until

pytestmark = pytest.mark.gpu
ROLES = ("prefill", "decode")
FREE_AGAIN_S = 10.0
"""For a loaded machine; the driver takes about one of them."""


def held_bytes(pid: int) -> int:
    """Of all GPUs together; 0 if the driver does not know the process."""
    found_bytes = 0
    for index in range(gpu_count()):
        with contextlib.suppress(NotMeasurable):
            found_bytes += gpu_process_bytes(index, pid)
    return found_bytes


def complete(cluster: Cluster, prompt_tokens: int, max_tokens: int) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": [7] * prompt_tokens, "max_tokens": max_tokens, "ignore_eos": True}
    answer = cluster.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_the_driver_and_the_ledger_agree_and_a_dead_workers_memory_is_free(tmp_path: Path) -> None:
    model_dir = make_checkpoint("qwen3", tmp_path / "model")
    arguments = ("--served-model-name", "tiny", "--mem-fraction", "0.05")
    with Cluster(model_dir, tmp_path, *arguments, device="cuda") as cluster:
        for prompt_tokens in (1, 100, 300):
            complete(cluster, prompt_tokens, 20)

        def differences() -> dict[str, float]:
            """Of the device, for each worker with its transfer process; statistics come once a second."""
            found = {}
            for entry in cluster.http.get("/memory").json()["workers"]:
                ledger, status = entry["ledger"], cluster.worker(entry["name"].split("-")[0])["status"]
                measured = sum(line["measured_bytes"] or 0 for line in ledger["entries"])
                driver = held_bytes(status["pid"]) + held_bytes(status["transfer_pid"])
                assert driver > 0
                found[entry["name"]] = abs(measured - driver) / ledger["device_bytes"]
            return found

        wait_until("ledger and driver agree", lambda: max(differences().values()) < 0.01)
        assert len(differences()) == len(ROLES)
        devices = shared_devices([(one.name, one.ledger) for one in fetch_ledgers(cluster.url, None)])
        if gpu_count() == 1:  # else each has its own
            (shared,) = devices
            assert len(shared.workers) == len(ROLES)
            assert shared.used_bytes is not None
            assert shared.measured_bytes <= shared.used_bytes + 0.01 * shared.device_bytes

        decode = cluster.worker("decode")["status"]
        pool_bytes = held_bytes(decode["pid"])
        assert pool_bytes > 0.04 * cluster.http.get("/memory").json()["workers"][0]["ledger"]["device_bytes"]
        survivors = {pid: held_bytes(pid) for pid in (cluster.worker("prefill")["status"]["pid"],)}
        asked = threading.Thread(target=complete, args=(cluster, 300, 400))
        asked.start()
        psutil.Process(decode["pid"]).kill()
        wait_until("its memory is free", lambda: held_bytes(decode["pid"]) == 0, FREE_AGAIN_S)
        for pid, before_bytes in survivors.items():
            assert held_bytes(pid) <= before_bytes + (64 << 20)
        asked.join()
        cluster.assert_at_rest()
