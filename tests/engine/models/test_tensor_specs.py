"""The tensors that a family declares: what is loaded, counted and divided follows from them alone."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from services.config import WorkerConfig
from services.engine.checkpoint.published_config import PublishedConfig
from services.engine.checkpoint.safetensors_files import read_checkpoint_files
from services.engine.engine import Engine
from services.engine.errors import CheckpointError
from services.engine.models.family import Family
from services.engine.models.model_config import ModelConfig, read_model_config
from services.engine.models.registry import FAMILIES
from services.engine.models.sharding import allowed_tp, rank_parameter_bytes
from services.engine.models.stored_tensors import check_tensors
from services.engine.models.tensor_specs import (
    TensorSpec,
    attention_tensors,
    feed_forward_axis,
    gated_mlp_tensors,
    norm_tensors,
)
from services.engine.rank_group import RankGroup
from services.memory.estimate import plan_input_for
from tests.checkpoints import FAMILIES as TESTED
from tests.checkpoints import Family as FamilyName
from tests.checkpoints import make_checkpoint
from tests.engine.harness import Sequence, prompt_of, run_together, start_engine

OPTIONS: dict[str, list[Any]] = {
    "tied": [False, True],
    "layers": [1, 2, 3],
    "heads": [4, 8],
    "kv_heads": [2, 4],
    "head_dim": [16, 24],
    "intermediate": [48, 96],
    "attention_bias": [False, True],
    "mlp_bias": [False, True],
    "num_experts": [4, 6],
    "moe_intermediate_size": [16, 48],
    "mlp_only_layers": [[], [0]],
}
MOE_ONLY = {"num_experts", "moe_intermediate_size", "mlp_only_layers"}


class OnPaper(RankGroup):
    """A rank without others, for what needs no sums."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def config_of(model_dir: Path, **options: Any) -> WorkerConfig:
    return WorkerConfig("worker", "unified", model_dir, "ipc://unused", load_format="dummy", **options)


def loaded_bytes(model: ModelConfig, rank: int, config: WorkerConfig) -> int:
    engine = Engine(config, model, OnPaper(rank, config.tp))
    return engine.load(lambda done_bytes, total_bytes: None)


def test_every_family_is_tested() -> None:
    assert {family.model_type for family in FAMILIES.values()} == set(TESTED)


@pytest.mark.parametrize("family", TESTED)
def test_the_ledger_counts_what_is_loaded(family: FamilyName, tmp_path: Path) -> None:
    """Whatever the model, the precision and the number of ranks."""
    chance = random.Random(family)
    for case in range(5):
        options = {name: chance.choice(values) for name, values in OPTIONS.items()}
        if family != "qwen3_moe":
            options = {name: value for name, value in options.items() if name not in MOE_ONLY}
        model = read_model_config(make_checkpoint(family, tmp_path / str(case), seed=case, **options))
        for quantization in ("none", "fp8"):
            for dtype in ("float32", "bfloat16"):
                for tp in (tp for tp in (1, 2) if tp in allowed_tp(model)):
                    config = config_of(model.model_dir, tp=tp, dtype=dtype, quantization=quantization)
                    planned = plan_input_for(config, model, device_name="cpu", device_bytes=1 << 30)
                    found = {loaded_bytes(model, rank, config) for rank in range(tp)}
                    assert found == {planned.weights_bytes}, (options, config)


@pytest.mark.parametrize("family", TESTED)
def test_the_ranks_parts_are_the_whole_tensor(family: FamilyName, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path, kv_heads=4, layers=1)
    model, stored = read_model_config(tmp_path), load_file(tmp_path / "model.safetensors")
    assert 4 in allowed_tp(model) or family == "qwen3_moe"
    for spec in model.tensors:
        whole = stored[spec.name]
        assert spec.shape == tuple(whole.shape)
        parts = [whole[part] for rank in range(2) if (part := spec.part(rank, 2)) is not None]
        divided = [at for at, axis in enumerate(spec.axes) if axis.units is not None]
        assert all(tuple(part.shape) == spec.rank_shape(2) for part in parts)
        if divided:
            assert torch.equal(torch.cat(parts, dim=divided[0]), whole)
        else:
            assert len(parts) == (1 if spec.summed_once else 2)
            assert all(torch.equal(part, whole) for part in parts)


def test_experts_are_divided_by_their_own_size(tmp_path: Path) -> None:
    options = {"kv_heads": 4, "moe_intermediate_size": 6}
    model = read_model_config(make_checkpoint("qwen3_moe", tmp_path, **options))  # type: ignore[arg-type]
    assert allowed_tp(model) == [1, 2]
    with pytest.raises(
        ValueError, match=r"4 heads, 4 KV heads, moe intermediate size 6 and vocabulary of 320"
    ):
        plan_input_for(config_of(tmp_path, tp=4), model, device_name="cpu", device_bytes=1 << 30)
    whole, half = (rank_parameter_bytes(model, tp, "float32", "none") for tp in (1, 2))
    everywhere = sum(
        spec.rank_bytes(4, False)
        for spec in model.tensors
        if all(axis.units is None for axis in spec.axes) and spec.heads is None
    )
    assert (half - everywhere) * 2 == whole - everywhere


def test_a_family_whose_steps_no_graph_holds_plans_none(tmp_path: Path) -> None:
    planned = {}
    for family in TESTED:
        model = read_model_config(make_checkpoint(family, tmp_path / family))
        config = config_of(model.model_dir, device="cuda", dtype="bfloat16")
        planned[family] = plan_input_for(config, model, device_name="gpu", device_bytes=1 << 40).graphs_bytes
        assert (planned[family] > 0) == model.family.captures_graphs
    assert planned["qwen3_moe"] == 0


def test_a_plan_does_without_torch() -> None:
    said = (
        "import sys; import services.memory.estimate, services.engine.models.registry; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


class DoubledConfig(PublishedConfig, frozen=True, kw_only=True):
    mlp_factor: int = 1


def doubled_tensors(config: DoubledConfig, layer: int) -> Iterator[TensorSpec]:
    """A Llama without biases whose feed-forward is a multiple of what its configuration says."""
    inner = feed_forward_axis(config.mlp_factor * config.intermediate_size, "intermediate_size")
    yield from norm_tensors(config, layer)
    yield from attention_tensors(config, layer)
    yield from gated_mlp_tensors(config, layer, f"model.layers.{layer}.mlp.", inner)


def test_a_family_in_the_registry_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else has to know it: it is read, checked, planned, loaded and run."""
    path = make_checkpoint("llama", tmp_path, intermediate=96, eos=False) / "config.json"
    prompt = prompt_of(20)
    wanted = run_together(start_engine(tmp_path), [Sequence(prompt, list(range(9)))], 8)
    changes = {"architectures": ["DoubledForCausalLM"], "model_type": "doubled", "intermediate_size": 48}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes | {"mlp_factor": 2}))
    with pytest.raises(CheckpointError, match="DoubledForCausalLM"):
        read_model_config(tmp_path)
    family = Family("DoubledForCausalLM", "doubled", DoubledConfig, doubled_tensors)
    monkeypatch.setitem(FAMILIES, family.architecture, family)
    model = read_model_config(tmp_path)
    assert model.notes == () and allowed_tp(model) == [1, 2]
    check_tensors(model, read_checkpoint_files(tmp_path))
    config = config_of(tmp_path, quantization="fp8")
    planned = plan_input_for(config, model, device_name="cpu", device_bytes=1 << 30)
    assert loaded_bytes(model, 0, config) == planned.weights_bytes
    assert run_together(start_engine(tmp_path), [Sequence(prompt, list(range(9)))], 8) == wanted
