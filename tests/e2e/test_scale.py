"""`baton scale` on a running `baton serve`, under load: 1P1D, 2P2D and back."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from tests.checkpoints import make_checkpoint
from tests.e2e.askers import Askers
from tests.e2e.cluster import Cluster, wait_until
from tests.patience import patient

SCALE_DEADLINE_S = patient(120.0)
PROMPTS = [[5 + number, *range(9, 9 + 40 * number)] for number in range(6)]


def scale(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy", "scale", *arguments]
    environment = {**cluster.environment, "BATON_PORT": str(cluster.port)}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=SCALE_DEADLINE_S, check=False
    )


def ask(http: httpx.Client, prompt: list[int]) -> Any:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0, "return_token_ids": True}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


def works(cluster: Cluster) -> dict[str, float]:
    """Tokens that each worker has computed or drawn, by its name."""
    statuses = [worker["status"] for worker in cluster.cluster()["workers"] if worker["status"]]
    return {
        one["name"]: one["counters"].get("prompt_tokens", 0) + one["counters"].get("output_tokens", 0)
        for one in statuses
    }


def test_workers_join_and_leave_under_load(tmp_path: Path) -> None:
    model_dir = make_checkpoint("llama", tmp_path / "model", seed=2, eos=False)
    flags = ("--served-model-name", "tiny", "--drain-timeout", "20")
    with Cluster(model_dir, tmp_path, *flags) as cluster:
        before = {process.pid for process in cluster.processes()}
        expected = [ask(cluster.http, prompt) for prompt in PROMPTS]

        def compare(number: int) -> str | None:
            at = number % len(PROMPTS)
            return None if ask(cluster.http, PROMPTS[at]) == expected[at] else "other tokens"

        with Askers(compare, 4) as load:
            more = scale(cluster, "--prefill", "2", "--decode", "2")
            assert more.returncode == 0, more.stderr
            assert more.stdout.splitlines()[-1] == "there are 2 prefill, 2 decode workers"
            new = ("prefill-1", "decode-1")
            wait_until("new workers work", lambda: all(map(works(cluster).get, new)))
            assert len(cluster.processes()) == len(before) + 4
            seen = load.answered
            fewer = scale(cluster, "--prefill", "1", "--decode", "1")
            assert fewer.returncode == 0, fewer.stderr
            assert "decode-1 has left" in fewer.stdout.splitlines()
            assert set(works(cluster)) == {"prefill-0", "decode-0"}
            wait_until("answers by those that stay", lambda: load.answered > seen + 8)
        assert load.wrong == []
        assert {process.pid for process in cluster.processes()} == before, "those that stay were not touched"
        cluster.assert_at_rest()
        assert cluster.cluster()["router"]["outcomes"].keys() == {"completed"}
        retries = re.findall(r"^baton_migrations_total.* (\S+)$", cluster.http.get("/metrics").text, re.M)
        assert not any(map(float, retries)), "nothing ran on a worker when it was told to go"
        refused = scale(cluster, "--prefill", "0")
        assert refused.returncode == 2
        (line,) = refused.stderr.splitlines()
        assert line == "baton: error: --prefill: must be at least 1 when there are decode workers"
