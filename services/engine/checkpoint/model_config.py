"""What the engine must know of a model, read from a Hugging Face directory into one frozen value.

Defaults, old spellings (`rope_scaling`) and per-family rules (which layers slide) are those the model was
published with (published_config.py). Nothing here needs torch: a memory plan is made from the values before
anything is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.config import Dtype, KvDtype, Quantization
from services.engine.checkpoint.config_keys import check_config_keys, check_generation_keys, shown
from services.engine.checkpoint.end_tokens import read_end_tokens
from services.engine.checkpoint.json_files import read_json
from services.engine.checkpoint.output_matrix import stored_head
from services.engine.checkpoint.published_config import FAMILIES, PublishedConfig, published_config
from services.engine.checkpoint.quantization_config import check_quantization
from services.engine.checkpoint.rope_config import RopeConfig, read_rope
from services.engine.checkpoint.windows import read_windows
from services.engine.errors import CheckpointError

SUPPORTED_ARCHITECTURES = tuple(FAMILIES)
LINEAR_SUFFIX = "_proj.weight"
"""How the names of the linear layers' matrices end, which are those that can be quantised."""
MAX_HEAD_DIM = 256
"""The attention kernels keep a tile of whole heads in registers and shared memory."""
SILU = ("silu", "swish")
"""The names that transformers has for it."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of one decoder. `windows[i]` is layer i's sliding window in tokens, None for full attention.

    `tied_as_head`: the files hold the one tied matrix under the head's name. `mtp_layers` lie in the files
    behind the others and are not loaded. `notes` say, a line each, what of the files is passed over.
    """

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
    tied_as_head: bool = False
    mtp_layers: int = 0
    notes: tuple[str, ...] = ()

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
    """Read `config.json`, `generation_config.json`, and of the tokenizer's files what names its end token.
    Never fetches anything, never runs remote code.

    Raises `CheckpointError` if the directory does not hold a model that this engine can run.
    """
    path = model_dir / "config.json"
    raw = read_json(path)
    architecture = _architecture(raw, path)
    check_quantization(raw, path)
    notes = _unread(path, check_config_keys(raw, path))
    if raw.get("auto_map"):
        notes.append("config.json: auto_map names code of the checkpoint, which is not run")
    generation_path = model_dir / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    notes += _unread(generation_path, check_generation_keys(generation, generation_path))
    try:
        config = published_config(raw, architecture)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    model_type = FAMILIES[architecture][0]
    ends, passed_over = read_end_tokens(
        model_dir, model_type, config.vocab_size, config.eos_token_id, generation
    )
    return _from_published(model_dir, architecture, config, ends, [*notes, *passed_over])


def _unread(path: Path, keys: list[str]) -> list[str]:
    return [f"{path.name}: not read: {', '.join(keys)}"] if keys else []


def _from_published(
    model_dir: Path, architecture: str, config: PublishedConfig, ends: tuple[int, ...], notes: list[str]
) -> ModelConfig:
    path = model_dir / "config.json"
    if config.hidden_act not in SILU:
        raise CheckpointError(
            f"{path}: hidden_act {config.hidden_act!r} is not supported (supported: {', '.join(SILU)})"
        )
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads or heads
    if heads % kv_heads:
        raise CheckpointError(
            f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    head_dim = config.head_dim or config.hidden_size // heads
    if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        raise CheckpointError(
            f"{path}: head_dim {head_dim} is not supported (supported: even sizes from 2 to {MAX_HEAD_DIM})"
        )
    llama = architecture == "LlamaForCausalLM"
    bias = config.attention_bias and (llama or architecture == "Qwen3ForCausalLM")
    head = stored_head(model_dir) if config.tie_word_embeddings else "none"
    if head == "other":
        notes.append(
            "config.json: tie_word_embeddings is true, but lm_head.weight is another matrix, which is used"
        )
    if config.mtp_layers():
        notes.append(f"{config.mtp_layers()} layers that predict further tokens (MTP) are not used")
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
        tied_embeddings=config.tie_word_embeddings and head != "other",
        max_model_len=config.max_position_embeddings,
        windows=read_windows(config, path),
        rope=read_rope(config.rope(), path),
        eos_token_ids=ends,
        tied_as_head=head == "only",
        mtp_layers=config.mtp_layers(),
        notes=tuple(notes),
    )


def _architecture(raw: Mapping[str, Any], path: Path) -> str:
    """The first architecture that is known here; like transformers, by `model_type` where the file names none
    or the decoder without its head, which may be tied."""
    given = raw.get("architectures")
    named = [name for name in given if isinstance(name, str)] if isinstance(given, list) else []
    for name in named:
        if name in FAMILIES:
            return name
    for architecture, (model_type, _) in FAMILIES.items():
        decoder = architecture.removesuffix("ForCausalLM") + "Model"
        if raw.get("model_type") == model_type and (not given or decoder in named):
            return architecture
    raise CheckpointError(
        f"{path}: architecture {shown(named[0] if named else given)} is not supported "
        f"(supported: {', '.join(SUPPORTED_ARCHITECTURES)})"
    )
