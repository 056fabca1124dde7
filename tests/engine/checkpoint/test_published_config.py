"""Every field that is read from `config.json`, and every default, against transformers' own classes."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from services.engine.checkpoint.published_config import published_config
from services.engine.errors import CheckpointError
from services.engine.models.model_config import read_model_config
from services.engine.models.registry import FAMILIES

VALUES: dict[str, list[Any]] = {
    "vocab_size": [700],
    "hidden_size": [96],
    "intermediate_size": [200],
    "num_hidden_layers": [1, 3, 30, 40],
    "num_attention_heads": [4],
    "num_key_value_heads": [2, 4],
    "head_dim": [16],
    "max_position_embeddings": [512],
    "rms_norm_eps": [1e-5],
    "eos_token_id": [None, 5, [3, 4]],
    "tie_word_embeddings": [True, False],
    "attention_bias": [True],
    "mlp_bias": [True],
    "use_sliding_window": [True, False],
    "sliding_window": [None, 64],
    "max_window_layers": [2, 28],
    "rope_theta": [500_000, 1e6],
    "rope_scaling": [
        None,
        {"type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    ],
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": 7e5},
        {"rope_type": "default"},
        {"rope_type": "yarn", "rope_theta": 7e5, "factor": 2.0},
    ],
}
OWN_VALUES: dict[str, dict[str, list[Any]]] = {
    "Qwen3MoeForCausalLM": {
        "num_experts": [16],
        "num_local_experts": [12],
        "num_experts_per_tok": [2],
        "moe_intermediate_size": [64],
        "norm_topk_prob": [True],
        "decoder_sparse_step": [2],
        "mlp_only_layers": [[0, 2], None],
    }
}
"""Of the keys that one family alone has."""
COMPARED = sorted(VALUES.keys() - {"rope_theta", "rope_scaling", "rope_parameters", "use_sliding_window"})


def write(directory: Path, architecture: str, **fields: Any) -> dict[str, Any]:
    raw = {"architectures": [architecture], "model_type": FAMILIES[architecture].model_type, **fields}
    (directory / "config.json").write_text(json.dumps(raw))
    return raw


def check(directory: Path, architecture: str, **fields: Any) -> None:
    raw = write(directory, architecture, **fields)
    theirs = AutoConfig.from_pretrained(directory, local_files_only=True)
    ours = published_config(raw, FAMILIES[architecture].config)
    known = theirs.to_dict()
    for name in COMPARED:
        if name not in known or (name == "sliding_window" and architecture == "LlamaForCausalLM"):
            continue
        mine = getattr(ours, name)
        if name == "num_key_value_heads":
            mine = mine or ours.num_attention_heads
        elif name == "head_dim":
            mine = mine or ours.hidden_size // ours.num_attention_heads
        elif name == "sliding_window":
            mine = ours.window()
        assert mine == known[name], (name, raw)
    for name in FAMILIES[architecture].config.own_keys():
        mine = getattr(ours, name)
        if name in ("num_experts", "num_local_experts"):
            mine = ours.experts()  # type: ignore[attr-defined]
        elif name == "mlp_only_layers":
            mine = mine or []
        assert mine == getattr(theirs, name), (name, raw)
    assert ours.rope() == theirs.rope_parameters, raw
    if "layer_types" in known and ours.window() is not None:
        assert ours.kinds() == known["layer_types"], raw


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_defaults_are_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    check(tmp_path, architecture)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_fields_old_spellings_and_layers_are_read_as_by_transformers(
    architecture: str, tmp_path: Path
) -> None:
    random_ = random.Random(architecture)
    assert OWN_VALUES.get(architecture, {}).keys() == set(FAMILIES[architecture].config.own_keys())
    for name, values in (VALUES | OWN_VALUES.get(architecture, {})).items():
        for value in values:
            if name != "eos_token_id" or value is not None or architecture.startswith("Qwen"):
                check(tmp_path, architecture, **{name: value})
    for _ in range(60):
        some = random_.sample(sorted(VALUES), 7)
        fields = {name: random_.choice(VALUES[name]) for name in some}
        if fields.keys() & {"hidden_size", "num_attention_heads", "num_key_value_heads"}:
            fields |= {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
        check(tmp_path, architecture, **fields)


def test_layer_types_may_be_named(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"]
    for named in (kinds, None):
        fields = {"num_hidden_layers": 2, "use_sliding_window": True, "max_window_layers": 1}
        check(tmp_path, "Qwen3ForCausalLM", **fields, layer_types=named)
    write(tmp_path, "Qwen2ForCausalLM", use_sliding_window=True, layer_types=kinds)
    with pytest.raises(CheckpointError, match=r"layer_types must name .* for each of the 32 layers"):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "64"}, r'hidden_size is "64"; it must be an integer'),
        ({"hidden_size": None}, r"hidden_size is null; it must be an integer"),
        ({"hidden_size": 64.5}, r"hidden_size is 64\.5; it must be an integer"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers is 0; it must be an integer of at least 1"),
        ({"head_dim": "large"}, r'head_dim is "large"; it must be an integer or null'),
        ({"head_dim": 7}, r"head_dim 7 is not supported"),
        ({"head_dim": 0}, r"head_dim is 0; it must be an integer of at least 1"),
        ({"rms_norm_eps": "1e-6"}, r'rms_norm_eps is "1e-6"; it must be a number'),
        ({"tie_word_embeddings": None}, r"tie_word_embeddings is null; it must be true or false"),
        ({"hidden_act": "SiLU"}, r"hidden_act 'SiLU' is not supported \(supported: silu, swish\)"),
        ({"eos_token_id": "2"}, r'eos_token_id is "2"; it must be an integer or a list or null'),
        ({"eos_token_id": [True]}, r"eos_token_id is \[true\]; it must be an integer"),
        ({"layer_types": ["full_attention"]}, r"layer_types must name .* for each of the 32 layers"),
        ({"layer_types": [1]}, r"layer_types is \[1\]; it must be a text \(at layer_types\[0\]\)"),
        ({"sliding_window": 4}, r"sliding_window is 4, but Llama has full attention only"),
        ({"rope_scaling": 3}, r"rope_scaling is 3; it must be an object or null"),
        ({"rope_theta": None}, r"rope_theta is null; it must be a number above 0"),
        ({"rope_theta": "1e4"}, r'rope_theta is "1e4"; it must be a number or null'),
        ({"model_type": "qwen2"}, r"model_type is 'qwen2', but 'llama' goes with LlamaForCausalLM"),
        (
            {"partial_rotary_factor": 0.5},
            r"partial_rotary_factor is 0\.5, which is not supported; it must be 1",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, r"rope type 'linear' needs a factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, r"needs a factor of at least 1, not 0\.5"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": "2.0"}},
            r'factor is "2\.0"; it must be a number',
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2, "odd": 1}},
            r"rope_parameters: odd is not supp",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 2}},
            r"rope type 'llama3' needs a low_freq_factor",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "attn_factor": 0.5}}, r"attn_factor is 0\.5"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            r"one entry for each kind of layer \(full",
        ),
        ({"rope_parameters": {"rope_type": None}}, r"rope type None is not supported"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, "LlamaForCausalLM", **fields)
    with pytest.raises(CheckpointError, match=r"config\.json: .*" + message):
        read_model_config(tmp_path)
