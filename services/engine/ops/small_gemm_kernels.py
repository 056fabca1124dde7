"""Triton kernels of products with few rows of activations, `x @ weight.T`: what they cost is the reading of
the weights, so each is a way to keep enough of that reading in flight.

`row_product` is for one token: the dot products of a few weight rows with x, multiplied and added in float32
without tensor cores, the next weights always under way into registers. `tile_product` is for more: the
operands of `tl.dot` are swapped, so that a tile of weight rows is its tall side and the tokens its narrow one
(wgmma takes at least 64 by 8), and a long inner dimension may be split over several programs. Their partial
sums are added in a fixed order by a second launch, so that results do not depend on which program ends first.

Both begin to read weights before the kernel that computes x has ended (dependent_launch.py): `row_product`
into registers, `tile_product` into the second-level cache. So whoever writes weights synchronises with the
device before the first product with them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from services.engine.ops.dependent_launch import await_earlier, launch_options, let_next_start
from services.engine.ops.launch_cache import cached_kernel, cdiv


def row_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gated: bool,
    block_rows: int,
    block_inner: int,
    num_warps: int,
    programs: int,
    out: Tensor | None = None,
) -> Tensor:
    """`x` `[1, inner]` times `weight` `[rows, inner]`, in the dtype of x: `[1, rows]`, or if `gated`
    `silu(first half) * second half`, `[1, rows / 2]`.

    A program takes `block_rows` results at a time, and goes on with others if there are more than `programs`.
    """
    inner = weight.shape[1]
    results = weight.shape[0] // 2 if gated else weight.shape[0]
    if out is None:
        out = torch.empty((1, results), dtype=x.dtype, device=x.device)
    blocks = cdiv(results, block_rows)
    _row_product[(min(blocks, programs),)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        results,
        INNER=inner,
        BLOCK_ROWS=block_rows,
        BLOCK_INNER=block_inner,
        GATED=gated,
        BIAS=bias is not None,
        PERSISTENT=blocks > programs,
        num_warps=num_warps,
        **launch_options(x),
    )
    return out


@triton.jit
def _weights(
    weight_ptr: tl.tensor,
    block: tl.tensor,
    results: tl.tensor,
    inner: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
) -> tl.tensor:
    """`[BLOCK_ROWS, BLOCK_INNER]` from column `inner` on. Past the last row it reads nothing."""
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = inner + tl.arange(0, BLOCK_INNER)
    mask = (row < results)[:, None]
    if inner + BLOCK_INNER > INNER:
        mask = mask & (column < INNER)[None, :]
    place = weight_ptr + row[:, None].to(tl.int64) * INNER + column[None, :]
    return tl.load(place, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _products(weights: tl.tensor, x: tl.tensor) -> tl.tensor:
    """float32 `[rows, inner / 8]`: the eight neighbours that a thread has loaded at once are added there."""
    product = weights.to(tl.float32) * x[None, :]
    return tl.sum(tl.reshape(product, [weights.shape[0], weights.shape[1] // 8, 8]), axis=2)


@cached_kernel
@triton.jit
def _row_product(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    results: tl.tensor,
    INNER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    let_next_start(PDL)
    second_ptr = weight_ptr + results.to(tl.int64) * INNER
    block = tl.program_id(0)
    first = _weights(weight_ptr, block, results, 0, INNER, BLOCK_ROWS, BLOCK_INNER)
    second = first
    if GATED:
        second = _weights(second_ptr, block, results, 0, INNER, BLOCK_ROWS, BLOCK_INNER)
    await_earlier(PDL)

    last = tl.cdiv(results, BLOCK_ROWS) if PERSISTENT else block + 1
    for at in range(block, last, tl.num_programs(0)):
        total = tl.zeros([BLOCK_ROWS, BLOCK_INNER // 8], dtype=tl.float32)
        gate_total = total
        for inner in tl.static_range(0, INNER, BLOCK_INNER):
            now, second_now = first, second
            if inner + BLOCK_INNER < INNER:
                first = _weights(weight_ptr, at, results, inner + BLOCK_INNER, INNER, BLOCK_ROWS, BLOCK_INNER)
                if GATED:
                    second = _weights(
                        second_ptr, at, results, inner + BLOCK_INNER, INNER, BLOCK_ROWS, BLOCK_INNER
                    )
            elif PERSISTENT:
                next_block = at + tl.num_programs(0)
                first = _weights(weight_ptr, next_block, results, 0, INNER, BLOCK_ROWS, BLOCK_INNER)
                if GATED:
                    second = _weights(second_ptr, next_block, results, 0, INNER, BLOCK_ROWS, BLOCK_INNER)
            column = inner + tl.arange(0, BLOCK_INNER)
            x = tl.load(x_ptr + column, mask=column < INNER, other=0.0).to(tl.float32)
            if GATED:
                gate_total += _products(now, x)
                total += _products(second_now, x)
            else:
                total += _products(now, x)

        row = at * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = row < results
        value = tl.sum(total, axis=1)
        if BIAS:
            bias_at = row + results if GATED else row
            value += tl.load(bias_ptr + bias_at, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            gate = tl.sum(gate_total, axis=1)
            if BIAS:
                gate += tl.load(bias_ptr + row, mask=mask, other=0.0).to(tl.float32)
            value = gate / (1.0 + tl.exp(-gate)) * value
        tl.store(out_ptr + row, value.to(out_ptr.dtype.element_ty), mask=mask)


def tile_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gated: bool,
    block_tokens: int,
    block_rows: int,
    block_inner: int,
    splits: int,
    num_warps: int,
    num_stages: int,
    descriptors: bool,
    prefetch_bytes: int,
    out: Tensor | None = None,
) -> Tensor:
    """`x` `[tokens, inner]` times `weight` `[rows, inner]`, in the dtype of x: `[tokens, rows]`, or if
    `gated` `silu(first half) * second half`, `[tokens, rows / 2]`.

    `descriptors` loads tiles by the tensor memory accelerator (compute capability 9) where x and weight are
    aligned for it, else by pointers.
    `prefetch_bytes` of each weight row of a program are asked for before the wait for x, with dependent
    launches only. With `splits` > 1 there is a second launch.
    """
    tokens, inner = x.shape
    results = weight.shape[0] // 2 if gated else weight.shape[0]
    if out is None:
        out = torch.empty((tokens, results), dtype=x.dtype, device=x.device)
    options = launch_options(x)
    split_inner = cdiv(cdiv(inner, block_inner), splits) * block_inner
    splits = cdiv(inner, split_inner)  # none without work
    partial = out
    if splits > 1:
        partial = torch.empty((splits, tokens, weight.shape[0]), dtype=torch.float32, device=x.device)
    lanes = max(block_rows, 32 * num_warps)
    aligned = weight.data_ptr() % 16 == 0
    if options["PDL"] and aligned:  # not past the end of a row's last split, and in multiples of 16 bytes
        row_bytes = (inner - (splits - 1) * split_inner) * weight.element_size()
        requests = lanes // block_rows  # of each row
        request_bytes = min(prefetch_bytes, row_bytes) // (16 * requests) * 16
    else:
        request_bytes = 0
    descriptors = descriptors and aligned and x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0
    _tile_product[(cdiv(tokens, block_tokens), cdiv(results, block_rows), splits)](
        TensorDescriptor.from_tensor(x, [block_tokens, block_inner]) if descriptors else x,
        TensorDescriptor.from_tensor(weight, [block_rows, block_inner]) if descriptors else weight,
        weight,
        weight if bias is None else bias,
        partial,
        tokens,
        results,
        inner,
        x.stride(0),
        split_inner,
        request_bytes,
        BLOCK_TOKENS=block_tokens,
        BLOCK_ROWS=block_rows,
        BLOCK_INNER=block_inner,
        SPLIT=splits > 1,
        EVEN=inner % block_inner == 0,
        GATED=gated,
        BIAS=bias is not None,
        DESCRIPTORS=descriptors,
        LANES=lanes,
        num_warps=num_warps,
        num_stages=num_stages,
        **options,
    )
    if splits > 1:
        block = 1024
        _add_partials[(tokens, cdiv(results, block))](
            partial,
            weight if bias is None else bias,
            out,
            results,
            tokens * weight.shape[0],
            SPLITS=splits,
            BLOCK=block,
            GATED=gated,
            BIAS=bias is not None,
            num_warps=4,
            **options,
        )
    return out


@triton.jit
def _prefetch(pointers: tl.tensor, byte_count: tl.tensor) -> None:
    """Ask for `byte_count` bytes (a multiple of 16) at each pointer to be brought into the second-level
    cache."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; // dummy $0",
        "=r,l,r",
        [pointers, byte_count],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@cached_kernel
