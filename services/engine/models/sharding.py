"""Which part of a model a worker's rank holds: tensor parallelism as in Megatron-LM (Shoeybi et al., 2019).

Query, key, value, gate and up projections are divided by rows, so that each rank has whole heads and whole
feed-forward units of its own; output and down projections by columns, so that what the ranks compute has
only to be summed. Norms are small and lie on every rank. What is divided by what is said by each tensor
(tensor_specs.py); here is what follows for the model.
"""

from dataclasses import replace
from math import gcd

from services.config import Dtype, Quantization
from services.engine.models.model_config import ModelConfig, dtype_bytes
from services.engine.models.tensor_specs import Units


class TensorParallelError(ValueError):
    """A model cannot be divided among so many ranks; the message says among how many it can."""


def allowed_tp(model: ModelConfig) -> list[int]:
    """How many ranks the model can be divided among."""
    common = gcd(*(units.count for units in _divided(model)))
    return [tp for tp in range(1, common + 1) if common % tp == 0]


def check_tp(model: ModelConfig, tp: int) -> None:
    """Raises `TensorParallelError` unless every rank gets whole heads and equal parts."""
    allowed = allowed_tp(model)
    if tp not in allowed:
        *most, last = [units.text for units in _divided(model)]
        raise TensorParallelError(
            f"--tp: {tp} does not divide this model's {', '.join(most)} and {last} "
            f"(allowed: {', '.join(map(str, allowed))})"
        )


def _divided(model: ModelConfig) -> list[Units]:
    """What the ranks divide, each once, the layers' first."""
    layers_first = sorted(model.tensors, key=lambda spec: spec.layer is None)
    found = (axis.units for spec in layers_first for axis in spec.axes)
    return list(dict.fromkeys(units for units in found if units is not None))


def rank_shape(model: ModelConfig, tp: int) -> ModelConfig:
    """The decoder that one of `tp` ranks runs, with the whole vocabulary: token ids stay what they are."""
    return replace(model, heads=model.heads // tp, kv_heads=model.kv_heads // tp)


def rank_parameter_bytes(model: ModelConfig, tp: int, dtype: Dtype, quantization: Quantization) -> int:
    """Bytes of the parameters on one of `tp` ranks. `model` is whole."""
    number_bytes, fp8 = dtype_bytes(dtype), quantization == "fp8"
    return sum(spec.rank_bytes(number_bytes, fp8, tp) for spec in model.tensors)
