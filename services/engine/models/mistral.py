"""Mistral: no biases, and (in its first version) one sliding window in every layer."""

from typing import Any

from services.engine.checkpoint.published_config import Count, PublishedConfig
from services.engine.models.family import Family
from services.engine.models.tensor_specs import dense_layer_tensors


class MistralConfig(PublishedConfig, frozen=True, kw_only=True):
    """With `layer_types`, transformers makes it a Ministral, which differs in nothing else."""

    intermediate_size: Count = 14_336
    num_key_value_heads: Count | None = 8
    max_position_embeddings: Count = 131_072
    sliding_window: int | None = 4096


def tokenizer_class(named: Any, has_file: bool) -> str:
    """A tokenizer.json is taken as it is, whatever class is named."""
    return "" if has_file else "LlamaTokenizer"


FAMILY = Family(
    "MistralForCausalLM", "mistral", MistralConfig, dense_layer_tensors, tokenizer_class=tokenizer_class
)
