"""The kernels against their references, compiled, at sizes of real models; and captured in a CUDA graph."""

import pytest
import torch

from services.engine.attention.decode_attention import decode_attention, decode_attention_reference
from services.engine.kv.layout import KvLayout
from tests.engine.ops import test_kernels as kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DTYPES = [torch.float32, torch.bfloat16]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "size"), [(1, 4096), (300, 5120), (17, 896)])
def test_norms(dtype: torch.dtype, tokens: int, size: int) -> None:
    kernels.check_norms(dtype, CUDA, tokens, size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_head_norm(dtype: torch.dtype, head_dim: int) -> None:
    kernels.check_head_norm(dtype, CUDA, 130, 40, head_dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "size"), [(1, 12288), (513, 4864)])
def test_swiglu(dtype: torch.dtype, tokens: int, size: int) -> None:
    kernels.check_swiglu(dtype, CUDA, tokens, size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (14, 2, 64), (6, 3, 96)])
def test_qkv(dtype: torch.dtype, norm: bool, heads: int, kv_heads: int, head_dim: int) -> None:
    layout = KvLayout(layers=3, kv_heads=kv_heads, page_size_tokens=16, head_dim=head_dim)
    kernels.check_qkv(dtype, CUDA, 333, heads, layout, norm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 3, 16])
@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("window", [None, 100])
def test_decode_page_sizes(dtype: torch.dtype, splits: int, page_size: int, window: int | None) -> None:
    layout = KvLayout(layers=2, kv_heads=8, page_size_tokens=page_size, head_dim=128)
    kernels.check_decode(dtype, CUDA, [1, 0, 2047, 640, 65], 32, layout, window, splits, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(14, 2, 64), (9, 3, 32), (4, 4, 96), (16, 2, 256), (4, 2, 8)]
)
def test_decode_shapes(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> None:
    layout = KvLayout(layers=2, kv_heads=kv_heads, page_size_tokens=16, head_dim=head_dim)
    kernels.check_decode(dtype, CUDA, [5, 1000, 77], heads, layout, None, 4, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("window", [None, 100])
def test_prefill_page_sizes(dtype: torch.dtype, page_size: int, window: int | None) -> None:
    layout = KvLayout(layers=2, kv_heads=8, page_size_tokens=page_size, head_dim=128)
    chunks = [(0, 700), (1000, 333), (64, 64), (511, 1), (0, 1)]
    kernels.check_prefill(dtype, CUDA, chunks, 32, layout, window, None, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(14, 2, 64), (9, 3, 32), (4, 4, 96), (16, 2, 256), (4, 2, 8)]
)
def test_prefill_shapes(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> None:
    layout = KvLayout(layers=2, kv_heads=kv_heads, page_size_tokens=16, head_dim=head_dim)
    kernels.check_prefill(dtype, CUDA, [(0, 200), (300, 77)], heads, layout, None, None, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(32, 8, 128), (8, 8, 64), (64, 1, 128), (16, 8, 128), (4, 2, 64)]
)
def test_the_prefill_that_the_device_prefers(
    dtype: torch.dtype, page_size: int, heads: int, kv_heads: int, head_dim: int
) -> None:
    layout = KvLayout(layers=2, kv_heads=kv_heads, page_size_tokens=page_size, head_dim=head_dim)
    chunks = [(0, 700), (1000, 333), (64, 64), (511, 1), (0, 1), (3, 129), (127, 2)]
    kernels.check_prefill(dtype, CUDA, chunks, heads, layout, None, None, None, dispatched=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(6))
def test_segments(dtype: torch.dtype, seed: int) -> None:
    layout = KvLayout(layers=5, kv_heads=8, page_size_tokens=(16, 64)[seed % 2], head_dim=128)
    kernels.check_segments(dtype, CUDA, layout, seed, largest=500)


@pytest.mark.parametrize("splits", [1, 8])
def test_a_captured_decode_follows_lengths_and_pages(splits: int) -> None:
    layout = KvLayout(layers=2, kv_heads=8, page_size_tokens=16, head_dim=128)
    pool = kernels.filled_pool(layout, 64, torch.bfloat16, CUDA)
    queries = kernels.random(2, 32, 128, dtype=torch.bfloat16, device=CUDA)
    tables = torch.zeros((2, 40), dtype=torch.int32, device=CUDA)
    lengths = torch.ones(2, dtype=torch.int32, device=CUDA)
    arguments = (queries, pool, 1, tables, lengths, 128**-0.5, None)

    decode_attention(*arguments, splits)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = decode_attention(*arguments, splits)
    for seed, now in enumerate(([1, 2], [640, 0], [17, 333])):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:40]
        tables.copy_(torch.stack((order, order.flip(0))))
        lengths.copy_(torch.tensor(now))
        graph.replay()
        kernels.same(found, decode_attention_reference(*arguments), 0.25)


@pytest.mark.parametrize("words", [1, 4096, 100_003, 1 << 20])
def test_checksums(words: int) -> None:
    kernels.check_checksum(CUDA, words)
