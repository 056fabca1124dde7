"""The parts that the decoders of all families are built from, and the decoder's frame."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.kv.pool import KvPool
from services.engine.models.linear import make_linear
from services.engine.models.model_config import ModelConfig
from services.engine.models.parameters import Parameters
from services.engine.models.rope import inverse_frequencies, rotation
from services.engine.models.tensor_specs import EMBEDDING, FINAL_NORM, OUTPUT
from services.engine.ops.qkv import qkv_to_pool
from services.engine.ops.rms_norm import add_rms_norm, rms_norm
from services.engine.ops.small_gemm import small_linear
from services.engine.step_inputs import StepInputs


class Attention:
    """Grouped-query attention (Ainslie et al., 2023) with rotary positions over the paged pool.

    The families differ in which biases there are and in the norm of query and key heads, which their tensors
    tell, and in the window.
    """

    def __init__(self, model: ModelConfig, parameters: Parameters, layer: int) -> None:
        name = f"model.layers.{layer}.self_attn."
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = model.heads, model.kv_heads, model.head_dim
        self.window = model.windows[layer]
        self.scale = model.head_dim**-0.5
        self.eps = model.rms_norm_eps
        self.group = parameters.group
        self.qkv = make_linear(parameters, *(name + part for part in ("q_proj", "k_proj", "v_proj")))
        self.output = make_linear(parameters, name + "o_proj")
        self.head_norm: Tensor | None = None
        if parameters.has(name + "q_norm.weight"):
            self.head_norm = parameters.fused(name + "q_norm.weight", name + "k_norm.weight")

    def forward(
        self, x: Tensor, step: StepInputs, cos: Tensor, sin: Tensor, pool: KvPool, wanted: Tensor | None
    ) -> Tensor:
        """`x` `[tokens, hidden]` to the same; writes the new tokens' keys and values before it attends.
        With `wanted`, only those tokens' outputs are computed."""
        qkv = self.qkv.forward(x).view(x.shape[0], -1, self.head_dim)
        layer_rows, kv_scales = pool.layer_rows[self.layer], pool.layer_scales(self.layer)
        queries = qkv_to_pool(
            qkv,
            self.head_norm,
            self.eps,
            cos,
            sin,
            layer_rows,
            step.write_index,
            step.nonfinite,
            kv_scales,
        )
        if wanted is not None and wanted.shape[0] == 0:
            return x[:0]
        mixed = step.attention.attend(queries, pool, self.layer, self.scale, self.window)
        mixed = mixed.reshape(x.shape[0], -1)
        if wanted is not None:
            mixed = mixed.index_select(0, wanted)
        return self.group.sum(self.output.forward(mixed))


class FeedForward(Protocol):
    """What comes after a layer's attention."""

    def forward(self, x: Tensor) -> Tensor:
        """`[tokens, hidden]` to the same, summed over the ranks."""


class GatedMlp:
    """SwiGLU feed-forward, gate and up in one product. `name` is what its tensors' names begin with."""

    def __init__(self, parameters: Parameters, name: str) -> None:
        self.gate_up = make_linear(parameters, name + "gate_proj", name + "up_proj")
        self.down = make_linear(parameters, name + "down_proj")
        self.group = parameters.group

    def forward(self, x: Tensor) -> Tensor:
        return self.group.sum(self.down.forward(self.gate_up.forward_gated(x)))


class DecoderLayer:
    """One pre-norm layer. Takes and gives `(x, residual)`, so that each add is joined with the norm that
    follows. A family's layer is this with its own attention and feed-forward."""

    def __init__(
        self, model: ModelConfig, parameters: Parameters, layer: int, attention: Attention, mlp: FeedForward
    ) -> None:
        name = f"model.layers.{layer}."
        self.eps = model.rms_norm_eps
        self.attention, self.mlp = attention, mlp
        self.attention_norm = parameters.fused(name + "input_layernorm.weight")
        self.mlp_norm = parameters.fused(name + "post_attention_layernorm.weight")

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        step: StepInputs,
        cos: Tensor,
        sin: Tensor,
        pool: KvPool,
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both `[tokens, hidden]`; `residual` may be overwritten. With `wanted`, an int64 index of tokens,
        only those come out; every token's keys and values are written all the same."""
        x, residual = add_rms_norm(x, residual, self.attention_norm, self.eps)
        x = self.attention.forward(x, step, cos, sin, pool, wanted)
        if wanted is not None:
            residual = residual.index_select(0, wanted)
        x, residual = add_rms_norm(x, residual, self.mlp_norm, self.eps)
        return self.mlp.forward(x), residual


class Decoder:
    """Embedding, layers, final norm, output matrix. The family says what its layers are.

    All is allocated, unfilled. `model` is the shape of this rank's part (`sharding.rank_shape`), with the
    whole vocabulary; of embedding and output matrix the rank has its rows.
    """

    def __init__(self, model: ModelConfig, parameters: Parameters) -> None:
        self.model, self.group = model, parameters.group
        self.embedding = parameters.fused(EMBEDDING)
        self.layers = [model.family.make_layer(model, parameters, layer) for layer in range(model.layers)]
        self.final_norm = parameters.fused(FINAL_NORM)
        self.output = self.embedding
        if not model.tied_embeddings:
            self.output = parameters.fused(OUTPUT)
        frequencies, self.rotation_factor = inverse_frequencies(model.rope, model.head_dim)
        self.frequencies = frequencies.to(parameters.device)

    def forward(
        self, step: StepInputs, pool: KvPool, layers: int | None = None, wanted: Tensor | None = None
    ) -> Tensor:
        """Hidden states `[tokens, hidden]` before the final norm; fills the new tokens' KV, and marks those
        whose numbers are not finite in any rank.

        `layers` runs only that many: what a memory measurement needs, since they reuse their memory.
        `wanted`, an int64 index, names the tokens whose hidden states are asked for: the last layer computes
        those alone, which for a long chunk saves nearly all of its products.
        """
        cos, sin = rotation(step.positions, self.frequencies, self.rotation_factor)
        residual = self._embed(step.tokens)
        x = torch.zeros_like(residual)
        *inner, last = self.layers[:layers]
        for layer in inner:
            x, residual = layer.forward(x, residual, step, cos, sin, pool)
        x, residual = last.forward(x, residual, step, cos, sin, pool, wanted)
        self.group.sum(step.nonfinite)
        return residual.add_(x)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """`[n, hidden]` of `forward` to logits `[n, vocab]` in the model's dtype, in `out` if given."""
        hidden = rms_norm(hidden, self.final_norm, self.model.rms_norm_eps)
        if self.group.size == 1:
            return small_linear(hidden, self.output, out=out)
        return self.group.columns(small_linear(hidden, self.output), out)

    def _embed(self, tokens: Tensor) -> Tensor:
        """`[tokens, hidden]`. Ranks that lack a token's row add zeros to it, which changes no bit."""
        if self.group.size == 1:
            return F.embedding(tokens, self.embedding)
        rows = self.embedding.shape[0]
        at = tokens - self.group.rank * rows
        absent = (at < 0) | (at >= rows)
        found = F.embedding(at.masked_fill(absent, 0), self.embedding)
        return self.group.sum(found.masked_fill_(absent[:, None], 0.0))
