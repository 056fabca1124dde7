"""A thousand mixed requests through 1P1D over each mover, and what a unified worker says to the same prompts.

With one GPU both workers are on it; `baton serve` takes a second one where there is one.
"""

import asyncio
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from kvtransfer.movers.nccl_library import find_nccl
from services.memory.measure import gpu_count
from tests.checkpoints import make_checkpoint
from tests.e2e.cluster import Cluster
from tests.e2e.test_mixed import MAX_MODEL_LEN, make_plans, run_all
from tests.engine.harness import prompt_of

pytestmark = pytest.mark.gpu
FLAGS = ("--served-model-name", "tiny", "--mem-fraction", "0.05")
REQUESTS = 1000
AT_ONCE = 64
LENGTHS = (1, 63, 64, 65, 200, 700, 1500)
NEW_TOKENS = 12
BFLOAT16_LOGPROB = 0.06
"""Of one token's log probability: chunks that end elsewhere sum in another order, and bfloat16 has 8 bits."""


def require(mover: str) -> None:
    if mover == "nccl" and (gpu_count() < 2 or find_nccl() is None):
        pytest.skip(
            "NCCL takes no two processes on one GPU" if gpu_count() < 2 else "libnccl.so.2 is not here"
        )
    if mover == "nixl" and importlib.util.find_spec("nixl_cu13") is None:
        pytest.skip("nixl-cu13 is not installed")


@pytest.mark.parametrize("mover", ["cuda_ipc", "nixl", "nccl"])
def test_a_thousand_mixed_requests_leave_nothing(mover: str, tmp_path: Path) -> None:
    require(mover)
    model_dir = make_checkpoint("qwen3", tmp_path / "model", seed=5, max_model_len=MAX_MODEL_LEN)
    flags = (*FLAGS, "--mover", mover, "--staging-slots", "4", "--staging-slot-bytes", "32768")
    with Cluster(model_dir, tmp_path, *flags, device="cuda") as cluster:
        plans = make_plans(11, [1, 2, 5, 20, 40], REQUESTS)
        failures = asyncio.run(run_all(cluster.url, plans, AT_ONCE))
        assert not failures, failures[:3]
        cluster.assert_at_rest()
        decode, prefill = cluster.worker("decode")["status"], cluster.worker("prefill")["status"]
        assert decode["mover"] == prefill["mover"] == mover
        assert decode["counters"].get("checksum_mismatches", 0) == 0
        assert prefill["counters"]["transfer_segments"] > REQUESTS // 2


def answers(model_dir: Path, log_dir: Path, *flags: str) -> list[list[dict[str, Any]]]:
    """For each prompt, one request at a time: the drawn tokens, their log probabilities and the best two."""
    log_dir.mkdir()
    found = []
    with Cluster(model_dir, log_dir, *FLAGS, *flags, device="cuda") as cluster:
        for length in LENGTHS:
            body = {"model": "tiny", "prompt": prompt_of(length), "max_tokens": NEW_TOKENS, "temperature": 0}
            body |= {"logprobs": 2, "ignore_eos": True}
            answer = cluster.http.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            logprobs = answer.json()["choices"][0]["logprobs"]
            rows = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
            found.append([{"token": token, "logprob": own, "top": top} for token, own, top in rows])
        cluster.assert_at_rest()
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_split_workers_say_what_a_unified_one_says(dtype: str, tmp_path: Path) -> None:
    """In float32 the same tokens; in bfloat16 log probabilities within `BFLOAT16_LOGPROB`, and another token
    only where two are that close."""
    model_dir = make_checkpoint("qwen3", tmp_path / "model", seed=6, max_model_len=MAX_MODEL_LEN, eos=False)
    split = answers(model_dir, tmp_path / "split", "--dtype", dtype)
    unified = answers(model_dir, tmp_path / "unified", "--dtype", dtype, "--unified", "1")
    for length, ours, theirs in zip(LENGTHS, split, unified, strict=True):
        assert len(ours) == len(theirs) == NEW_TOKENS
        for mine, other in zip(ours, theirs, strict=True):
            if mine["token"] != other["token"]:
                assert dtype != "float32", f"prompt of {length}: {mine} against {other}"
                best, second = sorted(other["top"].values(), reverse=True)[:2]
                assert best - second < 2 * BFLOAT16_LOGPROB, f"prompt of {length}: {mine} against {other}"
                break
            assert abs(mine["logprob"] - other["logprob"]) < BFLOAT16_LOGPROB
