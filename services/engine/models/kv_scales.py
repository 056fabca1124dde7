"""The scales of an fp8 KV cache: one for each layer, keys or values, and head, known before any request.

They come from the checkpoint alone, so that a prefill and a decode worker with the same model have the same
ones without a word, and a request's KV is the same bytes wherever it is computed. Where the checkpoint
brings calibrated scales, those count. Otherwise a scale is the least power of two with which nothing that
the weights can produce exceeds 448:

- A normed input `u * g` has `|u| <= sqrt(hidden)`, so row `w` of a projection gives at most
  `sqrt(hidden) * |w * g| + |bias|` (Cauchy-Schwarz).
- A key head that is normed once more with weights `w` has, in each pair of numbers that is rotated together,
  at most `sqrt(head_dim) * max|w|`, whatever came before.
- A rotation keeps a pair's length, up to the factor of the embedding.

The bound lies some six binades above a typical number, and e4m3 has fifteen in which it is equally precise:
it costs next to nothing. A power of two, because then the last digits of the bound, which differ between
devices, do not matter.
"""

import math

import torch
from safetensors import safe_open
from torch import Tensor

from services.engine.checkpoint.safetensors_files import read_checkpoint_files
from services.engine.errors import CheckpointError
from services.engine.models.model_config import ModelConfig
from services.engine.models.parameters import Parameters
from services.engine.models.rope import inverse_frequencies
from services.engine.models.tensor_names import kv_scales_of
from services.engine.ops.fp8 import FP8_MAX
from services.engine.rank_group import RankGroup


def kv_scales(model: ModelConfig, parameters: Parameters, with_stored: bool) -> Tensor:
    """float32 `[layers, 2, kv_heads]` on the parameters' device, keys first. `model` is the rank's shape.

    `with_stored`: whether there are weight files to look for scales in. Raises `CheckpointError` for one that
    cannot be used.
    """
    scales = torch.stack([_bounds(model, parameters, layer) for layer in range(model.layers)]).cpu()
    scales = torch.exp2(torch.ceil(torch.log2((scales / FP8_MAX).clamp(2.0**-60, 2.0**60))))
    if with_stored:
        _take_stored(model, scales, parameters.group)
    return scales.float().to(parameters.device)


def _bounds(model: ModelConfig, parameters: Parameters, layer: int) -> Tensor:
    """What keys and values of one layer cannot exceed, float64 `[2, kv_heads]`."""
    prefix = f"model.layers.{layer}."
    factor = inverse_frequencies(model.rope, model.head_dim)[1]
    values = _rows(model, parameters, prefix, "v_proj").amax(dim=1)
    norm = prefix + "self_attn.k_norm.weight"
    if parameters.has(norm):
        largest = parameters.values(norm).abs().max()
        keys = (math.sqrt(model.head_dim) * largest).expand(model.kv_heads)
    else:
        first, second = _rows(model, parameters, prefix, "k_proj").chunk(2, dim=1)
        keys = torch.hypot(first, second).amax(dim=1)
    return torch.stack((keys * factor, values))


def _rows(model: ModelConfig, parameters: Parameters, prefix: str, part: str) -> Tensor:
    """Bounds of a projection's numbers before any rotation, float64 `[kv_heads, head_dim]`."""
    weight = parameters.values(f"{prefix}self_attn.{part}.weight")
    normed = weight * parameters.values(prefix + "input_layernorm.weight")
    bound = math.sqrt(model.hidden_size) * torch.linalg.vector_norm(normed, dim=1)
    bias = f"{prefix}self_attn.{part}.bias"
    if parameters.has(bias):
        bound += parameters.values(bias).abs()
    heads: Tensor = bound.view(model.kv_heads, model.head_dim)
    return heads


def _take_stored(model: ModelConfig, scales: Tensor, group: RankGroup) -> None:
    all_heads = model.kv_heads * group.size
    taken: dict[tuple[int, int], str] = {}
    for file in read_checkpoint_files(model.model_dir):
        named = [tensor.name for tensor in file.tensors if kv_scales_of(tensor.name, model)]
        if not named:
            continue
        with safe_open(file.path, framework="pt", device="cpu") as stored:
            for name in named:
                values = _checked(stored.get_tensor(name), all_heads, f"{file.path}: tensor {name}")
                if values.numel() > 1:
                    values = values.chunk(group.size)[group.rank]
                for layer, kind in kv_scales_of(name, model):
                    if (layer, kind) in taken:
                        raise CheckpointError(
                            f"{file.path}: {name} and {taken[layer, kind]} are the same scale"
                        )
                    taken[layer, kind] = name
                    scales[layer, kind] = values


def _checked(stored: Tensor, all_heads: int, what: str) -> Tensor:
    values = stored.double().flatten()
    if values.numel() not in (1, all_heads) or not bool((values > 0).all()):
        raise CheckpointError(
            f"{what} must hold one positive scale, or one for each of the {all_heads} KV heads"
        )
    if not bool(values.isfinite().all()):
        raise CheckpointError(f"{what} is not finite")
    return values
