"""Frequencies of every rope kind against transformers' own functions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from services.engine.checkpoint.rope_config import read_rope
from services.engine.models.rope import inverse_frequencies, rotation
from services.engine.ops.rotary import rotate
from tests.checkpoints import LINEAR_ROPE, LLAMA3_ROPE, YARN_ROPE

HEAD_DIM = 64
VARIANTS: dict[str, dict[str, Any]] = {
    "linear": LINEAR_ROPE,
    "llama3": LLAMA3_ROPE,
    "llama3-published": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": YARN_ROPE,
    "yarn-qwen": {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
    "yarn-attention-factor": {**YARN_ROPE, "attention_factor": 0.7},
    "yarn-betas": {**YARN_ROPE, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    "yarn-mscale": {**YARN_ROPE, "mscale": 1.2, "mscale_all_dim": 0.8},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_frequencies_equal_transformers(name: str) -> None:
    parameters = VARIANTS[name]
    config = LlamaConfig(
        hidden_size=4 * HEAD_DIM, num_attention_heads=4, head_dim=HEAD_DIM, rope_parameters=dict(parameters)
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    found, factor = inverse_frequencies(read_rope(parameters, Path("config.json")), HEAD_DIM)
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected_factor)


def test_rotation_turns_each_pair_by_its_angle() -> None:
    """Against complex multiplication: dimension i and i + half are one complex number."""
    positions = torch.tensor([0, 1, 17, 4000])
    plain = read_rope({"rope_type": "default", "rope_theta": 10000.0}, Path("config.json"))
    frequencies, _ = inverse_frequencies(plain, HEAD_DIM)
    heads = torch.randn(4, 3, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    cos, sin = rotation(positions, frequencies, 1.0)
    half = HEAD_DIM // 2
    turned = torch.complex(heads[..., :half], heads[..., half:]) * torch.polar(
        torch.ones(4, 1, half), (positions[:, None] * frequencies)[:, None]
    )
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    assert torch.allclose(rotate(heads, cos, sin), expected, atol=1e-5)
