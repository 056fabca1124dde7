"""What sets Qwen3-MoE apart: its router, its layers of two kinds, and what its configuration may not say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from services.engine.batch import Row
from services.engine.errors import CheckpointError
from services.engine.models.model_config import read_model_config
from services.engine.models.qwen3_moe import SparseMlp
from services.engine.models.stored_tensors import model_digest
from tests.checkpoints import make_checkpoint
from tests.engine.harness import Sequence, new_engine, prompt_of, run_together, start_engine


def test_a_token_that_is_not_finite_spoils_no_other(tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path, seed=3, eos=False)
    engine = start_engine(tmp_path)
    prompt, targets = prompt_of(20), [*prompt_of(20)[1:], 0]
    clean = Row(prompt, 0, list(range(5)), [], targets, 0)
    (expected,) = engine.execute([clean])
    with torch.inference_mode():
        engine.decoder.embedding[299] = torch.nan
    result, spoiled = engine.execute([clean, Row([5, 299, 7], 0, [9], [], [299, 7, 0], 0)])
    assert (result.nonfinite_at, spoiled.nonfinite_at) == (None, 1)
    said = [[one.logprob for one in found.prompt_logprobs] for found in (result, expected)]
    assert said[0] == pytest.approx(said[1], abs=1e-4)


def test_every_expert_is_asked_and_none_for_no_token(tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path, seed=3, eos=False)
    mlp: Any = start_engine(tmp_path).decoder.layers[0].mlp
    assert isinstance(mlp, SparseMlp)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        chosen = mlp.router.forward(x).topk(2).indices
        assert set(chosen.flatten().tolist()) == set(range(6))
        whole = mlp.forward(x)
        assert mlp.forward(x[:0]).shape == (0, 64)
        torch.testing.assert_close(torch.cat([mlp.forward(row) for row in x.split(1)]), whole)


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_experts_in_fp8_are_near_those_that_are_not(kv_dtype: str, tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path, seed=3, eos=False, norm_topk_prob=True)
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    outputs = []
    for quantization in ("none", "fp8"):
        engine = start_engine(tmp_path, quantization=quantization, kv_dtype=kv_dtype)
        with torch.inference_mode():
            outputs.append(engine.decoder.layers[1].mlp.forward(x))
        assert len(run_together(engine, [Sequence(prompt_of(30), list(range(12)))], 5)[0]) == 5
    exact, quantised = outputs
    error = float((quantised - exact).norm() / exact.norm())
    assert 0.001 < error < 0.1


@pytest.mark.parametrize(("dense", "measured"), [([], 2), ([0], 2), ([0, 1, 2], 4), ([3], 4)])
def test_a_layer_of_each_kind_is_measured(dense: list[int], measured: int, tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path, layers=5, mlp_only_layers=dense)
    assert read_model_config(tmp_path).layers_of_every_kind() == measured


def test_an_inner_size_of_experts_shows_in_the_activations(tmp_path: Path) -> None:
    """Though the first two layers have none. A process's peak is known to some megabytes only, so the inner
    size is one whose share of it is several times that."""
    measured = []
    for size in (16, 8192):
        make_checkpoint(
            "qwen3_moe", tmp_path / str(size), layers=3, mlp_only_layers=[0, 1], moe_intermediate_size=size
        )
        engine = new_engine(tmp_path / str(size), max_chunk_tokens=1024, load_format="dummy")
        engine.load(lambda done_bytes, total_bytes: None)
        measured.append(engine.measure_activations())
    assert measured[1] > measured[0] + (16 << 20), "1024 tokens of 8192 float32 are 32 MiB"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 7}, "num_experts_per_tok is 7 of 6 experts"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0; it must be an integer of at least 1"),
        ({"mlp_only_layers": ["0"]}, r"mlp_only_layers is \[\"0\"\]; it must be an integer"),
        ({"norm_topk_prob": None}, "norm_topk_prob is null; it must be true or false"),
        (
            {"layer_types": ["sliding_attention"] * 2, "sliding_window": 9},
            "layer_types must say of every layer",
        ),
        ({"n_routed_experts": 6}, "n_routed_experts is 6, which is not supported"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = make_checkpoint("qwen3_moe", tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        read_model_config(tmp_path)


def test_experts_of_a_dense_family_are_refused(tmp_path: Path) -> None:
    path = make_checkpoint("qwen3", tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_experts": 6}))
    with pytest.raises(CheckpointError, match="num_experts is 6, which is not supported"):
        read_model_config(tmp_path)


def test_routing_is_part_of_the_digest(tmp_path: Path) -> None:
    """Two workers whose routers choose differently may not share KV, though every tensor is the same."""
    digests = set()
    for name, options in {"a": {}, "b": {"norm_topk_prob": True}, "c": {"num_experts_per_tok": 3}}.items():
        model = read_model_config(make_checkpoint("qwen3_moe", tmp_path / name, **options))  # type: ignore[arg-type]
        digests.add(model_digest(model, "float32", "dummy"))
    assert len(digests) == 3
