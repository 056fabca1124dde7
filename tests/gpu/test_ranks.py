"""Two ranks on two GPUs: NCCL inside CUDA graphs, and KV between workers of different numbers of ranks."""

from pathlib import Path

import pytest
import torch

from services.protocol.messages import Sampling
from tests.checkpoints import make_checkpoint
from tests.e2e.test_ranks import check_different_ranks
from tests.e2e.test_tokens import check_family
from tests.engine.harness import run_ahead, run_together, start_engine
from tests.engine.test_ranks import PAGES, SAMPLED, sequences_of, two_ranks

GREEDY = Sampling(max_tokens=1, seed=1, temperature=0.0)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]


def test_two_gpus_give_the_tokens_of_a_cpu(tmp_path: Path) -> None:
    model_dir = make_checkpoint("qwen3", tmp_path / "model", seed=4, eos=False, kv_heads=4)
    one = start_engine(model_dir, pages=PAGES)
    wanted = [run_together(one, sequences_of(sampling), 8) for sampling in (GREEDY, SAMPLED)]
    with two_ranks(model_dir, tmp_path, device="cuda") as two:
        assert [run_together(two, sequences_of(one), 8) for one in (GREEDY, SAMPLED)] == wanted
        assert two.capture_graphs() > 0
        assert [run_ahead(two, sequences_of(one), 8) for one in (GREEDY, SAMPLED)] == wanted


def test_a_unified_worker_on_two_gpus(tmp_path: Path) -> None:
    check_family("qwen3", tmp_path, "--unified", "1", "--tp", "2", "--mem-fraction", "0.05", device="cuda")


@pytest.mark.parametrize(("prefill_tp", "decode_tp"), [(2, 1), (1, 2), (2, 2)])
def test_kv_between_different_numbers_of_gpus(prefill_tp: int, decode_tp: int, tmp_path: Path) -> None:
    """On two GPUs the workers share them."""
    check_different_ranks(prefill_tp, decode_tp, tmp_path, "--mem-fraction", "0.05", device="cuda")
