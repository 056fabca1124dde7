"""Qwen3, dense: query and key heads are normalised before the rotation; windows as in Qwen2."""

from collections.abc import Iterator
from typing import Any

from services.engine.checkpoint.published_config import Count
from services.engine.models.family import Family
from services.engine.models.qwen2 import Qwen2Config
from services.engine.models.tensor_specs import TensorSpec, dense_layer_tensors


class Qwen3Config(Qwen2Config, frozen=True, kw_only=True):
    head_dim: Count | None = 128


def layer_tensors(config: Qwen3Config, layer: int) -> Iterator[TensorSpec]:
    bias = config.attention_bias
    return dense_layer_tensors(config, layer, qkv_bias=bias, output_bias=bias, head_norm=True)


def tokenizer_class(named: Any, has_file: bool) -> str:
    """Qwen2's, unless the files name another."""
    return str(named).removesuffix("Fast") if has_file and named is not None else "Qwen2Tokenizer"


FAMILY = Family("Qwen3ForCausalLM", "qwen3", Qwen3Config, layer_tensors, tokenizer_class=tokenizer_class)
