"""Workers of two ranks, as `baton serve` starts them: the tokens of one rank, and one end for all."""

from pathlib import Path

import psutil

from tests.checkpoints import make_checkpoint
from tests.e2e.cluster import Cluster, wait_until
from tests.e2e.test_tokens import ask, prompt_of, reference, tokens_of

FLAGS = ("--page-size", "16", "--max-chunk-tokens", "64", "--max-batch", "8", "--served-model-name", "tiny")
NEW_TOKENS = 8


def test_a_unified_worker_of_two_ranks(tmp_path: Path) -> None:
    """Its tokens are those of transformers. When a rank dies the worker ends with one message, the launcher starts
    it again, and it serves as before."""
    model_dir = make_checkpoint("qwen3", tmp_path / "model", seed=3, eos=False)
    prompts = [prompt_of(length, 1) for length in (1, 40, 150)]
    wanted = reference(model_dir, prompts, NEW_TOKENS)
    with Cluster(model_dir, tmp_path, *FLAGS, "--unified", "1", "--tp", "2") as cluster:
        assert [tokens_of(ask(cluster, prompt, NEW_TOKENS)) for prompt in prompts] == wanted
        cluster.assert_at_rest()
        (rank,) = (one for one in cluster.processes() if "services.rank" in one.cmdline())
        worker_pid = cluster.worker("unified")["status"]["pid"]
        rank.kill()
        wait_until("the worker has ended too", lambda: not psutil.pid_exists(worker_pid))
        cluster.wait_ready()
        assert tokens_of(ask(cluster, prompts[1], NEW_TOKENS)) == wanted[1]
        cluster.assert_at_rest()
        assert "rank 1 of unified-0 ended by signal SIGKILL: the worker ends with it" in cluster.log_path.read_text()
