"""One model on two rank processes: the tokens, log probabilities and KV of the same model on one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from services.config import WorkerConfig
from services.engine.batch import Row, SampleSpec
from services.engine.engine import Engine
from services.engine.models.model_config import read_model_config
from services.engine.models.sharding import TensorParallelError, allowed_tp, rank_parameter_bytes
from services.engine.rank_group import RankGroup
from services.memory.estimate import plan_input_for
from services.protocol.messages import Sampling
from services.tensor_parallel.leader_engine import LeaderEngine
from tests.checkpoints import make_checkpoint
from tests.engine.harness import Sequence, prompt_of, run_ahead, run_together, scattered_pages, start_engine

PAGES = 64
SAMPLED = Sampling(max_tokens=1, seed=11, temperature=0.9, top_p=0.95)


@contextmanager
def two_ranks(model_dir: Path, directory: Path, **config: Any) -> Iterator[LeaderEngine]:
    values = {"page_size_tokens": 4, "max_batch": 8, "max_chunk_tokens": 64, "tp": 2} | config
    worker = WorkerConfig("worker", "unified", model_dir, f"ipc://{directory}/worker", **values)
    engine = LeaderEngine(worker, read_model_config(model_dir))
    try:
        engine.load(lambda done_bytes, total_bytes: None)
        engine.measure_activations()
        engine.allocate_pool(PAGES)
        yield engine
    finally:
        engine.close()


def sequences_of(sampling: Sampling) -> list[Sequence]:
    tables = scattered_pages(12, 3, PAGES)
    return [
        Sequence(prompt_of(length, seed=length), table, sampling, chunk=16)
        for length, table in zip((5, 23, 33), tables, strict=True)
    ]


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_moe"])
def test_two_ranks_give_the_tokens_of_one(family: Any, tmp_path: Path) -> None:
    """qwen3: norms of heads, an output matrix; llama: a tied one, and biases that only one rank may add;
    qwen3_moe: a router that must choose alike."""
    special: dict[str, Any] = {
        "qwen3": {},
        "llama": {"attention_bias": True, "mlp_bias": True, "sharded": True, "tied": True},
        "qwen3_moe": {"decoder_sparse_step": 2, "layers": 3, "norm_topk_prob": True},
    }[family]
    model_dir = make_checkpoint(family, tmp_path / "model", seed=4, eos=False, kv_heads=4, **special)
    one = start_engine(model_dir, pages=PAGES)
    row = Row(prompt_of(9), 0, [0, 1, 2], targets=prompt_of(9)[1:], prompt_logprobs=2)
    row.samples = [SampleSpec(0, 9, Sampling(max_tokens=1, seed=1, temperature=0.0, logprobs=2), [], [])]
    with two_ranks(model_dir, tmp_path) as two:
        for sampling in (Sampling(max_tokens=1, seed=1, temperature=0.0), SAMPLED):
            ours, theirs = sequences_of(sampling), sequences_of(sampling)
            assert run_together(two, ours, 8) == run_together(one, theirs, 8)
        assert_same_half(two, one)
        assert run_ahead(two, sequences_of(SAMPLED), 8) == run_together(one, sequences_of(SAMPLED), 8)
        two.copy_pages([(0, 63)])
        assert torch.equal(two.pool.data[63], two.pool.data[0])
        (alike,), (wanted,) = two.execute([row]), one.execute([row])
        assert alike.sampled[0].token == wanted.sampled[0].token
        pairs = zip(alike.prompt_logprobs, wanted.prompt_logprobs, strict=True)
        assert all(abs(a.logprob - b.logprob) < 1e-3 for a, b in pairs)


def assert_same_half(two: Engine, one: Engine) -> None:
    heads = one.model.kv_heads // 2
    torch.testing.assert_close(two.pool.data, one.pool.data[:, :, :, :heads], rtol=1e-4, atol=1e-4)


class OnPaper(RankGroup):
    """A rank without others, for what needs no sums."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_the_ranks_of_dummy_weights_are_one_model(quantization: Any, tmp_path: Path) -> None:
    """A quantised matrix divided by columns has scales of its own on each rank, so only rows compare."""
    model_dir = make_checkpoint("qwen3", tmp_path / "model", eos=False)
    model = read_model_config(model_dir)
    config = WorkerConfig(
        "worker",
        "unified",
        model_dir,
        "ipc://unused",
        load_format="dummy",
        quantization=quantization,
        kv_dtype="fp8",
    )
    whole, *halves = (Engine(config, model, group) for group in (RankGroup(), OnPaper(0, 2), OnPaper(1, 2)))
    sizes = [engine.load(lambda done_bytes, total_bytes: None) for engine in (whole, *halves)]
    half_bytes = rank_parameter_bytes(model, 2, "float32", quantization)
    assert sizes == [rank_parameter_bytes(model, 1, "float32", quantization), half_bytes, half_bytes]
    assert torch.equal(torch.cat([half.decoder.embedding for half in halves]), whole.decoder.embedding)
    for engine in (whole, *halves):
        engine.allocate_pool(1)
    assert torch.equal(torch.cat([scales(half) for half in halves], dim=1), scales(whole))
    gates = [weights(half.decoder.layers[1].mlp.gate_up).chunk(2) for half in halves]
    joined = torch.cat([gate for gate, _ in gates] + [up for _, up in gates])
    assert torch.equal(joined, weights(whole.decoder.layers[1].mlp.gate_up))
    downs = [weights(half.decoder.layers[0].mlp.down) for half in halves]
    if quantization == "none":
        assert torch.equal(torch.cat(downs, dim=1), weights(whole.decoder.layers[0].mlp.down))


def test_ranks_that_do_not_divide_the_model_are_refused(tmp_path: Path) -> None:
    model_dir = make_checkpoint("qwen3", tmp_path / "model", heads=12, kv_heads=6, intermediate=96)
    model = read_model_config(model_dir)
    assert allowed_tp(model) == [1, 2]
    config = WorkerConfig("worker", "unified", model_dir, "ipc://unused", tp=4)
    message = r"--tp: 4 does not divide this model's 12 heads, 6 KV heads, .* \(allowed: 1, 2\)"
    with pytest.raises(TensorParallelError, match=message):
        plan_input_for(config, model, device_name="cpu", device_bytes=1 << 30)
    plan = plan_input_for(replace(config, tp=2), model, device_name="cpu", device_bytes=1 << 30)
    whole = plan_input_for(replace(config, tp=1), model, device_name="cpu", device_bytes=1 << 30)
    assert plan.page_bytes * 2 == whole.page_bytes
    norms_bytes = 4 * (64 * (2 * 2 + 1))
    assert (plan.weights_bytes - norms_bytes) * 2 == whole.weights_bytes - norms_bytes


def scales(engine: Engine) -> torch.Tensor:
    """Of the KV in fp8, `[2, kv_heads]` of one layer."""
    found = engine.pool.layer_scales(1)
    assert found is not None
    return found


def weights(linear: Any) -> torch.Tensor:
    matrix: torch.Tensor = linear.weight.float()
    return matrix
