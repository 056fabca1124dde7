"""Llama 2 and 3: full attention, biases only where the configuration asks for them."""

from collections.abc import Iterator

from services.engine.checkpoint.published_config import PublishedConfig
from services.engine.models.family import Family
from services.engine.models.tensor_specs import TensorSpec, dense_layer_tensors


class LlamaConfig(PublishedConfig, frozen=True, kw_only=True):
    def window(self) -> int | None:
        """One that holds every prompt is none: some Llamas were made of Qwens, and kept theirs."""
        window = self.sliding_window
        return None if window is not None and window >= self.max_position_embeddings else window


def layer_tensors(config: LlamaConfig, layer: int) -> Iterator[TensorSpec]:
    bias = config.attention_bias
    return dense_layer_tensors(config, layer, qkv_bias=bias, output_bias=bias, mlp_bias=config.mlp_bias)


FAMILY = Family("LlamaForCausalLM", "llama", LlamaConfig, layer_tensors, full_attention_only=True)
