"""What a model's tensors are: a typed value for each, from which everything that concerns weights is read.

A family says which tensors its layers have (`Family.layer_tensors`). The loader takes names and shapes from
these values, the ranks of a worker their parts, the ledger its bytes, the decoder the sizes of its layers,
and the benchmarks what a step has to read and multiply. Pure: a plan is made before torch is imported.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from services.engine.checkpoint.published_config import PublishedConfig

EMBEDDING, FINAL_NORM, OUTPUT = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

Part = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Units:
    """What tensor parallelism divides an axis by: `count` of them, of which a rank has whole ones."""

    count: int
    text: str
    """With their count: `12 heads`."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One extent of a tensor; `key` is how config.json spells it. Without `units` each rank has all of it."""

    size: int
    key: str
    units: Units | None = None

    def rank_size(self, tp: int) -> int:
        return self.size if self.units is None else self.size // tp


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a checkpoint, by the model's own name for it, and how it lies in memory.

    `quantisable`: the matrix of a linear layer, which `--quantization` may store in fewer bits. `layer` is
    None outside of the layers. `summed_once`: added to what the ranks sum up, so rank 0 has it and the others
    zeros. `heads`: a vector that memory holds once for each of so many heads. `token_share`: the share of all
    tokens that are multiplied with it, less than 1 for an expert of a router.
    """

    name: str
    axes: tuple[Axis, ...]
    layer: int | None = None
    quantisable: bool = False
    summed_once: bool = False
    heads: int | None = None
    token_share: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole model's tensor, as the checkpoint has it."""
        return tuple(axis.size for axis in self.axes)

    def rank_shape(self, tp: int) -> tuple[int, ...]:
        """Of what one of `tp` ranks holds of it."""
        return tuple(axis.rank_size(tp) for axis in self.axes)

    def rank_copies(self, tp: int) -> int:
        """How often that lies in the memory of one of `tp` ranks."""
        return 1 if self.heads is None else self.heads // tp

    def part(self, rank: int, tp: int) -> Part | None:
        """What `rank` of `tp` holds of the checkpoint's tensor; None: zeros stand for it there."""
        if self.summed_once and rank != 0:
            return None
        parts = []
        for axis in self.axes:
            size = axis.rank_size(tp)
            first = 0 if axis.units is None else rank * size
            parts.append(slice(first, first + size))
        return tuple(parts)

    def rank_bytes(self, number_bytes: int, fp8: bool, tp: int = 1) -> int:
        """In the memory of one of `tp` ranks. With `fp8` a matrix that can be quantised takes one byte a
        number and one float32 a row."""
        shape = self.rank_shape(tp)
        if fp8 and self.quantisable:
            return prod(shape) + 4 * shape[0]
        return prod(shape) * self.rank_copies(tp) * number_bytes


def hidden_axis(config: PublishedConfig) -> Axis:
    return Axis(config.hidden_size, "hidden_size")


def feed_forward_axis(size: int, key: str) -> Axis:
    """The inner size of a feed-forward, of which each rank computes a part; `key` names it in config.json."""
    return Axis(size, key, Units(size, f"{key.replace('_', ' ')} {size}"))


def attention_tensors(
    config: PublishedConfig,
    layer: int,
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    head_norm: bool = False,
) -> Iterator[TensorSpec]:
    """Grouped-query attention: the ranks have whole heads, and sum what their output projections give.

    `head_norm`: query and key heads are normalised, each kind by one vector.
    """
    name = f"model.layers.{layer}.self_attn."
    heads, kv_heads, head_dim, hidden = (
        config.num_attention_heads,
        config.kv_heads(),
        config.head_size(),
        hidden_axis(config),
    )
    query = Axis(heads * head_dim, "num_attention_heads * head_dim", Units(heads, f"{heads} heads"))
    kv_units = Units(kv_heads, f"{kv_heads} KV heads")
    key_value = Axis(kv_heads * head_dim, "num_key_value_heads * head_dim", kv_units)
    for part, rows in (("q_proj", query), ("k_proj", key_value), ("v_proj", key_value)):
        yield from linear_tensors(f"{name}{part}", layer, rows, hidden, bias=qkv_bias)
    yield from linear_tensors(name + "o_proj", layer, hidden, query, bias=output_bias)
    if head_norm:
        for part, count in (("q_norm", heads), ("k_norm", kv_heads)):
            yield TensorSpec(f"{name}{part}.weight", (Axis(head_dim, "head_dim"),), layer, heads=count)


def gated_mlp_tensors(
    config: PublishedConfig,
    layer: int,
    name: str,
    inner: Axis,
    *,
    bias: bool = False,
    token_share: float = 1.0,
) -> Iterator[TensorSpec]:
    """A SwiGLU feed-forward under `name`, divided among the ranks by its inner size."""
    hidden = hidden_axis(config)
    for part, rows, columns in (
        ("gate_proj", inner, hidden),
        ("up_proj", inner, hidden),
        ("down_proj", hidden, inner),
    ):
        yield from linear_tensors(f"{name}{part}", layer, rows, columns, bias=bias, token_share=token_share)


def linear_tensors(
    name: str, layer: int, rows: Axis, columns: Axis, *, bias: bool = False, token_share: float = 1.0
) -> Iterator[TensorSpec]:
    """A linear layer that can be quantised. Where the ranks divide its columns they sum its products."""
    yield TensorSpec(f"{name}.weight", (rows, columns), layer, quantisable=True, token_share=token_share)
    if bias:
        yield TensorSpec(
            f"{name}.bias", (rows,), layer, summed_once=columns.units is not None, token_share=token_share
        )


def norm_tensors(config: PublishedConfig, layer: int) -> Iterator[TensorSpec]:
    """The norms before attention and before the feed-forward."""
    for part in ("input_layernorm", "post_attention_layernorm"):
        yield TensorSpec(f"model.layers.{layer}.{part}.weight", (hidden_axis(config),), layer)


def dense_layer_tensors(
    config: PublishedConfig,
    layer: int,
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    head_norm: bool = False,
    mlp_bias: bool = False,
) -> Iterator[TensorSpec]:
    """A pre-norm layer of attention and one SwiGLU feed-forward, as the dense families have it."""
    inner = feed_forward_axis(config.intermediate_size, "intermediate_size")
    yield from norm_tensors(config, layer)
    yield from attention_tensors(
        config, layer, qkv_bias=qkv_bias, output_bias=output_bias, head_norm=head_norm
    )
    yield from gated_mlp_tensors(config, layer, f"model.layers.{layer}.mlp.", inner, bias=mlp_bias)


def outer_tensors(vocab_size: int, hidden_size: int) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
    """What lies around the layers: embedding, final norm and output matrix, which may be the embedding. Both
    are divided by rows: copied to every rank, they would be the larger part of what a small model's ranks
    hold."""
    vocabulary = Axis(vocab_size, "vocab_size", Units(vocab_size, f"vocabulary of {vocab_size}"))
    hidden = Axis(hidden_size, "hidden_size")
    embedding = TensorSpec(EMBEDDING, (vocabulary, hidden))
    return embedding, TensorSpec(FINAL_NORM, (hidden,)), TensorSpec(OUTPUT, (vocabulary, hidden))