@triton.jit(do_not_specialize=["tokens", "request_bytes"])
def _tile_product(
    x_tiles: tl.tensor,
    weight_tiles: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tokens: tl.tensor,
    results: tl.tensor,
    inner: tl.tensor,
    x_stride: tl.tensor,
    split_inner: tl.tensor,
    request_bytes: tl.tensor,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    let_next_start(PDL)
    first_token = tl.program_id(0) * BLOCK_TOKENS
    first_row = tl.program_id(1) * BLOCK_ROWS
    split = tl.program_id(2)
    start = split * split_inner
    end = tl.minimum(start + split_inner, inner)
    if PDL:  # noqa: SIM102  (a constant, then a number)
        if request_bytes > 0:  # one a thread, or one a row if there are more rows
            REQUESTS: tl.constexpr = LANES // BLOCK_ROWS
            lane = tl.arange(0, LANES)
            request_row = tl.minimum(first_row + lane // REQUESTS, results - 1).to(tl.int64)
            element_bytes: tl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth // 8
            request = start + (lane % REQUESTS) * (request_bytes // element_bytes)
            request_at = weight_ptr + request_row * inner + request
            _prefetch(request_at, request_bytes)
            if GATED:
                _prefetch(request_at + results.to(tl.int64) * inner, request_bytes)
    await_earlier(PDL)

    token = first_token + tl.arange(0, BLOCK_TOKENS)
    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_INNER)
    is_token, is_row = token < tokens, row < results
    x_at = x_tiles
    weight_at = weight_tiles
    if not DESCRIPTORS:
        x_at = x_tiles + token[:, None].to(tl.int64) * x_stride + column[None, :]
        weight_at = weight_tiles + row[:, None].to(tl.int64) * inner + column[None, :]
    second = results.to(tl.int64) * inner

    total = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], dtype=tl.float32)
    up_total = total
    tl.assume(start < end)  # with a way around the loop, ptxas would wait for each wgmma by itself
    for at in range(start, end, BLOCK_INNER):
        if DESCRIPTORS:
            x = x_tiles.load([first_token, at])
            weights = weight_tiles.load([first_row, at])
            total = tl.dot(weights, tl.trans(x), total, input_precision="ieee")
            if GATED:
                weights = weight_tiles.load([first_row + results, at])
                up_total = tl.dot(weights, tl.trans(x), up_total, input_precision="ieee")
        else:
            x_mask, mask = is_token[:, None], is_row[:, None]
            if not EVEN:
                x_mask = x_mask & (column < inner - at)[None, :]
                mask = mask & (column < inner - at)[None, :]
            x = tl.load(x_at + at, mask=x_mask, other=0.0)
            weights = tl.load(weight_at + at, mask=mask, other=0.0)
            total = tl.dot(weights, tl.trans(x), total, input_precision="ieee")
            if GATED:
                weights = tl.load(weight_at + second + at, mask=mask, other=0.0)
                up_total = tl.dot(weights, tl.trans(x), up_total, input_precision="ieee")

    mask = is_token[None, :] & is_row[:, None]
    if SPLIT:
        width = results * 2 if GATED else results
        target = out_ptr + (split.to(tl.int64) * tokens + token[None, :]) * width + row[:, None]
        tl.store(target, total, mask=mask)
        if GATED:
            tl.store(target + results, up_total, mask=mask)
    else:
        if BIAS:
            total += tl.load(bias_ptr + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
        if GATED:
            if BIAS:
                up_total += tl.load(bias_ptr + results + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
            total = total / (1.0 + tl.exp(-total)) * up_total
        target = out_ptr + token[None, :].to(tl.int64) * results + row[:, None]
        tl.store(target, total.to(out_ptr.dtype.element_ty), mask=mask)


@cached_kernel
@triton.jit
def _add_partials(
    partial_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    results: tl.tensor,
    split_stride: tl.tensor,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    let_next_start(PDL)
    await_earlier(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < results
    place = partial_ptr + token * (results * 2 if GATED else results) + column
    total = tl.zeros([BLOCK], dtype=tl.float32)
    up_total = total
    for split in tl.static_range(SPLITS):
        total += tl.load(place + split * split_stride, mask=mask, other=0.0)
        if GATED:
            up_total += tl.load(place + results + split * split_stride, mask=mask, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        if BIAS:
            up_total += tl.load(bias_ptr + results + column, mask=mask, other=0.0).to(tl.float32)
        total = total / (1.0 + tl.exp(-total)) * up_total
    tl.store(out_ptr + token * results + column, total.to(out_ptr.dtype.element_ty), mask=mask)
