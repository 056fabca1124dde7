"""The model whose shape is measured: one known by name, or the configuration of a checkpoint.

Only the shape counts, weights are random: a name stands for the fields of a published `config.json` that give
the shape.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.errors import UserError

SHAPES: dict[str, Mapping[str, Any]] = {
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "eos_token_id": 151645,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "eos_token_id": 151645,
    },
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "eos_token_id": 128001,
    },
}


def write_shape(wanted: str, directory: Path) -> Path:
    """A model directory for `wanted`: a name of `SHAPES`, a directory with a config.json, or such a file.

    A name's or a file's configuration is written into `directory`. Raises UserError, naming what is known.
    """
    if wanted in SHAPES:
        (directory / "config.json").write_text(json.dumps(SHAPES[wanted]))
        return directory
    place = Path(wanted).expanduser()
    if place.is_dir():
        return place
    try:
        (directory / "config.json").write_bytes(place.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"--model-config: {wanted!r} is neither a known model ({', '.join(SHAPES)}) "
            "nor a config.json or a directory that holds one"
        ) from None
    except OSError as error:
        raise UserError(f"--model-config: {wanted} cannot be read: {error.strerror}") from None
    return directory
