"""The rotary embedding that a `config.json` asks for, under any of the names it had over the years."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from services.engine.checkpoint.config_keys import shown
from services.engine.errors import CheckpointError

RopeKind = Literal["default", "linear", "llama3", "yarn"]
SUPPORTED_ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "llama3", "yarn")

_POSITIVE = {
    "rope_theta": "theta",
    "factor": "factor",
    "original_max_position_embeddings": "original_max_positions",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
"""Numbers above 0, and the field each becomes."""
_ABSENT_IF_ZERO = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
_NEEDED: dict[RopeKind, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_IGNORED = {"rope_type", "type", "finetuned", "mrope_section", "mrope_interleaved"}
"""`mrope_*` divides frequencies between the axes of pictures; a text's positions are the same on all."""
_ONLY_ONE = ("partial_rotary_factor", "attn_factor", "extrapolation_factor")
"""Refused unless 1: transformers passes over the last two, other code multiplies by them."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding and how it is stretched (see rope.py). Unused fields keep their defaults."""

    kind: RopeKind
    theta: float
    factor: float = 1.0
    original_max_positions: float = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


def read_rope(parameters: Mapping[str, Any], path: Path) -> RopeConfig:
    """From `rope_parameters` in the new spelling. Raises CheckpointError naming the key at fault."""
    kind = parameters["rope_type"]
    nested = sorted(key for key in parameters if key.endswith("_attention"))
    if nested:
        raise CheckpointError(
            f"{path}: rope_parameters has one entry for each kind of layer ({', '.join(nested)}), which is "
            "not supported; these families have one rotary embedding for all layers"
        )
    if kind not in SUPPORTED_ROPE_KINDS:
        raise CheckpointError(
            f"{path}: rope type {kind!r} is not supported (supported: {', '.join(SUPPORTED_ROPE_KINDS)})"
        )
    for key in _ONLY_ONE:
        if parameters.get(key) not in (None, 1):
            raise CheckpointError(
                f"{path}: {key} is {shown(parameters[key])}, which is not supported; it must be 1"
            )
    for key in _NEEDED[kind]:
        if parameters.get(key) is None:
            raise CheckpointError(f"{path}: rope type {kind!r} needs a {key}")
    unknown = sorted(parameters.keys() - _POSITIVE.keys() - _IGNORED - {*_ONLY_ONE, "truncate"})
    if unknown:
        raise CheckpointError(f"{path}: rope_parameters: {unknown[0]} is not supported")
    fields = {
        field: _number(parameters, key, path) for key, field in _POSITIVE.items() if _given(parameters, key)
    }
    if kind != "default" and fields["factor"] < 1:
        raise CheckpointError(
            f"{path}: rope type {kind!r} needs a factor of at least 1, not {fields['factor']:g}"
        )
    if kind == "llama3" and fields["high_freq_factor"] <= fields["low_freq_factor"]:
        raise CheckpointError(f"{path}: high_freq_factor must be above low_freq_factor")
    truncate = parameters.get("truncate", True)  # null is false in transformers
    if truncate is not None and not isinstance(truncate, bool):
        raise CheckpointError(f"{path}: truncate is {shown(truncate)}; it must be true or false")
    return RopeConfig(kind=kind, truncate=bool(truncate), **fields)


def _given(parameters: Mapping[str, Any], key: str) -> bool:
    """Null is absent, but for rope_theta, which has a default only where the key is not there."""
    if parameters.get(key) is None:
        return key == "rope_theta"
    return not (key in _ABSENT_IF_ZERO and parameters[key] == 0)


def _number(parameters: Mapping[str, Any], key: str, path: Path) -> float:
    value = parameters[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise CheckpointError(f"{path}: {key} is {shown(value)}; it must be a number above 0")
    return value
