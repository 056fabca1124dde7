"""`quantization_config` of config.json: quantised weights are refused by their method's name; a configuration
of the KV cache alone is not in the way."""

from pathlib import Path
from typing import Any

from services.engine.checkpoint.config_keys import shown
from services.engine.errors import CheckpointError


def check_quantization(raw: dict[str, Any], path: Path) -> None:
    """Raises CheckpointError unless the weights are plain numbers."""
    config = raw.get("quantization_config")
    if config is None:
        return
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: quantization_config is {shown(config)}; it must be an object")
    if _is_of_kv_alone(config):
        return
    method = config.get("quant_method") or config.get("quant_algo")
    raise CheckpointError(
        f"{path}: quantization_config: weights quantised by {method!r} are not supported; only float32, "
        "bfloat16 and float16 are (--quantization fp8 quantises such a checkpoint while it is loaded)"
    )


def _is_of_kv_alone(config: dict[str, Any]) -> bool:
    """compressed-tensors names no group of weights then, ModelOpt no algorithm for them."""
    if config.get("quant_method") == "compressed-tensors":
        return config.get("config_groups") == {} and config.get("kv_cache_scheme") is not None
    modelopt = config.get("quantization", config)
    named = isinstance(modelopt, dict) and modelopt.get("kv_cache_quant_algo") is not None
    return named and config.get("quant_method") == "modelopt" and modelopt.get("quant_algo") is None
