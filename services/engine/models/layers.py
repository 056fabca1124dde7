"""The parts that the decoders of all families are built from, and the decoder's frame."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.checkpoint.model_config import ModelConfig
from services.engine.kv.pool import KvPool
from services.engine.models.linear import make_linear
from services.engine.models.parameters import Parameters
from services.engine.models.rope import inverse_frequencies, rotation
from services.engine.ops.qkv import qkv_to_pool
from services.engine.ops.rms_norm import add_rms_norm, rms_norm
from services.engine.ops.small_gemm import small_linear
from services.engine.step_inputs import StepInputs


class Attention:
    """Grouped-query attention (Ainslie et al., 2023) with rotary positions over the paged pool.

    The families differ in which biases there are, in the norm of query and key heads (`head_norm`), and in
    the window.
    """

    def __init__(
        self,
        model: ModelConfig,
        parameters: Parameters,
        layer: int,
        *,
        qkv_bias: bool = False,
        output_bias: bool = False,
        head_norm: bool = False,
        window: int | None = None,
    ) -> None:
        name = f"model.layers.{layer}.self_attn."
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = model.heads, model.kv_heads, model.head_dim
        self.window = window
        self.scale = model.head_dim**-0.5
        self.eps = model.rms_norm_eps
        self.group = parameters.group
        heads_of = {"q_proj": self.heads, "k_proj": self.kv_heads, "v_proj": self.kv_heads}
        rows_of = {name + part: heads * self.head_dim for part, heads in heads_of.items()}
        hidden, mixed = model.hidden_size, self.heads * self.head_dim
        self.qkv = make_linear(parameters, rows_of, hidden, qkv_bias)
        self.output = make_linear(parameters, {name + "o_proj": hidden}, mixed, output_bias)
        self.head_norm: Tensor | None = None
        if head_norm:
            copies = {name + "q_norm.weight": self.heads, name + "k_norm.weight": self.kv_heads}
            self.head_norm = parameters.repeated(copies, self.head_dim)

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


class GatedMlp:
    """SwiGLU feed-forward, gate and up in one product."""

    def __init__(self, model: ModelConfig, parameters: Parameters, layer: int, *, bias: bool = False) -> None:
        name = f"model.layers.{layer}.mlp."
        size = model.intermediate_size
        rows_of = {name + "gate_proj": size, name + "up_proj": size}
        self.gate_up = make_linear(parameters, rows_of, model.hidden_size, bias)
        self.down = make_linear(parameters, {name + "down_proj": model.hidden_size}, size, bias)
        self.group = parameters.group

    def forward(self, x: Tensor) -> Tensor:
        return self.group.sum(self.down.forward(self.gate_up.forward_gated(x)))


class DecoderLayer:
    """One pre-norm layer. Takes and gives `(x, residual)`, so that each add is joined with the norm that
    follows. A family's layer is this with its own attention and feed-forward."""

    def __init__(
        self, model: ModelConfig, parameters: Parameters, layer: int, attention: Attention, mlp: GatedMlp
    ) -> None:
        name = f"model.layers.{layer}."
        self.eps = model.rms_norm_eps
        self.attention, self.mlp = attention, mlp
        self.attention_norm = parameters.tensor(name + "input_layernorm.weight", model.hidden_size)
        self.mlp_norm = parameters.tensor(name + "post_attention_layernorm.weight", model.hidden_size)

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


class Decoder(ABC):
    """Embedding, layers, final norm, output matrix. A family says what its layers are.

    `model` is the shape of this rank's part (`sharding.rank_shape`), with the whole vocabulary; of embedding
    and output matrix the rank has its rows.
    """

    def __init__(self, model: ModelConfig, parameters: Parameters) -> None:
        self.model, self.group = model, parameters.group
        rows = model.vocab_size // self.group.size
        self.embedding = parameters.tensor("model.embed_tokens.weight", rows, model.hidden_size)
        self.layers = [self.make_layer(parameters, layer) for layer in range(model.layers)]
        self.final_norm = parameters.tensor("model.norm.weight", model.hidden_size)
        self.output = self.embedding
        if not model.tied_embeddings:
            self.output = parameters.tensor("lm_head.weight", rows, model.hidden_size)
        frequencies, self.rotation_factor = inverse_frequencies(model.rope, model.head_dim)
        self.frequencies = frequencies.to(parameters.device)

    @abstractmethod
    def make_layer(self, parameters: Parameters, layer: int) -> DecoderLayer:
        """Allocate layer number `layer`."""

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
