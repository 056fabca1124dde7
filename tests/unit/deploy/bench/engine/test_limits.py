"""The limits, against figures computed by hand for a published shape, and against counting by brute force."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

from deploy.bench.engine.limits import (
    Ceilings,
    ModelCost,
    RooflinePhase,
    formula,
    limit_s,
    model_cost,
    one_stream_s,
)
from deploy.bench.engine.shapes import SHAPES, write_shape
from deploy.bench.engine.workload import Offline, PrefillRow
from deploy.errors import UserError
from services.engine.models.model_config import read_model_config

H200 = Ceilings(4.49e12, 4.25e12, 781e12, 8192, "bfloat16", 1 << 32)
EVEN = Ceilings(1e9, 1e9, 1e9, 1, "float32", 1)


@pytest.fixture(scope="module")
def qwen3_8b(tmp_path_factory: pytest.TempPathFactory) -> ModelCost:
    model = read_model_config(write_shape("qwen3-8b", tmp_path_factory.mktemp("shape")))
    return model_cost(model, "bfloat16", model.parameter_bytes("bfloat16"), 36 * 2 * 8 * 128 * 2)


@pytest.mark.parametrize(
    ("batch", "context", "expected_ms"),
    [(1, 1024, 3.41), (1, 16384, 3.91), (64, 1024, 5.52), (256, 1024, 11.98)],
)
def test_a_decode_step_reads_weights_and_kv(
    qwen3_8b: ModelCost, batch: int, context: int, expected_ms: float
) -> None:
    """Qwen3-8B: 6.95e9 weights in its layers, 0.62e9 in its output matrix, 147456 bytes of KV a token."""
    by_hand_s = (2 * 7.568e9 + batch * context * 147456) / 4.49e12
    assert by_hand_s * 1e3 == pytest.approx(expected_ms, rel=0.01)
    assert limit_s(qwen3_8b.decode(batch, context), H200) == pytest.approx(by_hand_s, rel=1e-3)


@pytest.mark.parametrize(("tokens", "expected_ms"), [(1024, 18.6), (8192, 171.0), (16384, 393.0)])
def test_a_prefill_is_bound_by_operations(qwen3_8b: ModelCost, tokens: int, expected_ms: float) -> None:
    by_hand_s = (2 * tokens * 6.946e9 + 4 * 32 * 128 * 36 * tokens * tokens / 2) / 781e12
    assert by_hand_s * 1e3 == pytest.approx(expected_ms, rel=0.01)
    assert limit_s(qwen3_8b.prefill(PrefillRow(1, tokens)), H200) == pytest.approx(by_hand_s, rel=2e-3)


def test_many_prompts_share_the_weights_and_nothing_else(qwen3_8b: ModelCost) -> None:
    one, many = qwen3_8b.prefill(PrefillRow(1, 4096)), qwen3_8b.prefill(PrefillRow(32, 4096))
    assert many[0].read_bytes == one[0].read_bytes
    assert many[0].flop == 32 * one[0].flop
    assert (many[1].read_bytes, many[1].flop) == (32 * one[1].read_bytes, 32 * one[1].flop)


def test_offline_work_is_its_steps_together(qwen3_8b: ModelCost) -> None:
    """Prompts and decode steps of one full batch, each counted by itself."""
    batch, prompt, output = 256, 1024, 5
    whole = qwen3_8b.offline(Offline(batch, prompt, output), batch)
    prompts = qwen3_8b.prefill(PrefillRow(batch, prompt))
    steps = [qwen3_8b.decode(batch, prompt + done) for done in range(1, output)]
    assert whole[0].flop == pytest.approx(prompts[0].flop + sum(step[0].flop for step in steps), rel=1e-9)
    assert whole[0].read_bytes == 4 * prompts[0].read_bytes
    assert (whole[1].read_bytes, whole[1].flop) == (prompts[1].read_bytes, prompts[1].flop)
    assert whole[2].read_bytes == pytest.approx(sum(step[1].read_bytes for step in steps), rel=1e-9)
    assert whole[2].flop == pytest.approx(sum(step[1].flop for step in steps), rel=1e-9)


def test_windows_bound_what_is_seen(qwen3_8b: ModelCost) -> None:
    windowed = replace(qwen3_8b, windows=(None, 3, 7), kv_layer_token_bytes=2.0, pair_flop=1)
    tokens = 10
    pairs = sum(min(at + 1, window or tokens) for window in windowed.windows for at in range(tokens))
    assert windowed.prefill(PrefillRow(2, tokens))[1].flop == 2 * pairs
    assert windowed.decode(5, 6)[1] == RooflinePhase(
        "attention", "KV", 2.0 * 5 * (6 + 3 + 6), 5.0 * (6 + 3 + 6)
    )


def test_a_tied_output_matrix_is_read(tmp_path: Path) -> None:
    shape = dict(SHAPES["qwen3-8b"]) | {"num_hidden_layers": 1}
    costs = []
    for tied in (False, True):
        (tmp_path / "config.json").write_text(json.dumps(shape | {"tie_word_embeddings": tied}))
        model = read_model_config(tmp_path)
        costs.append(model_cost(model, "bfloat16", model.parameter_bytes("bfloat16"), 1.0))
    assert costs[0].weights_bytes == costs[1].weights_bytes
    assert costs[0].output_weights == costs[1].output_weights == 151936 * 4096


def test_of_experts_only_those_that_are_chosen_count(tmp_path: Path) -> None:
    """Qwen3-30B-A3B: 29.0e9 weights in its experts, of which a token takes 8 of 128; 1.53e9 elsewhere, of
    which 0.31e9 each are the embedding and the output matrix."""
    model = read_model_config(write_shape("qwen3-30b-a3b", tmp_path))
    cost = model_cost(model, "bfloat16", model.parameter_bytes("bfloat16"), 1.0)
    expert, experts = 3 * 768 * 2048, 48 * 128
    other = model.parameter_count() - experts * expert - 2 * 151936 * 2048
    norms = 48 * (2 * 2048 + 36 * 128) + 2048
    assert cost.layer_weights == experts * expert / 16 + other - norms
    assert 3.0e9 < cost.layer_weights + 151936 * 2048 < 3.1e9
    always = 2 * (other + 151936 * 2048)
    for batch in (1, 2, 32, 4096):
        read = 2 * experts * expert * (1 - (15 / 16) ** batch)
        assert cost.decode(batch, 1.0)[0].read_bytes == pytest.approx(always + read, rel=1e-6)
    assert cost.decode(4096, 1.0)[0].read_bytes == pytest.approx(cost.weights_bytes, rel=1e-6)


def test_the_larger_of_bytes_and_operations_of_all_phases_or_of_each() -> None:
    phases = [RooflinePhase("products", "weights", 3e9, 1e9), RooflinePhase("attention", "KV", 1e9, 2e9)]
    assert limit_s(phases, EVEN) == 4.0
    assert limit_s(phases, replace_rate(EVEN, 0.5e9)) == 6.0
    assert one_stream_s(phases, EVEN) == 5.0
    assert formula(phases, EVEN) == (
        "max((weights 3 GB + KV 1 GB) / 1 GB/s, (products 1 GFLOP + attention 2 GFLOP) / 1 GFLOP/s) = 4000 ms"
    )


def replace_rate(ceilings: Ceilings, flop_per_s: float) -> Ceilings:
    return structs.replace(ceilings, matmul_flop_per_s=flop_per_s)


@pytest.mark.parametrize("name", SHAPES)
def test_known_shapes_are_models(name: str, tmp_path: Path) -> None:
    model = read_model_config(write_shape(name, tmp_path))
    billions = {"qwen3-8b": 8.19, "qwen3-30b-a3b": 30.53, "llama-3.1-8b": 8.03}[name]
    assert model.parameter_count() / 1e9 == pytest.approx(billions, abs=0.005)


def test_a_shape_from_a_file_or_a_directory(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    file = tmp_path / "there" / "small.json"
    file.write_text(json.dumps(dict(SHAPES["qwen3-8b"]) | {"num_hidden_layers": 3}))
    assert read_model_config(write_shape(str(file), tmp_path)).layers == 3
    assert write_shape(str(file.parent), tmp_path) == file.parent
    with pytest.raises(UserError, match=re.escape("qwen3-8b, qwen3-30b-a3b, llama-3.1-8b")):
        write_shape("qwen3-80b", tmp_path)


def test_fp8_layers_run_at_their_own_rate_and_the_output_matrix_does_not(qwen3_8b: ModelCost) -> None:
    rates = structs.replace(H200, fp8_flop_per_s=2 * H200.matmul_flop_per_s)
    fp8 = replace(qwen3_8b, fp8_layers=True)
    by_hand_s = (8192 * 6.946e9 + 2 * 0.622e9 + 4 * 32 * 128 * 36 * 8192 * 8192 / 2) / 781e12
    assert limit_s(fp8.prefill(PrefillRow(1, 8192)), rates) == pytest.approx(by_hand_s, rel=2e-3)
    assert limit_s(fp8.prefill(PrefillRow(1, 8192)), H200) == limit_s(
        qwen3_8b.prefill(PrefillRow(1, 8192)), H200
    )
    assert "fp8" in formula(fp8.decode(1, 1024), rates)
    assert "fp8" not in formula(qwen3_8b.decode(1, 1024), rates)
