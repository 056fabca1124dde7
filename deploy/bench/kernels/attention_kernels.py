"""How fast the kernels are at the shape of Qwen3-8B in bfloat16: `python -m
deploy.bench.kernels.attention_kernels --out FILE`.

Each measurement replays a CUDA graph in which the kernel runs once for every layer, on that layer's part
of the pool, so that no launch finds its keys and values in the cache. The norm, SwiGLU and qkv kernels work
on one set of activations, as they do in a model: at small batches these come from the second-level cache,
and their rates may pass the memory's.
"""

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import msgspec
import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from deploy.bench.kernels.kernel_layouts import bench_layouts
from deploy.bench.kernels.kernel_times import (
    CUDA,
    DTYPE,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    LAYERS,
    PAGE_SIZES,
    TOKEN_LAYER_BYTES,
    Bench,
    Call,
    Entry,
    integers,
    pool_of,
    rows,
    tables_of,
)
from services.engine.attention.decode_attention import (
    UNTUNED,
    DecodeLaunch,
    decode_attention_kernel,
    decode_splits,
)
from services.engine.attention.prefill_attention import prefill_attention, prefill_attention_kernel
from services.engine.kv.layout import KvLayout
from services.engine.kv.pack_kernels import move_runs_kernel
from services.engine.kv.run_table import RunTables, SlotRun
from services.engine.ops import tuning
from services.engine.ops.processors import processors
from services.engine.ops.qkv import QkvLaunch, qkv_to_pool_kernel
from services.engine.ops.rms_norm import NormLaunch, add_rms_norm_kernel
from services.engine.ops.swiglu import SwigluLaunch, silu_mul_kernel

EPS = 1e-6
SLOT_BYTES = 8 << 20
DECODE_SHAPES = ((1, 1024), (8, 1024), (64, 1024), (256, 1024), (1, 16384))
SPLITS = (1, 2, 4, 8, 16, 32)
DECODE_LAUNCHES = (
    UNTUNED, DecodeLaunch(64, 4, 2), DecodeLaunch(64, 4, 4), DecodeLaunch(64, 2, 3), DecodeLaunch(64, 2, 4),
    DecodeLaunch(64, 8, 3), DecodeLaunch(64, 8, 4), DecodeLaunch(32, 2, 4), DecodeLaunch(128, 4, 2),
    DecodeLaunch(128, 8, 2), DecodeLaunch(128, 8, 3),
)  # fmt: skip
NORM_LAUNCHES = (NormLaunch(8), NormLaunch(4), NormLaunch(16))
SWIGLU_LAUNCHES = (
    SwigluLaunch(), SwigluLaunch(2048, 4), SwigluLaunch(2048, 8), SwigluLaunch(512, 4), SwigluLaunch(4096, 8)
)  # fmt: skip
QKV_LAUNCHES = (
    QkvLaunch(), QkvLaunch(8, 4), QkvLaunch(8, 2), QkvLaunch(16, 8), QkvLaunch(32, 8), QkvLaunch(64, 8)
)  # fmt: skip
TUNED_TOKENS = (1, 8, 64, 128, 256, 2048, 8192)
PAGE_SIZE = 64
"""As a worker on a GPU has them."""
PREFILL_TUNINGS = ((128, 128, 8, 2), (128, 64, 8, 3))
"""block_rows, block_keys, num_warps, num_stages of the kernel for every GPU; the first is the default."""


