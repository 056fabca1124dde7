"""Kernels compiled at the start: side by side and unlaunched, and all that a request can want."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from deploy.bench.engine.shapes import SHAPES
from services.engine.ops.launch_cache import cached_kernel, compiling_ahead
from services.protocol.messages import Sampling
from tests.engine.harness import Sequence, new_engine, prompt_of, run_together

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
PROMPTS = (1, 2, 3, 7, 16, 17, 60, 64, 65, 100, 128, 250, 300, 512, 513, 1000, 1024, 1500, 2048, 3000)
SAMPLINGS = (
    Sampling(max_tokens=1, seed=1, temperature=0.0),
    Sampling(max_tokens=1, seed=1, temperature=0.8),
    Sampling(max_tokens=1, seed=1, temperature=0.8, top_p=0.9, repetition_penalty=1.1, logprobs=5),
)


@cached_kernel
@triton.jit
def _double(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, 2 * tl.load(x_ptr + at, mask=at < count), mask=at < count)


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """Names of the kernels that are compiled, or read from the disk, from now on."""
    names: list[str] = []

    def listen(*, src: Any, **others: Any) -> None:
        names.append(src.name)

    former, triton.knobs.compilation.listener = triton.knobs.compilation.listener, listen
    yield names
    triton.knobs.compilation.listener = former


def test_a_rehearsal_compiles_and_launches_nothing(compiled: list[str]) -> None:
    x, y = torch.randn(300, device="cuda"), torch.zeros(300, device="cuda")
    with compiling_ahead():
        for block in (64, 128, 128):
            _double[(triton.cdiv(300, block),)](x, y, 300, BLOCK=block)
    assert compiled == ["_double", "_double"]
    assert not y.any()
    for block in (64, 128):
        y.zero_()
        _double[(triton.cdiv(300, block),)](x, y, 300, BLOCK=block)
        assert torch.equal(y, 2 * x)
    assert len(compiled) == 2


@pytest.mark.parametrize("options", [{}, {"kv_dtype": "fp8", "quantization": "fp8"}], ids=["bf16", "fp8"])
def test_no_request_waits_for_a_kernel(options: dict[str, str], compiled: list[str], tmp_path: Path) -> None:
    shape = dict(SHAPES["qwen3-8b"]) | {"num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    values = {"dtype": "bfloat16", "load_format": "dummy", "page_size_tokens": 64, "max_batch": 64}
    values |= {"max_chunk_tokens": 2048, "max_model_len": 4096, **options}
    engine = new_engine(tmp_path, device="cuda", **values)
    engine.load(lambda done_bytes, total_bytes: None)
    engine.measure_activations()
    engine.allocate_pool(1000)
    engine.capture_graphs()
    assert compiled
    compiled.clear()
    for length in PROMPTS:
        alone = [Sequence(prompt_of(length), list(range(64)), SAMPLINGS[0], chunk=2048)]
        run_together(engine, alone, 3)
        assert not compiled, f"a prompt of {length} tokens"
    for sampling in SAMPLINGS:
        pages = iter(range(1000))
        many = [
            Sequence(prompt_of(length), [next(pages) for _ in range(48)], sampling, chunk=2048)
            for length in PROMPTS
        ]
        run_together(engine, many, 5)
        assert not compiled, f"prompts together, {sampling}"
