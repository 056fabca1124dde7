"""What the engine must know of a model, read from a Hugging Face directory into one frozen value.

Defaults, old spellings (`rope_scaling`) and per-family rules (which layers slide) are those the model was
published with (published_config.py and the family's file). Nothing here needs torch: a memory plan is made
from the values before anything is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from services.config import Dtype, KvDtype, Quantization
from services.engine.checkpoint.config_keys import check_config_keys, check_generation_keys, shown
from services.engine.checkpoint.end_tokens import read_end_tokens
from services.engine.checkpoint.json_files import read_json
from services.engine.checkpoint.output_matrix import stored_head
from services.engine.checkpoint.published_config import PublishedConfig, published_config
from services.engine.checkpoint.quantization_config import check_quantization
from services.engine.checkpoint.rope_config import RopeConfig, read_rope
from services.engine.checkpoint.windows import read_windows
from services.engine.errors import CheckpointError
from services.engine.models.family import Family
from services.engine.models.registry import FAMILIES
from services.engine.models.tensor_specs import TensorSpec, outer_tensors

MAX_HEAD_DIM = 256
"""The attention kernels keep a tile of whole heads in registers and shared memory."""
SILU = ("silu", "swish")
"""The names that transformers has for it."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of one decoder, and the family that it is of.

    `windows[i]` is layer i's sliding window in tokens, None for full attention.
    `tied_as_head`: the files hold the one tied matrix under the head's name. `mtp_layers` lie in the files
    behind the others and are not loaded. `notes` say, a line each, what of the files is passed over.
    `published` is the file's own text, for what the family's layers alone have to know.
    """

    model_dir: Path
    architecture: str
    family: Family[Any]
    published: PublishedConfig
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rms_norm_eps: float
    tied_embeddings: bool
    max_model_len: int
    windows: tuple[int | None, ...]
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]
    tied_as_head: bool = False
    mtp_layers: int = 0
    notes: tuple[str, ...] = ()

    @cached_property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Every tensor of the whole model that is loaded."""
        embedding, norm, output = outer_tensors(self.vocab_size, self.hidden_size)
        found = [embedding]
        for layer in range(self.layers):
            found += self.family.layer_tensors(self.published, layer)
        return (*found, norm) if self.tied_embeddings else (*found, norm, output)

    def layers_of_every_kind(self) -> int:
        """How many of the first layers hold one of each kind that takes memory of its own in a step: by their
        tensors, and with full attention if any has it. At least two, where there are two."""
        first: dict[tuple[tuple[int, ...], ...], int] = {}
        for layer in range(self.layers):
            first.setdefault(tuple(spec.shape for spec in self.tensors if spec.layer == layer), layer)
        full = self.windows.index(None) if None in self.windows else 0
        return min(self.layers, max(1, full, *first.values()) + 1)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Their shapes by their names in the checkpoint."""
        return {spec.name: spec.shape for spec in self.tensors}

    def parameter_count(self) -> int:
        """Parameters as they lie in memory: a tied output matrix counts once, the vector that normalises
        query or key heads once for each head."""
        return sum(spec.rank_bytes(1, fp8=False) for spec in self.tensors)

    def parameter_bytes(self, dtype: Dtype, quantization: Quantization = "none") -> int:
        """All parameters in `dtype`; with fp8, each matrix of a linear layer as one byte a number and one
        float32 a row."""
        number_bytes, fp8 = dtype_bytes(dtype), quantization == "fp8"
        return sum(spec.rank_bytes(number_bytes, fp8) for spec in self.tensors)

    def kv_token_bytes(self, dtype: Dtype, kv_dtype: KvDtype = "auto") -> int:
        """Keys and values of one token over all layers."""
        number_bytes = 1 if kv_dtype == "fp8" else dtype_bytes(dtype)
        return self.layers * 2 * self.kv_heads * self.head_dim * number_bytes


def dtype_bytes(dtype: Dtype) -> int:
    return 4 if dtype == "float32" else 2


def read_model_config(model_dir: Path) -> ModelConfig:
    """Read `config.json`, `generation_config.json`, and of the tokenizer's files what names its end token.
    Never fetches anything, never runs remote code.

    Raises `CheckpointError` if the directory does not hold a model that this engine can run.
    """
    path = model_dir / "config.json"
    raw = read_json(path)
    family = _family(raw, path)
    check_quantization(raw, path)
    notes = _unread(path, check_config_keys(raw, family.own_keys, path))
    if raw.get("auto_map"):
        notes.append("config.json: auto_map names code of the checkpoint, which is not run")
    generation_path = model_dir / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    notes += _unread(generation_path, check_generation_keys(generation, generation_path))
    try:
        config = published_config(raw, family.config)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    ends, passed_over = read_end_tokens(
        model_dir, family.tokenizer_class, config.vocab_size, config.eos_token_id, generation
    )
    return _from_published(model_dir, family, config, ends, [*notes, *passed_over])


def _unread(path: Path, keys: list[str]) -> list[str]:
    return [f"{path.name}: not read: {', '.join(keys)}"] if keys else []


def _from_published(
    model_dir: Path, family: Family[Any], config: PublishedConfig, ends: tuple[int, ...], notes: list[str]
) -> ModelConfig:
    path = model_dir / "config.json"
    if config.hidden_act not in SILU:
        raise CheckpointError(
            f"{path}: hidden_act {config.hidden_act!r} is not supported (supported: {', '.join(SILU)})"
        )
    heads = config.num_attention_heads
    kv_heads = config.kv_heads()
    if heads % kv_heads:
        raise CheckpointError(
            f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    head_dim = config.head_size()
    if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        raise CheckpointError(
            f"{path}: head_dim {head_dim} is not supported (supported: even sizes from 2 to {MAX_HEAD_DIM})"
        )
    head = stored_head(model_dir) if config.tie_word_embeddings else "none"
    if head == "other":
        notes.append(
            "config.json: tie_word_embeddings is true, but lm_head.weight is another matrix, which is used"
        )
    if config.mtp_layers():
        notes.append(f"{config.mtp_layers()} layers that predict further tokens (MTP) are not used")
    return ModelConfig(
        model_dir=model_dir,
        architecture=family.architecture,
        family=family,
        published=config,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=config.rms_norm_eps,
        tied_embeddings=config.tie_word_embeddings and head != "other",
        max_model_len=config.max_position_embeddings,
        windows=read_windows(config, path, family.name, family.full_attention_only),
        rope=read_rope(config.rope(), path),
        eos_token_ids=ends,
        tied_as_head=head == "only",
        mtp_layers=config.mtp_layers(),
        notes=tuple(notes),
    )


def _family(raw: Mapping[str, Any], path: Path) -> Family[Any]:
    """That of the first architecture that is known here; like transformers, by `model_type` where the file
    names none or the decoder without its head, which may be tied."""
    given = raw.get("architectures")
    named = [name for name in given if isinstance(name, str)] if isinstance(given, list) else []
    family = next((FAMILIES[name] for name in named if name in FAMILIES), None)
    if family is None:
        for other in FAMILIES.values():
            if raw.get("model_type") == other.model_type and (not given or f"{other.name}Model" in named):
                return other
        raise CheckpointError(
            f"{path}: architecture {shown(named[0] if named else given)} is not supported "
            f"(supported: {', '.join(FAMILIES)})"
        )
    if raw.get("model_type", family.model_type) != family.model_type:
        raise CheckpointError(
            f"{path}: model_type is {raw['model_type']!r}, but {family.model_type!r} goes with "
            f"{family.architecture}"
        )
    return family