def bench_small(bench: Bench, memory: Tensor) -> None:
    """Norm, SwiGLU, qkv: bound by memory or, at small batches, by the cache and the launch."""
    weight, head_norm = rows(HIDDEN), rows(HEADS + KV_HEADS, HEAD_DIM)
    pool = pool_of(memory, 16)
    pool_rows = pool.view(-1, HEAD_DIM)
    layer_rows = [pool_rows[layer * 2 * KV_HEADS * 16 :] for layer in range(LAYERS)]
    all_heads = HEADS + 2 * KV_HEADS
    for tokens in TUNED_TOKENS:
        shape, column_bytes = f"tokens {tokens}", 2 * tokens
        x, residual = rows(tokens, HIDDEN), torch.zeros((tokens, HIDDEN), dtype=DTYPE, device=CUDA)
        for norm_launch in NORM_LAUNCHES:
            norm = partial(add_rms_norm_kernel, x, residual, weight, EPS, norm_launch)
            moved = 4 * HIDDEN * column_bytes
            entry = Entry("rms_norm", (tokens, 1, HIDDEN), norm_launch)
            bench.bytes("add_rms_norm", shape, describe(norm_launch), [norm] * LAYERS, moved, entry)

        gate_up = rows(tokens, 2 * INTERMEDIATE)
        for swiglu_launch in SWIGLU_LAUNCHES:
            mul = partial(silu_mul_kernel, gate_up, swiglu_launch)
            moved = 3 * INTERMEDIATE * column_bytes
            entry = Entry("silu_mul", (tokens, INTERMEDIATE), swiglu_launch)
            bench.bytes("silu_mul", shape, describe(swiglu_launch), [mul] * LAYERS, moved, entry)

        qkv = rows(tokens, all_heads, HEAD_DIM)
        cos, sin = (torch.ones((tokens, 1, HEAD_DIM), device=CUDA) for _ in range(2))
        place = torch.arange(tokens, device=CUDA)
        first = (place // 16) * (LAYERS * 2 * KV_HEADS * 16) + place % 16
        index = (first[:, None] + torch.arange(2 * KV_HEADS, device=CUDA) * 16).reshape(-1)
        nonfinite = torch.zeros(tokens, dtype=torch.int32, device=CUDA)
        moved = 2 * all_heads * HEAD_DIM * column_bytes + 2 * tokens * HEAD_DIM * 4
        for qkv_launch in QKV_LAUNCHES:
            calls: list[Call] = [
                partial(
                    qkv_to_pool_kernel,
                    *(qkv, head_norm, EPS, cos, sin, layer, index, nonfinite),
                    launch=qkv_launch,
                )
                for layer in layer_rows
            ]
            entry = Entry("qkv_to_pool", (tokens, all_heads, HEAD_DIM), qkv_launch)
            bench.bytes("qkv_to_pool", shape, describe(qkv_launch), calls, moved, entry)


def describe(launch: msgspec.Struct) -> str:
    return " ".join(f"{name} {value}" for name, value in msgspec.to_builtins(launch).items())


def bench_decode(bench: Bench, memory: Tensor) -> None:
    for batch, context in DECODE_SHAPES:
        if batch * context * LAYERS * TOKEN_LAYER_BYTES > memory.numel() * memory.element_size():
            bench.skipped.append(f"decode_attention batch {batch} context {context}: too little memory")
            continue
        chosen = decode_splits(batch, KV_HEADS, context, processors(CUDA))
        runs = [(PAGE_SIZE, chosen, launch) for launch in DECODE_LAUNCHES]
        runs += [(size, splits, UNTUNED) for size in PAGE_SIZES for splits in SPLITS if splits <= 4 * chosen]
        lengths = integers(*[context] * batch)
        queries = rows(batch, HEADS, HEAD_DIM)
        for size, splits, launch in runs:
            pool = pool_of(memory, size)
            tables = tables_of(pool, batch, context)
            calls: list[Call] = [
                partial(
                    decode_attention_kernel,
                    *(queries, pool, layer, tables, lengths, HEAD_DIM**-0.5),
                    splits=splits,
                    launch=launch,
                )
                for layer in range(LAYERS)
            ]
            settings = f"page {size} splits {splits}{'*' if splits == chosen else ''} {describe(launch)}"
            moved = batch * context * TOKEN_LAYER_BYTES + 2 * queries.numel() * 2
            shape = (batch, splits, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM, size)
            served = splits == chosen and size == PAGE_SIZE
            entry = Entry("decode_attention", shape, launch) if served else None
            where = f"batch {batch} context {context}"
            bench.bytes("decode_attention", where, settings, calls, moved, entry)


def bench_prefill(bench: Bench, memory: Tensor) -> None:
    """One sequence from its first token, beside torch's attention on dense keys and values."""
    for tokens in (1024, 8192):
        shape = f"tokens {tokens}"
        operations = 4 * HEADS * HEAD_DIM * tokens * (tokens + 1) / 2
        queries = rows(tokens, HEADS, HEAD_DIM)
        zero, count = integers(0), integers(tokens)
        runs = [(64, tuning) for tuning in PREFILL_TUNINGS]
        for size in PAGE_SIZES:
            pool = pool_of(memory, size)
            tables = tables_of(pool, 1, tokens)
            preferred: list[Call] = [
                partial(
                    prefill_attention,
                    *(queries, pool, layer, zero, count, zero, tables, tokens, HEAD_DIM**-0.5),
                )
                for layer in range(8)
            ]
            bench.flops("prefill_attention, preferred", shape, f"page {size}", preferred, operations)
        for size, (block_rows, keys, warps, stages) in runs:
            pool = pool_of(memory, size)
            tables = tables_of(pool, 1, tokens)
            calls: list[Call] = [
                partial(
                    prefill_attention_kernel,
                    *(queries, pool, layer, zero, count, zero, tables, tokens, HEAD_DIM**-0.5),
                    block_rows=block_rows,
                    block_keys=keys,
                    num_warps=warps,
                    num_stages=stages,
                )
                for layer in range(8)
            ]
            settings = f"page {size} rows {block_rows} keys {keys} warps {warps} stages {stages}"
            bench.flops("prefill_attention", shape, settings, calls, operations)

        heads = [rows(1, HEADS, tokens, HEAD_DIM) for _ in range(3)]
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            bench.flops("torch sdpa", shape, backend.name, [partial(attend, backend, *heads)] * 8, operations)


def attend(backend: SDPBackend, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(queries, keys, values, is_causal=True)


def bench_segments(bench: Bench, memory: Tensor) -> None:
    """Slots of 8 MiB, some of them in one launch, whose tokens follow each other."""
    for slots in (1, 4, 10, 32):
        staging = torch.zeros(slots * SLOT_BYTES, dtype=torch.uint8, device="cuda")
        for size in PAGE_SIZES:
            pool = pool_of(memory, size)
            tables = RunTables(KvLayout(LAYERS, KV_HEADS, size, HEAD_DIM), pool.shape[0], pool.element_size())
            tokens = SLOT_BYTES // (KV_HEADS * tables.head_bytes)
            pages = tables_of(pool, 1, slots * tokens)[0].tolist()
            runs = [SlotRun(pages, at * tokens, tokens, at, range(KV_HEADS)) for at in range(slots)]
            table = tables.of(runs, slots, SLOT_BYTES)
            sent = torch.frombuffer(table.words, dtype=torch.int32).cuda()
            for name, unpack in (("pack", False), ("unpack", True)):
                call = partial(move_runs_kernel, pool, staging, SLOT_BYTES, sent, table, unpack)
                moved = 2 * sum(table.byte_counts)
                bench.bytes(name, f"{slots} slots of {tokens}", f"page {size}", [call] * 4, moved)


MEASURES = {
    "prefill": bench_prefill,
    "layouts": bench_layouts,
    "decode": bench_decode,
    "segments": bench_segments,
    "small": bench_small,
}


def run(out: Path | None, budget_s: float, only: list[str], save: Path | None) -> int:
    """1. Fill memory with numbers; 2. measure each kernel; 3. write the results, and the fastest launches."""
    if not torch.cuda.is_available():
        print("the kernels' benchmark needs an NVIDIA GPU", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    largest = max(batch * context for batch, context in DECODE_SHAPES)
    free_bytes, _ = torch.cuda.mem_get_info()
    byte_count = min(largest * LAYERS * TOKEN_LAYER_BYTES, int(free_bytes * 0.7))
    memory = torch.empty(byte_count // 2, dtype=DTYPE, device=CUDA)
    for first in range(0, memory.numel(), 1 << 28):
        memory[first : first + (1 << 28)].normal_()

    bench = Bench(budget_s)
    with torch.inference_mode():
        for name in only or MEASURES:
            MEASURES[name](bench, memory)
    for line in bench.skipped:
        print(f"skipped {line}")
    if save is not None:
        print(f"saved {tuning.save(bench.table(), torch.cuda.get_device_name(), save)}")
    if out is not None:
        report = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "results": [asdict(result) for result in bench.results],
            "skipped": bench.skipped,
        }
        out.write_text(json.dumps(report, indent=1))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.bench.kernels.attention_kernels", description=__doc__
    )
    parser.add_argument("--out", type=Path, help="file for all results as JSON")
    parser.add_argument("--budget-s", type=float, default=200.0, help="start no measurement after this")
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), default=[], help="default: all of them")
    parser.add_argument(
        "--save",
        type=Path,
        nargs="?",
        const=tuning.user_directory(),
        help="put the fastest into this GPU's table, in the user's cache directory or in the one given",
    )
    options = parser.parse_args()
    return run(options.out, options.budget_s, options.only, options.save)


if __name__ == "__main__":
    sys.exit(main())
