"""Reading model directories: what is accepted, and one clear message for each thing that is wrong."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.engine.checkpoint.safetensors_files import INDEX_NAME, SINGLE_NAME
from services.engine.errors import CheckpointError
from services.engine.models.layers import Decoder
from services.engine.models.model_config import read_model_config
from services.engine.models.parameters import Parameters
from services.engine.models.stored_tensors import model_digest
from services.engine.models.weights import fill_dummy, load_safetensors
from tests.checkpoints import FAMILIES, YARN_ROPE, make_checkpoint


def _ignore(done_bytes: int, total_bytes: int) -> None:
    pass


def _load(model_dir: Path) -> Parameters:
    model = read_model_config(model_dir)
    parameters = Parameters(model.tensors, torch.float32, torch.device("cpu"))
    Decoder(model, parameters)
    with torch.inference_mode():
        load_safetensors(model, parameters, _ignore)
    return parameters


def _edit_config(model_dir: Path, **changes: Any) -> None:
    path = model_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_tensors(model_dir: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(model_dir / SINGLE_NAME)
    change(tensors)
    save_file(tensors, model_dir / SINGLE_NAME)


# ---------------------------------------------------------------- what is accepted


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_has_its_place_and_is_counted(family: Any, tied: bool, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path, tied=tied)
    model = read_model_config(tmp_path)
    parameters = _load(tmp_path)
    stored = load_file(tmp_path / SINGLE_NAME)
    assert set(parameters.views) == set(model.tensor_shapes()) == set(stored)
    for name, tensor in stored.items():
        assert torch.equal(parameters.views[name], tensor.expand_as(parameters.views[name]))
    assert parameters.byte_count == model.parameter_bytes("float32") == 2 * model.parameter_bytes("bfloat16")


def test_shards_hold_the_same_as_one_file(tmp_path: Path) -> None:
    one = _load(make_checkpoint("qwen3", tmp_path / "one", seed=5))
    several = make_checkpoint("qwen3", tmp_path / "several", seed=5, sharded=True)
    assert len(list(several.glob("*.safetensors"))) > 1
    assert all(torch.equal(one.views[name], view) for name, view in _load(several).views.items())


def test_a_bfloat16_checkpoint_loads_as_float32(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, dtype="bfloat16")
    stored = load_file(tmp_path / SINGLE_NAME)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert all(torch.equal(view, stored[name].float()) for name, view in _load(tmp_path).views.items())


def test_harmless_extra_tensors_are_ignored(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, tied=True)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    _edit_tensors(tmp_path, add)
    assert "lm_head.weight" not in _load(tmp_path).views


def test_progress_grows_to_the_total(tmp_path: Path) -> None:
    make_checkpoint("mistral", tmp_path, sharded=True)
    model = read_model_config(tmp_path)
    parameters = Parameters(model.tensors, torch.bfloat16, torch.device("cpu"))
    Decoder(model, parameters)
    seen: list[tuple[int, int]] = []
    load_safetensors(model, parameters, lambda done, total: seen.append((done, total)))
    total_bytes = model.parameter_bytes("float32")
    assert seen[0] == (0, total_bytes)
    assert seen[-1] == (total_bytes, total_bytes)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_dummy_weights_are_the_same_every_time_and_finite(tmp_path: Path) -> None:
    make_checkpoint("qwen2", tmp_path)
    (tmp_path / SINGLE_NAME).unlink()
    model = read_model_config(tmp_path)
    filled = []
    for _ in range(2):
        parameters = Parameters(model.tensors, torch.bfloat16, torch.device("cpu"))
        Decoder(model, parameters)
        fill_dummy(parameters, _ignore)
        filled.append(parameters.views)
    for name, view in filled[0].items():
        assert torch.equal(view, filled[1][name])
        assert bool(view.isfinite().all())
    assert filled[0]["model.embed_tokens.weight"].float().std() > 0


def test_old_and_new_rope_spelling_read_alike(tmp_path: Path) -> None:
    new = read_model_config(make_checkpoint("llama", tmp_path / "new", rope=YARN_ROPE))
    old = read_model_config(make_checkpoint("llama", tmp_path / "old", rope=YARN_ROPE, legacy_rope=True))
    assert new.rope == old.rope
    assert (new.rope.kind, new.rope.factor, new.rope.original_max_positions) == ("yarn", 4.0, 64)


# ---------------------------------------------------------------- the digest


def test_digest_tells_models_apart(tmp_path: Path) -> None:
    def digest(name: str, dtype: Any = "float32", load_format: Any = "auto", **options: Any) -> str:
        model_dir = make_checkpoint("qwen3", tmp_path / name, **options)
        return model_digest(read_model_config(model_dir), dtype, load_format)

    same = digest("a")
    assert digest("b") == same  # another directory
    different = [
        digest("c", layers=3),
        digest("d", dtype="bfloat16"),
        digest("e", load_format="dummy"),
        digest("f", rope=YARN_ROPE),
        digest("g", sharded=True),
        digest("h", rms_norm_eps=1e-5),
    ]
    assert len({same, *different}) == 7
    assert all(len(value) == 64 for value in different)


# ---------------------------------------------------------------- what is refused


def _missing_config(model_dir: Path) -> None:
    (model_dir / "config.json").unlink()


def _broken_config(model_dir: Path) -> None:
    (model_dir / "config.json").write_text('{"architectures": [')


def _list_config(model_dir: Path) -> None:
    (model_dir / "config.json").write_text("[]")


def _other_architecture(model_dir: Path) -> None:
    _edit_config(model_dir, architectures=["GPT2LMHeadModel"])


def _quantized(model_dir: Path) -> None:
    _edit_config(model_dir, quantization_config={"quant_method": "awq"})


def _other_activation(model_dir: Path) -> None:
    _edit_config(model_dir, hidden_act="gelu")


def _heads_do_not_divide(model_dir: Path) -> None:
    _edit_config(model_dir, num_key_value_heads=3)


def _dynamic_rope(model_dir: Path) -> None:
    _edit_config(model_dir, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_missing_config, r"config\.json: not found; --model must be a Hugging Face model directory"),
        (_broken_config, r"config\.json: not valid JSON: "),
        (_list_config, r"config\.json: must hold a JSON object, holds list"),
        (
            _other_architecture,
            r'architecture "GPT2LMHeadModel" is not supported \(supported: LlamaFor.*Qwen3For',
        ),
        (_quantized, r"quantization_config: weights quantised by 'awq' are not supported; only float32"),
        (_other_activation, r"hidden_act 'gelu' is not supported"),
        (_heads_do_not_divide, r"num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        (_dynamic_rope, r"rope type 'dynamic' is not supported \(supported: default, linear, llama3, yarn\)"),
    ],
)
def test_bad_configurations(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    damage(make_checkpoint("llama", tmp_path))
    with pytest.raises(CheckpointError, match=message):
        read_model_config(tmp_path)


def _no_weights(model_dir: Path) -> None:
    (model_dir / SINGLE_NAME).unlink()


def _pickled(model_dir: Path) -> None:
    (model_dir / SINGLE_NAME).rename(model_dir / "pytorch_model.bin")


def _torn(model_dir: Path) -> None:
    data = (model_dir / SINGLE_NAME).read_bytes()
    (model_dir / SINGLE_NAME).write_bytes(data[:-100])


def _torn_in_header(model_dir: Path) -> None:
    data = (model_dir / SINGLE_NAME).read_bytes()
    (model_dir / SINGLE_NAME).write_bytes(data[:50])


def _not_safetensors(model_dir: Path) -> None:
    (model_dir / SINGLE_NAME).write_bytes(struct.pack("<Q", 10) + b"x" * 40)


def _empty(model_dir: Path) -> None:
    (model_dir / SINGLE_NAME).write_bytes(b"")


def _missing_tensor(model_dir: Path) -> None:
    _edit_tensors(model_dir, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))


def _unexpected_tensor(model_dir: Path) -> None:
    _edit_tensors(
        model_dir, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})
    )


def _misshaped_tensor(model_dir: Path) -> None:
    _edit_tensors(model_dir, lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}))


def _integer_tensor(model_dir: Path) -> None:
    _edit_tensors(
        model_dir, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)})
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_weights, r"holds neither model\.safetensors nor model\.safetensors\.index\.json"),
        (_pickled, r"pytorch_model\.bin: refused: only safetensors"),
        (_torn, r"model\.safetensors: torn: its header describes \d+ bytes of tensors, the file has \d+"),
        (_torn_in_header, r"model\.safetensors: torn or not a safetensors file \(header does not fit"),
        (_not_safetensors, r"model\.safetensors: torn or not a safetensors file \(bad header"),
        (_empty, r"model\.safetensors: torn or not a safetensors file"),
        (_missing_tensor, r"model\.safetensors: missing tensor model\.layers\.1\.self_attn\.k_proj\.weight$"),
        (_unexpected_tensor, r"unexpected tensor model\.layers\.0\.self_attn\.q_proj\.bias"),
        (_misshaped_tensor, r"model\.norm\.weight has shape \[63\], config\.json asks for \[64\]"),
        (_integer_tensor, r"model\.norm\.weight has dtype I8 \(supported: F32, BF16, F16, F64\)"),
    ],
)
def test_bad_weights(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    damage(make_checkpoint("llama", tmp_path))
    with pytest.raises(CheckpointError, match=message):
        _load(tmp_path)


def _remove_shard(model_dir: Path) -> None:
    (model_dir / "model-00002-of-00004.safetensors").unlink()


def _outside_shard(model_dir: Path) -> None:
    _edit_index(model_dir, "../model.safetensors")


def _wrong_shard(model_dir: Path) -> None:
    _edit_index(model_dir, "model-00004-of-00004.safetensors")


def _edit_index(model_dir: Path, place: str) -> None:
    index = json.loads((model_dir / INDEX_NAME).read_text())
    index["weight_map"]["model.embed_tokens.weight"] = place
    (model_dir / INDEX_NAME).write_text(json.dumps(index))


def _broken_index(model_dir: Path) -> None:
    (model_dir / INDEX_NAME).write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            _remove_shard,
            r"index\.json: names the shard model-00002-of-00004\.safetensors, which is not there",
        ),
        (_outside_shard, r"shard name '\.\./model\.safetensors' is not a plain file name"),
        (
            _wrong_shard,
            r"says that model\.embed_tokens\.weight is in model-00004-of-00004\.safetensors, but it is not",
        ),
        (_broken_index, r"not a safetensors index"),
    ],
)
def test_bad_shards(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    damage(make_checkpoint("llama", tmp_path, sharded=True))
    with pytest.raises(CheckpointError, match=message):
        _load(tmp_path)
