"""Every key that transformers reads of config.json and generation_config.json is in the tables of
config_keys.py, or one that its family alone has."""

import ast
import dataclasses
import importlib
import inspect
from collections.abc import Iterator

from transformers import (
    GenerationConfig,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from services.engine.checkpoint import config_keys as keys
from services.engine.models.registry import FAMILIES

READING = (
    *(
        f"models.{name}.modeling_{name}"
        for name in ("llama", "mistral", "ministral", "qwen2", "qwen3", "qwen3_moe")
    ),
    "masking_utils",
    "cache_utils",
    "modeling_rope_utils",
)
"""Modules of transformers that compute with a configuration's attributes."""
NOT_KEYS = {"get_text_config", "standardize_rope_params", "validate_rope", "__class__"}


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
            if (
                node.func.id in ("getattr", "hasattr")
                and _is_config(node.args[0])
                and isinstance(name, ast.Constant)
            ):
                yield str(name.value)


def test_every_key_of_the_configuration_classes_is_in_a_table() -> None:
    known = keys.OBEYED.keys() | keys.HARMLESS.keys() | keys.ONLY.keys()
    own_keys = [key for family in FAMILIES.values() for key in family.own_keys]
    assert len(set(own_keys)) == len(own_keys) and not known & FAMILIES["LlamaForCausalLM"].own_keys
    known |= set(own_keys)
    for kind in (LlamaConfig, MistralConfig, MinistralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig):
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
