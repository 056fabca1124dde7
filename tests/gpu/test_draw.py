"""Drawing tokens with the kernels compiled, at vocabularies of real models; and captured in a CUDA graph."""

import pytest
import torch

from services.engine.sampling.sample_kernels import best_tokens, sample_tokens, sample_tokens_kernel
from tests.engine.sampling import test_sample_kernels as samples

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [151936, 50257, 262144, 1000, 130])
@pytest.mark.parametrize("candidates", [4096, 64])
def test_draws(dtype: torch.dtype, vocab: int, candidates: int) -> None:
    logits = samples.some_logits(5, vocab, dtype, CUDA)
    rows = [at % 5 for at in range(5 * len(samples.SETTINGS))]
    samples.check_samples(logits, rows, list(samples.SETTINGS) * 5, candidates=candidates)
    samples.check_best(logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draw_depends_on_its_row_alone(dtype: torch.dtype) -> None:
    samples.check_independence(samples.some_logits(5, 151936, dtype, CUDA), repeats=15)


def test_no_token_is_drawn_from_what_is_no_distribution() -> None:
    samples.check_hostile(CUDA)
    samples.check_hostile(CUDA, candidates=64)


def test_a_captured_draw_follows_its_inputs() -> None:
    logits = torch.zeros((5, 151936), dtype=torch.bfloat16, device=CUDA)
    settings = list(samples.SETTINGS)
    rows = torch.zeros(len(settings), dtype=torch.int32, device=CUDA)
    given = samples.columns(settings, CUDA)
    sample_tokens(logits, rows, **given)  # compiles
    best_tokens(logits, rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sample_tokens(logits, rows, **given)
        best = best_tokens(logits, rows)
    for seed in range(3):
        logits.copy_(samples.some_logits(5, 151936, torch.bfloat16, CUDA, seed))
        rows.copy_(torch.arange(len(settings)) * (seed + 1) % 5)
        shuffled = torch.randperm(len(settings), generator=torch.Generator().manual_seed(seed))
        for values in given.values():
            values.copy_(values[shuffled.to(CUDA)])
        graph.replay()
        assert torch.equal(tokens, sample_tokens_kernel(logits, rows, **given))
        assert torch.equal(best, logits.argmax(dim=-1)[rows.long()])
