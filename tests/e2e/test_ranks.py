"""Workers of two ranks, as `baton serve` starts them: the tokens of one rank, and one end for all."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.checkpoints import make_checkpoint
from tests.e2e.cluster import Cluster, wait_until
from tests.e2e.test_tokens import ask, prompt_of, reference, tokens_of

FLAGS = ("--page-size", "16", "--max-chunk-tokens", "64", "--max-batch", "8", "--served-model-name", "tiny")
SMALL = ("--device-memory", "1GiB", "--mem-fraction", "0.2")
NEW_TOKENS = 8


def test_a_unified_worker_of_two_ranks(tmp_path: Path) -> None:
    """When a rank dies the worker ends with one message, is started again, and serves as before."""
    model_dir = make_checkpoint("qwen3", tmp_path / "model", seed=3, eos=False)
    prompts = [prompt_of(length, 1) for length in (1, 40, 150)]
    wanted = reference(model_dir, prompts, NEW_TOKENS)
    with Cluster(model_dir, tmp_path, *FLAGS, *SMALL, "--unified", "1", "--tp", "2") as cluster:
        assert [tokens_of(ask(cluster, prompt, NEW_TOKENS)) for prompt in prompts] == wanted
        cluster.assert_at_rest()
        (rank,) = (
            one for one in cluster.processes() if "services.tensor_parallel.rank_process" in one.cmdline()
        )
        worker_pid = cluster.worker("unified")["status"]["pid"]
        rank.kill()
        wait_until("the worker has ended too", lambda: not psutil.pid_exists(worker_pid))
        cluster.wait_ready()
        assert tokens_of(ask(cluster, prompts[1], NEW_TOKENS)) == wanted[1]
        cluster.assert_at_rest()
        said = "rank 1 of unified-0 ended by signal SIGKILL: the worker ends with it"
        assert cluster.log_path.read_text().count(said) == 1


@pytest.mark.parametrize(("prefill_tp", "decode_tp"), [(2, 1), (1, 2)])
def test_kv_goes_between_different_numbers_of_ranks(prefill_tp: int, decode_tp: int, tmp_path: Path) -> None:
    check_different_ranks(prefill_tp, decode_tp, tmp_path, *SMALL)


def check_different_ranks(
    prefill_tp: int, decode_tp: int, tmp_path: Path, *more_flags: str, device: str = "cpu"
) -> None:
    """Slots are small: most prompts need several segments of every part, all with checksums."""
    model_dir = make_checkpoint("qwen3", tmp_path / "model", seed=3, eos=False, kv_heads=4)
    prompts = [prompt_of(length, 1) for length in (1, 15, 16, 64, 199, 300)]
    wanted = reference(model_dir, prompts, NEW_TOKENS)
    ranks = ("--prefill-tp", str(prefill_tp), "--decode-tp", str(decode_tp))
    staging = ("--staging-slots", "4", "--staging-slot-bytes", "65536")
    flags = (*FLAGS, *ranks, *staging, *more_flags)
    with Cluster(model_dir, tmp_path, *flags, device=device) as cluster:
        assert [tokens_of(ask(cluster, prompt, NEW_TOKENS)) for prompt in prompts] == wanted
        with ThreadPoolExecutor(6) as pool:  # together; and most of each prompt is in both prefix caches now
            together = list(pool.map(lambda prompt: ask(cluster, prompt, NEW_TOKENS), prompts))
        assert [tokens_of(body) for body in together] == wanted
        cluster.assert_at_rest()
        counters = cluster.worker("prefill")["status"]["counters"]
        token_bytes = 4 * 2 * 2 * 16 * 4
        assert counters["transfer_bytes"] >= sum(len(prompt) for prompt in prompts) * token_bytes
        memory = {one["name"]: one["ledger"] for one in cluster.http.get("/memory").json()["workers"]}
        ranks_of = {"prefill-0": prefill_tp, "decode-0": decode_tp}
        for name, tp in ranks_of.items():
            lines = {entry["name"]: entry for entry in memory[name]["entries"]}
            assert lines["staging buffer"]["planned_bytes"] == 4 * 65536 // tp
            assert (f"{name} rank 1" in memory) == (tp == 2)
