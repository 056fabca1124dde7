"""What the precision options do to the ledger, from the shape of a real model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.config import WorkerConfig
from services.engine.models.model_config import read_model_config
from services.engine.precision import PrecisionError
from services.memory.estimate import plan_input_for
from services.memory.inputs import PlanInput
from services.memory.plan import plan_memory
from tests.unit.deploy.commandline import parse

GIB = 1 << 30
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    return tmp_path


def inputs_of(model_dir: Path, **options: Any) -> PlanInput:
    values = {"device": "cuda", "dtype": "bfloat16", "load_format": "dummy", "page_size_tokens": 64} | options
    config = WorkerConfig("w", "unified", model_dir, "ipc:///-", **values)
    model = read_model_config(model_dir)
    return plan_input_for(config, model, device_name="gpu", device_bytes=80 * GIB)


def test_a_page_of_fp8_is_half_a_page_and_the_pool_holds_twice_the_tokens(model_dir: Path) -> None:
    plain, fp8 = inputs_of(model_dir), inputs_of(model_dir, kv_dtype="fp8")
    assert plain.page_bytes == 64 * 144 * 1024
    assert 2 * fp8.page_bytes == plain.page_bytes
    assert replace(fp8, page_bytes=plain.page_bytes) == plain, "and nothing else changes"
    assert plan_memory(fp8).pool_tokens // 64 in (2 * plain.pages, 2 * plain.pages + 1)
    assert 4 * fp8.page_bytes == inputs_of(model_dir, dtype="float32").page_bytes


def test_linear_layers_of_fp8_take_half_and_a_scale_for_each_row(model_dir: Path) -> None:
    plain, fp8 = inputs_of(model_dir), inputs_of(model_dir, quantization="fp8")
    linear = 36 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 12288)
    rows = 36 * (4096 + 2 * 1024 + 4096 + 2 * 12288 + 4096)
    assert plain.weights_bytes - fp8.weights_bytes == linear - 4 * rows
    rest = 2 * 151936 * 4096  # embedding and output matrix keep their dtype
    assert 0 < fp8.weights_bytes - linear - 4 * rows - 2 * rest < 2 * 1024 * 1024  # norms
    assert replace(fp8, weights_bytes=plain.weights_bytes) == plain


def test_what_cannot_be_combined_is_refused_before_anything_is_planned(model_dir: Path) -> None:
    with pytest.raises(PrecisionError, match="fp8 on cuda with --dtype float32 is not supported"):
        inputs_of(model_dir, dtype="float32", quantization="fp8")


def test_the_options_reach_the_plan_from_flag_variable_and_file(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "baton.yaml").write_text("quantization: fp8\n")
    monkeypatch.setenv("BATON_KV_DTYPE", "fp8")
    settings = parse(["plan", "model", "--config", str(tmp_path / "baton.yaml")])
    assert (settings.kv_dtype, settings.quantization) == ("fp8", "fp8")
    settings = parse(["plan", "model", "--kv-cache-dtype", "auto"])
    assert (settings.kv_dtype, settings.quantization) == ("auto", "none")
