"""The names that checkpoints have for a model's tensors, and those that are passed over."""

import re

from services.engine.models.model_config import ModelConfig
from services.engine.models.tensor_specs import EMBEDDING, OUTPUT

_BASE = "model."
_LAYER = re.compile(r"(?:model\.)?layers\.(?P<layer>\d{1,4})\.")
_MTP = re.compile(r"(?:model\.)?mtp(?:_layers)?\.")
_KV_SCALE = re.compile(
    r"(?:model\.)?layers\.(?P<layer>\d{1,4})\.self_attn\."
    r"(?:(?:(?:[kv]_proj|attn|qkv_proj)\.)?(?P<kind>[kv])_scale|(?P<projection>[kv])_proj\.output_scale"
    r"|(?:attn\.)?(?P<both>kv)_scale)"
)
_OTHER_SCALE = re.compile(r".*\.self_attn\.(?:(?:q_proj|attn)\.)?(?:q|prob|prob_output|q_proj\.output)_scale")
"""Of queries and probabilities in fp8, which stay as they are here."""


def own_name(stored: str, model: ModelConfig) -> str:
    """The model's name for a stored tensor. Like transformers: with or without the base model's prefix, and a
    tied matrix under either of its names."""
    if model.tied_as_head and stored in (OUTPUT, _BASE + OUTPUT):
        return EMBEDDING
    if stored == _BASE + OUTPUT:
        return OUTPUT
    return stored if stored.startswith((_BASE, OUTPUT)) else _BASE + stored


def is_passed_over(stored: str, model: ModelConfig) -> bool:
    """Old exporters stored the rotary table, and a copy of a tied output matrix; some store scales for a KV
    cache of fp8, which is not always asked for, and layers that predict further tokens."""
    if own_name(stored, model) == OUTPUT:
        return model.tied_embeddings
    if stored.endswith("rotary_emb.inv_freq") or _OTHER_SCALE.fullmatch(stored):
        return True
    return is_mtp(stored, model) or bool(kv_scales_of(stored, model))


def is_mtp(stored: str, model: ModelConfig) -> bool:
    """Whether it belongs to the layers for further tokens that the configuration announces, which lie behind
    the model's own or under a name of theirs."""
    if not model.mtp_layers:
        return False
    match = _LAYER.match(stored)
    if match is None:
        return _MTP.match(stored) is not None
    return model.layers <= int(match["layer"]) < model.layers + model.mtp_layers


def kv_scales_of(stored: str, model: ModelConfig) -> list[tuple[int, int]]:
    """`(layer, 0 for keys or 1 for values)` for each that a calibrated scale of the KV cache is of; none if
    `stored` is not the name of one, in any of the spellings that exporters use."""
    match = _KV_SCALE.fullmatch(stored)
    if match is None or int(match["layer"]) >= model.layers:
        return []
    layer, kind = int(match["layer"]), match["kind"] or match["projection"]
    return [(layer, 0), (layer, 1)] if match["both"] else [(layer, 0 if kind == "k" else 1)]
