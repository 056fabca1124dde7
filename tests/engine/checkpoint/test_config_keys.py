"""Every key of config.json and generation_config.json with another value: either the same tokens as
transformers', or a refusal that names it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
)

from services.engine.checkpoint import config_keys as keys
from services.engine.errors import CheckpointError
from services.engine.models.model_config import read_model_config
from services.engine.models.rope import inverse_frequencies
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.engine.harness import Sequence, prompt_of, run_together, scattered_pages, start_engine

PROMPT_TOKENS, OUTPUT_TOKENS, LAYERS = 40, 5, 2

OTHER: dict[str, list[Any]] = {
    "architectures": [None, [], ["Odd", "{architecture}"], ["{decoder}"], ["OtherForCausalLM"]],
    "model_type": ["gpt2"],
    "num_hidden_layers": [1, 3, None],
    "num_attention_heads": [2, 8],
    "num_key_value_heads": [None, 4, 1],
    "head_dim": [None, 32, 0],
    "vocab_size": [300, 330, 320.0],
    "hidden_size": [32],
    "intermediate_size": [100],
    "hidden_act": ["swish", "gelu", "SiLU", None],
    "rms_norm_eps": [1e-2, 1, None],
    "max_position_embeddings": [64, 1024.0, None],
    "original_max_position_embeddings": [16, None],
    "tie_word_embeddings": [True, None],
    "attention_bias": [True, None],
    "mlp_bias": [True],
    "rope_parameters": [
        None,
        {},
        {"rope_type": "default"},
        {"rope_theta": 100},
        {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]},
        {"rope_type": "linear", "factor": 3},
        {"rope_type": "linear", "factor": 3, "attention_factor": 2.0},
        {"type": "linear", "factor": 3},
        {"rope_type": "dynamic", "factor": 3},
        {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 16},
        {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "attention_factor": 0.5},
        {
            "rope_type": "yarn",
            "factor": 4,
            "original_max_position_embeddings": 16,
            "beta_fast": 0,
            "beta_slow": None,
        },
        {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 4096, "truncate": None},
        {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 4096, "truncate": False},
        {
            "rope_type": "yarn",
            "factor": 4,
            "original_max_position_embeddings": 16,
            "mscale": 2,
            "mscale_all_dim": 1,
        },
        {
            "rope_type": "yarn",
            "factor": 4,
            "original_max_position_embeddings": 16,
            "mscale": 2,
            "mscale_all_dim": 0,
        },
        {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "attn_factor": 1.0},
        {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "attn_factor": 0.3},
        {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "extrapolation_factor": 2},
        {"rope_type": "yarn", "factor": None},
        {"rope_type": "llama3", "factor": 4, "low_freq_factor": 1, "high_freq_factor": 4},
        {"rope_type": "llama3", "factor": 4},
        {"rope_type": "default", "rope_theta": 100.0, "llama_4_scaling_beta": 0.1},
        {"full_attention": {"rope_type": "default", "rope_theta": 100.0}},
    ],
    "rope_scaling": [{"type": "linear", "factor": 3.0}, {"type": "yarn", "factor": 2.0}, {}],
    "rope_theta": [100, None],
    "partial_rotary_factor": [1.0, 0.5, None],
    "sliding_window": [None, 7, 0, 1 << 20],
    "use_sliding_window": [True],
    "max_window_layers": [0, 1],
    "layer_types": [
        None,
        ["full_attention", "full_attention"],
        ["sliding_attention", "full_attention"],
        ["attention", "attention"],
        ["full_attention", "linear_attention"],
        ["full_attention"],
    ],
    "eos_token_id": [None, -1, 4000, [5, -1], "5"],
    "quantization_config": [{}, {"quant_method": "fp8"}, None],
    "num_nextn_predict_layers": [1],
    "mtp_num_hidden_layers": [1],
    "num_mtp_layers": [1],
    "mtp_layer_types": [["full_attention"]],
    "num_experts": [8, 0, None],
    "num_local_experts": [5, None],
    "num_experts_per_tok": [1, 4, 7, 0],
    "moe_intermediate_size": [40],
    "norm_topk_prob": [True, None],
    "decoder_sparse_step": [2, 0],
    "mlp_only_layers": [[0], [7], [], None, [-1]],
}
"""Of the keys that are obeyed, values that change the model, or would."""
TOGETHER: list[dict[str, Any]] = [
    {"use_sliding_window": True, "sliding_window": 7},
    {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    {"use_sliding_window": True, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    {"sliding_window": 7, "layer_types": ["full_attention", "full_attention"]},
    {"sliding_window": 7, "layer_types": ["full_attention", "sliding_attention"]},
    {"sliding_window": 7, "layer_types": None},
    {"sliding_window": None, "layer_types": ["full_attention", "sliding_attention"]},
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 16},
    {
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        "original_max_position_embeddings": 16,
    },
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 32},
]
HARMLESS_VALUES: dict[str, Any] = {
    "dtype": "bfloat16",
    "initializer_range": 0.5,
    "attention_dropout": 0.5,
    "hidden_dropout": 0.5,
    "use_cache": True,
    "pretraining_tp": 2,
    "chunk_size_feed_forward": 3,
    "pad_token_id": 7,
    "bos_token_id": 9,
    "sep_token_id": 3,
    "decoder_start_token_id": 4,
    "id2label": {"0": "a"},
    "label2id": {"a": 0},
    "tie_encoder_decoder": True,
    "transformers_version": "4.30.0",
    "_name_or_path": "somewhere",
    "auto_map": {"AutoModelForCausalLM": "mine.Mine"},
    "model_max_length": 12,
    "torchscript": True,
    "gradient_checkpointing": False,
    "resid_pdrop": 0.5,
    "prefix": "x",
    "tie_last_hidden_states": False,
    "tokenizer_class": "Odd",
    "unread_by_all": 1,
}
OWN_HARMLESS_VALUES: dict[str, Any] = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
"""Of the keys that one family alone has."""


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = request.param
    directory = tmp_path_factory.mktemp(family)
    make_checkpoint(family, directory, seed=4, layers=LAYERS, eos=False)
    (directory / "generation_config.json").unlink()
    return directory


def variant(base: Path, directory: Path, changes: dict[str, Any]) -> Path:
    """The checkpoint with another config.json, and the rest of it as it is."""
    directory.mkdir(exist_ok=True)
    for path in base.iterdir():
        if path.name != "config.json" and not (directory / path.name).exists():
            (directory / path.name).symlink_to(path)
    raw = json.loads((base / "config.json").read_text())
    architecture = raw["architectures"][0]
    text = json.dumps({**raw, **changes}).replace("{architecture}", architecture)
    text = text.replace("{decoder}", architecture.removesuffix("ForCausalLM") + "Model")
    (directory / "config.json").write_text(text)
    return directory


def family_of(model_dir: Path) -> Any:
    return json.loads((model_dir / "config.json").read_text())["model_type"]


def refused_by(model_dir: Path) -> dict[str, tuple[Any, ...]]:
    """Those of `ONLY` that are not keys of the family's own."""
    own_keys = read_model_config(model_dir).family.own_keys
    return {key: values for key, values in keys.ONLY.items() if key not in own_keys}


