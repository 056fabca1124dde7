"""`config.json` of a published checkpoint, with the defaults that its family was published with.

A file names only what its family does not take for granted, so the defaults are part of it. They are those of
`transformers`' configuration classes, written down here because importing that package takes longer than
everything else in the start of a worker; a test compares the two.
"""

from typing import Annotated, Any

import msgspec

Count = Annotated[int, msgspec.Meta(ge=1)]


class PublishedConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Llama's defaults. `rope_scaling` and `rope_theta` are the old spelling of `rope_parameters`."""

    vocab_size: Count = 32_000
    hidden_size: Count = 4096
    intermediate_size: Count = 11_008
    num_hidden_layers: Count = 32
    num_attention_heads: Count = 32
    num_key_value_heads: Count | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: Count = 2048
    rms_norm_eps: float = 1e-6
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: Count | None = None
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float = 10_000.0
    partial_rotary_factor: float | None = None

    def rope(self) -> dict[str, Any]:
        """The new spelling, whichever the file has."""
        found = dict(self.rope_scaling or self.rope_parameters or {})
        found.setdefault("rope_theta", self.rope_theta)
        found.setdefault("rope_type", found.get("type", "default"))
        if self.partial_rotary_factor is not None:
            found.setdefault("partial_rotary_factor", self.partial_rotary_factor)
        if found["rope_type"] in ("llama3", "yarn"):
            found.setdefault("original_max_position_embeddings", self.max_position_embeddings)
        return found

    def window(self) -> int | None:
        """The sliding window, in tokens, of the layers that slide."""
        return self.sliding_window

    def sliding_layers(self) -> list[str]:
        """What each layer is, by the names of `layer_types`. Only asked for where there is a window."""
        return ["sliding_attention"] * self.num_hidden_layers


class LlamaPublished(PublishedConfig, frozen=True, kw_only=True):
    def window(self) -> int | None:
        return None


class MistralPublished(PublishedConfig, frozen=True, kw_only=True):
    intermediate_size: Count = 14_336
    num_key_value_heads: Count | None = 8
    max_position_embeddings: Count = 131_072
    sliding_window: Count | None = 4096


class Qwen2Published(PublishedConfig, frozen=True, kw_only=True):
    vocab_size: Count = 151_936
    intermediate_size: Count = 22_016
    num_key_value_heads: Count | None = 32
    max_position_embeddings: Count = 32_768
    eos_token_id: int | list[int] | None = None
    sliding_window: Count | None = 4096

    def window(self) -> int | None:
        return self.sliding_window if self.use_sliding_window else None

    def sliding_layers(self) -> list[str]:
        if self.layer_types is not None:
            return self.layer_types
        full = min(self.max_window_layers, self.num_hidden_layers)
        return ["full_attention"] * full + ["sliding_attention"] * (self.num_hidden_layers - full)


class Qwen3Published(Qwen2Published, frozen=True, kw_only=True):
    head_dim: int | None = 128


FAMILIES: dict[str, tuple[str, type[PublishedConfig]]] = {
    "LlamaForCausalLM": ("llama", LlamaPublished),
    "MistralForCausalLM": ("mistral", MistralPublished),
    "Qwen2ForCausalLM": ("qwen2", Qwen2Published),
    "Qwen3ForCausalLM": ("qwen3", Qwen3Published),
}
"""By architecture: its `model_type`, and its configuration."""


def published_config(raw: dict[str, Any], architecture: str) -> PublishedConfig:
    """Raises ValueError where a field has a type or value that it cannot have, naming the field."""
    model_type, kind = FAMILIES[architecture]
    if raw.get("model_type", model_type) != model_type:
        raise ValueError(f"model_type is {raw['model_type']!r}, but {model_type!r} goes with {architecture}")
    return msgspec.convert(raw, kind)
