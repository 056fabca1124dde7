"""What the engine must know of a model, read from a Hugging Face directory into one frozen value.

Defaults, old spellings (`rope_scaling`) and per-family rules (which layers slide) are those the model was
published with (published_config.py). Nothing here needs torch: a memory plan is made from the values before
anything is loaded.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from services.config import Dtype, KvDtype, Quantization
from services.engine.errors import CheckpointError
from services.engine.published_config import FAMILIES, PublishedConfig, published_config

RopeKind = Literal["default", "linear", "llama3", "yarn"]
SUPPORTED_ARCHITECTURES = tuple(FAMILIES)
SUPPORTED_ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "llama3", "yarn")
LINEAR_SUFFIX = "_proj.weight"
"""How the names of the linear layers' matrices end, which are those that can be quantised."""
MAX_HEAD_DIM = 256
"""The attention kernels keep a tile of whole heads in registers and shared memory."""
_IGNORED_ROPE_KEYS = {"type", "partial_rotary_factor", "finetuned"}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding and how it is stretched (see rope.py). Unused fields keep their defaults."""

    kind: RopeKind
    theta: float
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of one decoder. `windows[i]` is layer i's sliding window in tokens, None for full attention."""

    model_dir: Path
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rms_norm_eps: float
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    max_model_len: int
    windows: tuple[int | None, ...]
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]

    def parameter_count(self) -> int:
        """Parameters as they lie in memory: a tied output matrix counts once, the vector that normalises
        query or key heads once for each head."""
        total = (self.heads + self.kv_heads - 2) * self.head_dim * self.layers if self.qk_norm else 0
        for shape in self.tensor_shapes().values():
            size = 1
            for extent in shape:
                size *= extent
            total += size
        return total

    def parameter_bytes(self, dtype: Dtype, quantization: Quantization = "none") -> int:
        """All parameters in `dtype`; with fp8, each matrix of a linear layer as one byte a number and one
        float32 a row."""
        total = self.parameter_count() * dtype_bytes(dtype)
        if quantization == "fp8":
            for name, shape in self.tensor_shapes().items():
                if name.endswith(LINEAR_SUFFIX):
                    rows, columns = shape
                    total -= rows * columns * (dtype_bytes(dtype) - 1) - rows * 4
        return total

    def kv_token_bytes(self, dtype: Dtype, kv_dtype: KvDtype = "auto") -> int:
        """Keys and values of one token over all layers."""
        number_bytes = 1 if kv_dtype == "fp8" else dtype_bytes(dtype)
        return self.layers * 2 * self.kv_heads * self.head_dim * number_bytes

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that is loaded, by its name in the checkpoint."""
        q_rows, kv_rows = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size)
        }
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            attention, mlp = prefix + "self_attn.", prefix + "mlp."
            shapes[prefix + "input_layernorm.weight"] = (self.hidden_size,)
            shapes[prefix + "post_attention_layernorm.weight"] = (self.hidden_size,)
            for name, rows in (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows)):
                shapes[f"{attention}{name}.weight"] = (rows, self.hidden_size)
                if self.qkv_bias:
                    shapes[f"{attention}{name}.bias"] = (rows,)
            shapes[attention + "o_proj.weight"] = (self.hidden_size, q_rows)
            if self.output_bias:
                shapes[attention + "o_proj.bias"] = (self.hidden_size,)
            if self.qk_norm:
                shapes[attention + "q_norm.weight"] = (self.head_dim,)
                shapes[attention + "k_norm.weight"] = (self.head_dim,)
            for name, rows, columns in (
                ("gate_proj", self.intermediate_size, self.hidden_size),
                ("up_proj", self.intermediate_size, self.hidden_size),
                ("down_proj", self.hidden_size, self.intermediate_size),
            ):
                shapes[f"{mlp}{name}.weight"] = (rows, columns)
                if self.mlp_bias:
                    shapes[f"{mlp}{name}.bias"] = (rows,)
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes


def dtype_bytes(dtype: Dtype) -> int:
    return 4 if dtype == "float32" else 2


def read_model_config(model_dir: Path) -> ModelConfig:
    """Read `config.json` and `generation_config.json`. Never fetches anything, never runs remote code.

    Raises `CheckpointError` if the directory does not hold a model that this engine can run.
    """
    path = model_dir / "config.json"
    raw = _read_json(path)
    architecture = _architecture(raw, path)
    if raw.get("quantization_config") is not None:
        raise CheckpointError(
            f"{path}: quantization_config is set; only checkpoints with float32, bfloat16, float16 weights "
            "are supported (--quantization fp8 quantises such a one while it is loaded)"
        )
    if raw.get("head_dim"):
        _check_head_dim(raw["head_dim"], path)

    try:
        config = published_config(raw, architecture)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return _from_published(model_dir, architecture, config, path)


def _from_published(model_dir: Path, architecture: str, config: PublishedConfig, path: Path) -> ModelConfig:
    if config.hidden_act != "silu":
        raise CheckpointError(f"{path}: hidden_act {config.hidden_act!r} is not supported (only 'silu')")
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads or heads
    if heads % kv_heads:
        raise CheckpointError(
            f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    head_dim = config.head_dim or config.hidden_size // heads
    _check_head_dim(head_dim, path)
    llama = architecture == "LlamaForCausalLM"
    bias = config.attention_bias and (llama or architecture == "Qwen3ForCausalLM")
    return ModelConfig(
        model_dir=model_dir,
        architecture=architecture,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=config.rms_norm_eps,
        qkv_bias=bias or architecture == "Qwen2ForCausalLM",
        output_bias=bias,
        mlp_bias=llama and config.mlp_bias,
        qk_norm=architecture == "Qwen3ForCausalLM",
        tied_embeddings=config.tie_word_embeddings,
        max_model_len=config.max_position_embeddings,
        windows=_windows(config, path),
        rope=_rope(config.rope(), path),
        eos_token_ids=_eos_token_ids(config.eos_token_id, model_dir, config.vocab_size),
    )


def _check_head_dim(head_dim: Any, path: Path) -> None:
    if not isinstance(head_dim, int) or head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        raise CheckpointError(
            f"{path}: head_dim {head_dim!r} is not supported (supported: even sizes from 2 to {MAX_HEAD_DIM})"
        )


def _windows(config: PublishedConfig, path: Path) -> tuple[int | None, ...]:
    """Mistral slides in every layer or in none; Qwen by `layer_types`; Llama never."""
    window, layers = config.window(), config.num_hidden_layers
    if window is None:
        return (None,) * layers
    kinds = config.sliding_layers()
    if len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise CheckpointError(
            f"{path}: layer_types must name 'full_attention' or 'sliding_attention' "
            f"for each of the {layers} layers"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(parameters: dict[str, Any], path: Path) -> RopeConfig:
    kind = parameters.pop("rope_type")
    if kind not in SUPPORTED_ROPE_KINDS:
        raise CheckpointError(
            f"{path}: rope type {kind!r} is not supported (supported: {', '.join(SUPPORTED_ROPE_KINDS)})"
        )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"{path}: partial_rotary_factor is not supported")
    renamed = {"rope_theta": "theta", "original_max_position_embeddings": "original_max_positions"}
    fields: dict[str, Any] = {"theta": 10000.0}
    for key, value in parameters.items():
        if key not in _IGNORED_ROPE_KEYS and value is not None:
            fields[renamed.get(key, key)] = value
    if kind != "default" and not (isinstance(fields.get("factor"), int | float) and fields["factor"] >= 1):
        raise CheckpointError(f"{path}: rope type {kind!r} needs a factor of at least 1")
    try:
        return RopeConfig(kind=kind, **fields)
    except TypeError as error:
        raise CheckpointError(f"{path}: rope parameters: {error}") from error


def _eos_token_ids(from_config: Any, model_dir: Path, vocab_size: int) -> tuple[int, ...]:
    """The end tokens of both files: chat models often name the end of a turn only in the second."""
    found: set[int] = set()
    sources = [("config.json", from_config)]
    generation = model_dir / "generation_config.json"
    if generation.exists():
        sources.append((generation.name, _read_json(generation).get("eos_token_id")))
    for name, value in sources:
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token in ids:
            if not isinstance(token, int) or not 0 <= token < vocab_size:
                raise CheckpointError(
                    f"{model_dir / name}: eos_token_id {token!r} is not a token below vocab_size {vocab_size}"
                )
            found.add(token)
    return tuple(sorted(found))


def _architecture(raw: Mapping[str, Any], path: Path) -> str:
    named = raw.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise CheckpointError(
            f"{path}: architecture {architecture!r} is not supported "
            f"(supported: {', '.join(SUPPORTED_ARCHITECTURES)})"
        )
    return str(architecture)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: not found; --model must be a Hugging Face model directory") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, holds {type(values).__name__}")
    return values