def theirs(model_dir: Path) -> list[int]:
    """Their greedy tokens, once their angles, which few tokens may not tell apart, are seen to be ours."""
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, attn_implementation="eager", dtype=torch.float32, local_files_only=True
    ).eval()
    mine = read_model_config(model_dir)
    frequencies, factor = inverse_frequencies(mine.rope, mine.head_dim)
    assert torch.allclose(frequencies, model.model.rotary_emb.inv_freq, rtol=1e-5, atol=0)
    assert factor == pytest.approx(model.model.rotary_emb.attention_scaling)
    ids = torch.tensor([prompt_of(PROMPT_TOKENS, 5)])
    with torch.inference_mode():
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=OUTPUT_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    return tokens[0, PROMPT_TOKENS:].tolist()


def ours(model_dir: Path) -> list[int]:
    engine = start_engine(model_dir)
    pages = scattered_pages(13, 1, engine.pool.pages)[0]
    return run_together(engine, [Sequence(prompt_of(PROMPT_TOKENS, 5), pages)], OUTPUT_TOKENS)[0]


def check(base: Path, directory: Path, changes: dict[str, Any]) -> bool:
    """Whether the changed model is served, with transformers' tokens; if not, a key or a shape is named."""
    model_dir = variant(base, directory, changes)
    try:
        got = ours(model_dir)
    except CheckpointError as error:
        said = str(error).replace(str(model_dir), "")
        inner = [
            key for value in changes.values() if isinstance(value, dict) for key in (*value, *value.values())
        ]
        named = [*changes, *map(str, inner)] + [
            "has shape",
            "missing tensor",
            "unexpected tensor",
        ] * _reshapes(changes)
        named += [other for key, other in COMPANIONS.items() if key in changes]
        assert any(name in said for name in named), (changes, said)
        assert "\n" not in said and "__init__" not in said
        return False
    try:
        expected = theirs(model_dir)
    except AssertionError:
        raise
    except Exception as error:  # transformers refuses what has but one meaning, a whole number with a point
        assert any(kind in repr(error) for kind in STRICTER), changes
        return True
    assert got == expected, changes
    return True


