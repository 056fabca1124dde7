"""Which part of a model a worker's rank holds: tensor parallelism as in Megatron-LM (Shoeybi et al., 2019).

Query, key, value, gate and up projections are divided by rows, so that each rank has whole heads and whole
feed-forward units of its own; output and down projections by columns, so that what the ranks compute has
only to be summed. Embedding and output matrix are divided by rows of the vocabulary: copied to every rank,
they would be the larger part of what a small model's ranks hold. Norms are small and lie on every rank.
"""

from dataclasses import replace
from math import gcd

from services.config import Dtype, Quantization
from services.engine.checkpoint.model_config import ModelConfig

_BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
_BY_COLUMNS = ("o_proj", "down_proj")

Part = tuple[slice, ...]


class TensorParallelError(ValueError):
    """A model cannot be divided among so many ranks; the message says among how many it can."""


def allowed_tp(model: ModelConfig) -> list[int]:
    """How many ranks the model can be divided among."""
    common = gcd(model.heads, model.kv_heads, model.intermediate_size, model.vocab_size)
    return [tp for tp in range(1, common + 1) if common % tp == 0]


def check_tp(model: ModelConfig, tp: int) -> None:
    """Raises `TensorParallelError` unless every rank gets whole heads and equal parts."""
    allowed = allowed_tp(model)
    if tp not in allowed:
        raise TensorParallelError(
            f"--tp: {tp} does not divide this model's {model.heads} heads, {model.kv_heads} KV heads, "
            f"intermediate size {model.intermediate_size} and vocabulary of {model.vocab_size} "
            f"(allowed: {', '.join(map(str, allowed))})"
        )


def rank_shape(model: ModelConfig, tp: int) -> ModelConfig:
    """The decoder that one of `tp` ranks runs, with the whole vocabulary: token ids stay what they are."""
    return replace(
        model,
        heads=model.heads // tp,
        kv_heads=model.kv_heads // tp,
        intermediate_size=model.intermediate_size // tp,
    )


def rank_parameter_bytes(model: ModelConfig, tp: int, dtype: Dtype, quantization: Quantization) -> int:
    """Bytes of the parameters on one of `tp` ranks."""
    held = replace(rank_shape(model, tp), vocab_size=model.vocab_size // tp)
    return held.parameter_bytes(dtype, quantization)


def part_of(name: str, shape: tuple[int, ...], rank: int, tp: int) -> Part | None:
    """What `rank` of `tp` holds of the checkpoint's tensor `name`. None: zeros stand for it there, because it
    is added to what the ranks sum up and rank 0 has it."""
    layer, _, kind = name.rpartition(".")
    layer = layer.rpartition(".")[2]
    if tp == 1:
        return tuple(slice(0, extent) for extent in shape)
    if layer in _BY_ROWS:
        return (_share(shape[0], rank, tp), *(slice(0, extent) for extent in shape[1:]))
    if layer in _BY_COLUMNS and kind == "weight":
        return slice(0, shape[0]), _share(shape[1], rank, tp)
    if layer in _BY_COLUMNS and rank != 0:
        return None
    return tuple(slice(0, extent) for extent in shape)


def _share(extent: int, rank: int, tp: int) -> slice:
    size = extent // tp
    return slice(rank * size, (rank + 1) * size)
