"""Qwen2 and 2.5: biases on query, key and value, sliding windows in the layers that name one."""

from collections.abc import Iterator
from typing import Any

from services.engine.checkpoint.published_config import Count, Eos, PublishedConfig
from services.engine.models.family import Family
from services.engine.models.tensor_specs import TensorSpec, dense_layer_tensors


class Qwen2Config(PublishedConfig, frozen=True, kw_only=True):
    vocab_size: Count = 151_936
    intermediate_size: Count = 22_016
    num_key_value_heads: Count | None = 32
    max_position_embeddings: Count = 32_768
    eos_token_id: Eos = None
    sliding_window: int | None = 4096

    def window(self) -> int | None:
        return self.sliding_window if self.use_sliding_window else None

    def kinds(self) -> list[str]:
        if self.layer_types is not None or self.window() is None:
            return super().kinds()
        full = min(max(self.max_window_layers, 0), self.num_hidden_layers)
        return ["full_attention"] * full + ["sliding_attention"] * (self.num_hidden_layers - full)


def layer_tensors(config: Qwen2Config, layer: int) -> Iterator[TensorSpec]:
    return dense_layer_tensors(config, layer, qkv_bias=True)


def tokenizer_class(named: Any, has_file: bool) -> str:
    """Its own, whatever class is named."""
    return "Qwen2Tokenizer"


FAMILY = Family("Qwen2ForCausalLM", "qwen2", Qwen2Config, layer_tensors, tokenizer_class=tokenizer_class)