def _reshapes(changes: dict[str, Any]) -> bool:
    return bool(changes.keys() & SHAPES)


COMPANIONS = {
    "architectures": "architecture ",
    "num_hidden_layers": "layer_types",
    "layer_types": "sliding_window",
    "rope_parameters": "rope type",
}
"""A key that another one has to go with."""
STRICTER = (
    "int, got float",
    "float, got int",
    "int, got NoneType",
    "'NoneType' and 'float'",
    "`sliding_window`",
)
SHAPES = {
    *(
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "hidden_size",
    ),
    *("intermediate_size", "attention_bias", "mlp_bias"),
    *("num_experts", "num_local_experts", "moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers"),
}
NEVER_SERVED = SHAPES | {"model_type"}
"""No other value goes with the weights."""


@pytest.mark.parametrize("key", OTHER)
def test_a_key_is_obeyed_or_refused_by_its_name(base: Path, key: str, tmp_path: Path) -> None:
    cases = OTHER[key]
    if key == "rope_parameters":  # the same code for all families, so each does a quarter
        cases = cases[:1] + cases[FAMILIES.index(family_of(base)) + 1 :: len(FAMILIES)]
    served = [check(base, tmp_path, {key: value}) for value in cases]
    assert any(served) or key in NEVER_SERVED


def test_keys_that_work_together(base: Path, tmp_path: Path) -> None:
    served = [check(base, tmp_path, changes) for changes in TOGETHER]
    assert sum(served) >= 3


def test_harmless_keys_change_no_token(base: Path, tmp_path: Path) -> None:
    own = {key: OWN_HARMLESS_VALUES[key] for key in read_model_config(base).family.harmless_keys}
    assert check(base, tmp_path, HARMLESS_VALUES | own)
    assert read_model_config(tmp_path).notes == (
        "config.json: not read: unread_by_all",
        "config.json: auto_map names code of the checkpoint, which is not run",
    )
    assert ours(tmp_path) == ours(base)


def test_a_key_that_is_off_is_as_good_as_absent(base: Path, tmp_path: Path) -> None:
    off = {key: values[0] for key, values in refused_by(base).items()}
    off |= {key: values[0] for key, values in keys.GENERATION_ONLY.items()}
    model_dir = variant(base, tmp_path, off)
    (model_dir / "generation_config.json").write_text(
        json.dumps({key: values[0] for key, values in keys.GENERATION_ONLY.items()})
    )
    assert read_model_config(model_dir).notes == ()
    assert ours(model_dir) == ours(base)


def test_a_key_that_nobody_obeys_is_refused_by_its_name(base: Path, tmp_path: Path) -> None:
    for key, values in refused_by(base).items():
        assert "odd" not in values
        variant(base, tmp_path, {key: "odd"})
        with pytest.raises(
            CheckpointError, match=rf"config\.json: {key} is .*, which is not supported; it must be"
        ):
            read_model_config(tmp_path)
    variant(base, tmp_path, {})
    for key in keys.GENERATION_ONLY:
        (tmp_path / "generation_config.json").write_text(json.dumps({key: 3}))
        with pytest.raises(
            CheckpointError, match=rf"generation_config\.json: {key} is 3, which is not supported"
        ):
            read_model_config(tmp_path)
