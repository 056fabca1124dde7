"""fp8 on a GPU: the kernels compiled, the product of cuBLAS, and engines against those on a CPU."""

from pathlib import Path

import pytest
import torch

from services.engine.kv.layout import KvLayout
from services.engine.models.linear import Fp8Linear, fp8_product
from services.engine.ops.fp8 import FP8, quantise_rows_kernel, quantise_rows_reference
from services.protocol.messages import Sampling
from tests.checkpoints import FAMILIES, Family, make_checkpoint
from tests.engine.harness import Sequence, packed, prompt_of, run_together, start_engine, unpacked
from tests.engine.ops import test_fp8_kernels as kernels
from tests.engine.ops.test_kernels import random

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CUDA = torch.device("cuda")
SAMPLED = Sampling(max_tokens=1, seed=11, temperature=0.9, top_p=0.95)


@pytest.mark.parametrize(("rows", "size"), [(1, 4096), (300, 12288), (17, 896)])
def test_quantise(rows: int, size: int) -> None:
    kernels.check_quantise(CUDA, rows, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantising_rounds_as_the_reference_does(dtype: torch.dtype) -> None:
    x = (random(100, 5120) * torch.logspace(-6, 4, 100)[:, None]).to(dtype)
    expected, scale = quantise_rows_reference(x)
    found, found_scale = quantise_rows_kernel(x.cuda())
    assert torch.equal(found_scale.cpu(), scale)
    assert torch.equal(found.cpu().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (14, 2, 64), (6, 3, 96)])
def test_write(heads: int, kv_heads: int, head_dim: int) -> None:
    layout = KvLayout(layers=3, kv_heads=kv_heads, page_size_tokens=16, head_dim=head_dim)
    kernels.check_write(CUDA, 333, heads, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("splits", [1, 3, 16])
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("window", [None, 100])
def test_decode(dtype: torch.dtype, splits: int, page_size: int, window: int | None) -> None:
    layout = KvLayout(layers=2, kv_heads=8, page_size_tokens=page_size, head_dim=128)
    kernels.check_decode(dtype, CUDA, [1, 0, 2047, 640, 65], 32, layout, window, splits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(14, 2, 64), (9, 3, 32), (4, 4, 96), (16, 2, 256), (4, 2, 8)]
)
def test_shapes(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> None:
    layout = KvLayout(layers=2, kv_heads=kv_heads, page_size_tokens=16, head_dim=head_dim)
    kernels.check_decode(dtype, CUDA, [5, 1000, 77], heads, layout, None, 4)
    kernels.check_prefill(dtype, CUDA, [(0, 200), (300, 77)], heads, layout, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("window", [None, 100])
def test_prefill(dtype: torch.dtype, page_size: int, window: int | None) -> None:
    layout = KvLayout(layers=2, kv_heads=8, page_size_tokens=page_size, head_dim=128)
    chunks = [(0, 700), (1000, 333), (64, 64), (511, 1), (0, 1)]
    kernels.check_prefill(dtype, CUDA, chunks, 32, layout, window)


@pytest.mark.parametrize("seed", range(3))
def test_segments(seed: int) -> None:
    layout = KvLayout(layers=5, kv_heads=8, page_size_tokens=16, head_dim=128)
    kernels.check_segments(CUDA, layout, seed, largest=500)


@pytest.mark.parametrize("tokens", [1, 3, 64, 333])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(6144, 4096), (4096, 12288), (1152, 896)])
def test_product(tokens: int, bias: bool, rows: int, columns: int) -> None:
    """cuBLAS sums the same products, in another order and with fewer bits between: see `use_fast_accum`."""
    x = random(tokens, columns, dtype=torch.bfloat16, device=CUDA)
    weight, scale = quantise_rows_kernel(random(rows, columns, device=CUDA) * columns**-0.5)
    added = random(rows, dtype=torch.bfloat16, device=CUDA) if bias else None
    found = Fp8Linear(weight, scale, added).forward(x)
    quantised, x_scale = quantise_rows_kernel(x)
    expected = fp8_product(quantised, x_scale, weight, scale, added, torch.float32)
    assert (found.dtype, found.shape) == (torch.bfloat16, (tokens, rows))
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_as_on_the_cpu(family: Family, tmp_path: Path) -> None:
    """In float32 with a KV cache of fp8; a last digit that rounds otherwise may move a logit by some 0.01,
    which these weights, whose logits lie well apart, let pass."""
    make_checkpoint(family, tmp_path, seed=3, eos=False)
    outputs = []
    for device in ("cpu", "cuda"):
        engine = start_engine(tmp_path, device=device, kv_dtype="fp8")
        assert engine.pool.data.dtype == FP8
        engine.capture_graphs()
        sequences = [
            Sequence(prompt_of(23), list(range(9)), chunk=7),
            Sequence(prompt_of(40), list(range(20, 34))),
        ]
        outputs.append(run_together(engine, sequences, 10))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_graphs_and_prefill_run_with_everything_in_fp8(family: Family, kv_dtype: str, tmp_path: Path) -> None:
    """Replayed steps are those that were captured: the same tokens with and without graphs."""
    make_checkpoint(family, tmp_path, seed=4, eos=False)
    options = {"device": "cuda", "dtype": "bfloat16", "kv_dtype": kv_dtype, "quantization": "fp8"}
    outputs = []
    for graphs in (False, True):
        engine = start_engine(tmp_path, **options)
        if graphs:
            assert (engine.capture_graphs() > 0) == engine.model.family.captures_graphs
        sequences = [Sequence(prompt_of(30), list(range(12)), SAMPLED, chunk=7)]
        outputs.append(run_together(engine, sequences, 16))
    assert outputs[0] == outputs[1]


def test_segments_pass_between_devices(tmp_path: Path) -> None:
    make_checkpoint("qwen3", tmp_path, eos=False)
    gpu = start_engine(tmp_path, device="cuda", kv_dtype="fp8")
    cpu = start_engine(tmp_path, kv_dtype="fp8", page_size_tokens=16)
    assert gpu.geometry == cpu.geometry
    assert gpu.pool.scales is not None and cpu.pool.scales is not None
    assert torch.equal(gpu.pool.scales.cpu(), cpu.pool.scales)
    sequence = Sequence(prompt_of(30), list(range(10)))
    sequence.take(gpu.execute([sequence.next_row()])[0])
    slot = torch.zeros(1 << 16, dtype=torch.uint8, device="cuda")
    byte_count, digest = packed(gpu, sequence.pages, 3, 27, slot, True)
    on_host = slot.cpu()
    unpacked(cpu, [4, 5], 3, 27, on_host, digest)
    again = torch.zeros(1 << 16, dtype=torch.uint8)
    assert packed(cpu, [4, 5], 3, 27, again, True) == (byte_count, digest)
    assert torch.equal(again, on_host)
