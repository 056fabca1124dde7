"""Every key that transformers reads of config.json and generation_config.json: in the tables of config_keys.py,
and with another value either the same tokens as transformers', or a refusal that names it."""

import ast
import dataclasses
import importlib
import inspect
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from services.engine import config_keys as keys
from services.engine.errors import CheckpointError
from services.engine.model_config import read_model_config
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.engine.harness import Sequence, prompt_of, run_together, scattered_pages, start_engine

PROMPT_TOKENS, OUTPUT_TOKENS, LAYERS = 40, 8, 2

# ---------------------------------------------------------------- the tables are whole

READING = (
    *(f"models.{name}.modeling_{name}" for name in ("llama", "mistral", "ministral", "qwen2", "qwen3")),
    "masking_utils",
    "cache_utils",
    "modeling_rope_utils",
)
"""Modules of transformers that compute with a configuration's attributes."""
NOT_KEYS = {"get_text_config", "standardize_rope_params", "__class__", "_attn_implementation", "_experts_implementation"}


def _is_config(node: ast.expr) -> bool:
    if isinstance(node, ast.Name):
        return node.id in ("config", "layer_config", "decoder_config")
    return isinstance(node, ast.Attribute) and node.attr == "config"


def _read_attributes(module: str) -> Iterator[str]:
    tree = ast.parse(inspect.getsource(importlib.import_module(f"transformers.{module}")))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_config(node.value):
            yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            name = node.args[1]
            if node.func.id in ("getattr", "hasattr") and _is_config(node.args[0]) and isinstance(name, ast.Constant):
                yield str(name.value)


def test_every_key_of_the_configuration_classes_is_in_a_table() -> None:
    known = keys.OBEYED.keys() | keys.HARMLESS.keys() | keys.ONLY.keys()
    for kind in (LlamaConfig, MistralConfig, MinistralConfig, Qwen2Config, Qwen3Config):
        assert {field.name for field in dataclasses.fields(kind)} | kind().to_dict().keys() <= known, kind
    read = {name for module in READING for name in _read_attributes(module)} - NOT_KEYS
    assert len(read) > 20
    assert read <= known, read - known


def test_every_key_of_the_generation_configuration_is_in_a_table() -> None:
    known = keys.GENERATION_HARMLESS.keys() | keys.GENERATION_ONLY.keys() | keys.BY_THE_ROUTER.keys()
    read = GenerationConfig().__dict__.keys() | GenerationConfig._get_default_generation_params().keys()
    assert read <= known, read - known


def test_no_key_is_in_two_tables() -> None:
    for tables in (
        (keys.OBEYED, keys.HARMLESS, keys.ONLY),
        (keys.GENERATION_HARMLESS, keys.GENERATION_ONLY, keys.BY_THE_ROUTER),
    ):
        assert len(set().union(*tables)) == sum(map(len, tables))


# ---------------------------------------------------------------- each key with other values

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
        {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "beta_fast": 0, "beta_slow": None},
        {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "truncate": None},
        {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "truncate": False},
        {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "mscale": 2, "mscale_all_dim": 1},
        {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "mscale": 2, "mscale_all_dim": 0},
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
    "sliding_window": [None, 7, 0],
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
            os.symlink(path, directory / path.name)
    raw = json.loads((base / "config.json").read_text())
    architecture = raw["architectures"][0]
    text = json.dumps({**raw, **changes}).replace("{architecture}", architecture)
    text = text.replace("{decoder}", architecture.removesuffix("ForCausalLM") + "Model")
    (directory / "config.json").write_text(text)
    return directory


def theirs(model_dir: Path) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, attn_implementation="eager", dtype=torch.float32, local_files_only=True
    ).eval()
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


def refusal(model_dir: Path) -> str | None:
    """What is said of a model that is not served."""
    try:
        ours_ = ours(model_dir)
    except CheckpointError as error:
        return str(error)
    return None if ours_ else ""


CASES = [({key: value}) for key, values in OTHER.items() for value in values] + TOGETHER


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda number: ",".join(CASES[number]))
def test_a_key_is_obeyed_or_refused_by_its_name(base: Path, case: int, tmp_path: Path) -> None:
    changes = CASES[case]
    model_dir = variant(base, tmp_path, changes)
    try:
        got = ours(model_dir)
    except CheckpointError as error:
        print(error)
        said = str(error)
        return
    try:
        expected = theirs(model_dir)
    except Exception as e:
        print("THEIRS FAIL", changes, repr(e)[:150])
        pytest.skip("x")
    assert got == expected, changes
