"""Which layout of pages attention reads fastest: one run over all layers, or a pool for each layer."""

from functools import partial

from torch import Tensor

from deploy.bench.kernels.kernel_times import (
    CUDA,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    PAGE_SIZES,
    TOKEN_LAYER_BYTES,
    Bench,
    Call,
    integers,
    pool_of,
    rows,
    tables_of,
)
from services.engine.attention.decode_attention import decode_attention_kernel, decode_splits
from services.engine.attention.prefill_attention import prefill_attention
from services.engine.ops.processors import processors


def bench_layouts(bench: Bench, memory: Tensor) -> None:
    """Pages that are one run over all layers, beside a pool for each layer; pages in order and scattered.

    A pool for each layer is the same memory seen as one layer of as many pages more, so that the same
    kernels run on both.
    """
    for size in PAGE_SIZES:
        page_first = pool_of(memory, size)
        pages = page_first.shape[0]
        layer_first = page_first.view(pages * LAYERS, 1, 2, KV_HEADS, size, HEAD_DIM)
        for order in ("in order", "scattered"):
            for name in ("[page][layer]", "[layer][page]"):
                settings = f"{name} page {size} {order}"

                def on_layer(
                    layer: int, tables: Tensor, name: str = name, pages: int = pages,
                    pools: tuple[Tensor, Tensor] = (page_first, layer_first),
                ) -> tuple[Tensor, int, Tensor]:  # fmt: skip
                    if name == "[page][layer]":
                        return pools[0], layer, tables
                    return pools[1], 0, tables + layer * pages

                for batch, context in ((1, 16384), (64, 1024)):
                    queries, lengths = rows(batch, HEADS, HEAD_DIM), integers(*[context] * batch)
                    moved = batch * context * TOKEN_LAYER_BYTES + 2 * queries.numel() * 2
                    tables = tables_of(page_first, batch, context, order == "scattered")
                    splits = decode_splits(batch, KV_HEADS, context, processors(CUDA))
                    calls: list[Call] = []
                    for layer in range(LAYERS):
                        pool, at, table = on_layer(layer, tables)
                        calls.append(
                            partial(
                                decode_attention_kernel,
                                *(queries, pool, at, table, lengths, HEAD_DIM**-0.5),
                                splits=splits,
                            )
                        )
                    shape = f"batch {batch} context {context}"
                    bench.bytes("decode_attention", shape, settings, calls, moved)
                for tokens in (2048, 8192):
                    queries = rows(tokens, HEADS, HEAD_DIM)
                    zero, count = integers(0), integers(tokens)
                    tables = tables_of(page_first, 1, tokens, order == "scattered")
                    calls = []
                    for layer in range(LAYERS):
                        pool, at, table = on_layer(layer, tables)
                        calls.append(
                            partial(
                                prefill_attention,
                                *(queries, pool, at, zero, count, zero, table, tokens, HEAD_DIM**-0.5),
                            )
                        )
                    operations = 4 * HEADS * HEAD_DIM * tokens * (tokens + 1) / 2
                    bench.flops("prefill_attention", f"tokens {tokens}", settings, calls, operations)
