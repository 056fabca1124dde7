"""Qwen3-MoE: Qwen3's attention, and in most layers a router that gives each token to a few of many experts.

Experts are computed one after the other, each with the tokens that chose it. Which experts those are the host
has to know, so no CUDA graph can hold a step.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, cast

import msgspec

from services.engine.checkpoint.published_config import Count, Eos, PublishedConfig
from services.engine.models.family import Family, dense_width
from services.engine.models.qwen3 import tokenizer_class
from services.engine.models.tensor_specs import (
    Axis,
    TensorSpec,
    attention_tensors,
    feed_forward_axis,
    gated_mlp_tensors,
    hidden_axis,
    norm_tensors,
)

if TYPE_CHECKING:
    from torch import Tensor

    from services.engine.models.layers import DecoderLayer
    from services.engine.models.model_config import ModelConfig
    from services.engine.models.parameters import Parameters

LayerNumber = Annotated[int, msgspec.Meta(ge=0)]


class Qwen3MoeConfig(PublishedConfig, frozen=True, kw_only=True):
    """`num_local_experts` is how transformers 5 writes `num_experts`."""

    vocab_size: Count = 151_936
    hidden_size: Count = 2048
    intermediate_size: Count = 6144
    num_hidden_layers: Count = 24
    num_key_value_heads: Count | None = 4
    max_position_embeddings: Count = 32_768
    eos_token_id: Eos = None
    sliding_window: int | None = 4096
    num_experts: Count = 128
    num_local_experts: Count | None = None
    num_experts_per_tok: Count = 8
    moe_intermediate_size: Count = 768
    norm_topk_prob: bool = False
    decoder_sparse_step: Count = 1
    mlp_only_layers: list[LayerNumber] | None = None

    def __post_init__(self) -> None:
        if self.num_experts_per_tok > self.experts():
            raise ValueError(f"num_experts_per_tok is {self.num_experts_per_tok} of {self.experts()} experts")
        if self.layer_types is not None and set(super().kinds()) != set(self._all_alike()):
            raise ValueError("layer_types must say of every layer what sliding_window makes of it")

    def experts(self) -> int:
        return self.num_local_experts or self.num_experts

    def window(self) -> int | None:
        return self.sliding_window if self.use_sliding_window else None

    def _all_alike(self) -> list[str]:
        return ["full_attention" if self.window() is None else "sliding_attention"] * self.num_hidden_layers

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer has experts."""
        return layer not in (self.mlp_only_layers or []) and (layer + 1) % self.decoder_sparse_step == 0


def layer_tensors(config: Qwen3MoeConfig, layer: int) -> Iterator[TensorSpec]:
    bias, name = config.attention_bias, f"model.layers.{layer}.mlp."
    yield from norm_tensors(config, layer)
    yield from attention_tensors(config, layer, qkv_bias=bias, output_bias=bias, head_norm=True)
    if not config.is_sparse(layer):
        inner = feed_forward_axis(config.intermediate_size, "intermediate_size")
        yield from gated_mlp_tensors(config, layer, name, inner)
        return
    inner = feed_forward_axis(config.moe_intermediate_size, "moe_intermediate_size")
    share = config.num_experts_per_tok / config.experts()
    yield TensorSpec(
        f"{name}gate.weight", (Axis(config.experts(), "num_experts"), hidden_axis(config)), layer
    )
    for expert in range(config.experts()):
        yield from gated_mlp_tensors(config, layer, f"{name}experts.{expert}.", inner, token_share=share)


def feed_forward_width(config: Qwen3MoeConfig, tp: int) -> int:
    """One expert is computed at a time, in the worst case for all tokens: its input and output besides gate,
    up and product, and the sum of all experts; and the router's probabilities, in float32 and twice."""
    sparse = 3 * config.moe_intermediate_size // tp + 3 * config.hidden_size + 4 * config.experts()
    if all(config.is_sparse(layer) for layer in range(config.num_hidden_layers)):
        return sparse
    return max(sparse, dense_width(config, tp))


class SparseMlp:
    """A softmax router, and experts that are each a SwiGLU feed-forward (Shazeer et al., Outrageously Large
    Neural Networks, 2017).

    Every rank routes alike, has its part of each expert's inner size, and sums what comes out once.
    """

    def __init__(self, config: Qwen3MoeConfig, parameters: "Parameters", name: str) -> None:
        from services.engine.models.linear import make_linear, make_linears

        experts = [f"{name}experts.{expert}." for expert in range(config.experts())]
        self.router = make_linear(parameters, name + "gate")
        self.gate_up = make_linears(parameters, [(one + "gate_proj", one + "up_proj") for one in experts])
        self.down = make_linears(parameters, [(one + "down_proj",) for one in experts])
        self.chosen, self.normalised = config.num_experts_per_tok, config.norm_topk_prob
        self.group = parameters.group

    def forward(self, x: "Tensor") -> "Tensor":
        """`[tokens, hidden]` to the same. Waits for the device to know which experts were chosen."""
        weights, experts = self.router.forward(x).float().softmax(dim=-1).topk(self.chosen, dim=-1)
        if self.normalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        weights = weights.to(x.dtype)
        total = x.new_zeros(x.shape)
        for expert in sorted(set(experts.flatten().tolist())):
            tokens, places = (experts == expert).nonzero(as_tuple=True)
            product = self.gate_up[expert].forward_gated(x.index_select(0, tokens))
            product = self.down[expert].forward(product) * weights[tokens, places, None]
            total.index_add_(0, tokens, product)
        return self.group.sum(total)


def make_layer(model: "ModelConfig", parameters: "Parameters", layer: int) -> "DecoderLayer":
    from services.engine.models.layers import Attention, DecoderLayer, GatedMlp

    config, name = cast(Qwen3MoeConfig, model.published), f"model.layers.{layer}.mlp."
    sparse = config.is_sparse(layer)
    mlp = SparseMlp(config, parameters, name) if sparse else GatedMlp(parameters, name)
    return DecoderLayer(model, parameters, layer, Attention(model, parameters, layer), mlp)


FAMILY = Family(
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    Qwen3MoeConfig,
    layer_tensors,
    make_layer,
    feed_forward_width,
    tokenizer_class,
    harmless_keys={
        "output_router_logits": "what else transformers' models give out",
        "router_aux_loss_coef": "training only",
    },
    captures_graphs=False,
)
