"""The Gluon kernel of `hopper_attention`: one warp fetches, two warpgroups attend.

Gluon is Triton's language for what a program's warps do one by one: layouts, barriers, asynchronous
tensor-core products and copies are written out. Each stage of `keys` and `values` has a barrier that says
"full" (the copy's bytes have come) and one that says "empty" (both warpgroups have read it). The phase of a
barrier flips with every use, so the `n`-th use of a stage waits for phase `n & 1`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from services.engine.ops.launch_cache import cached_kernel


@cached_kernel
@gluon.jit(
    # What changes from call to call must not compile another kernel.
    do_not_specialize=["sequences", "tiles", "rounds", "layer", "table_stride"],
    do_not_specialize_on_alignment=["starts_ptr", "counts_ptr", "contexts_ptr", "tables_ptr"],
)
def prefill(
    queries_ptr,
    kv_boxes,
    starts_ptr,
    counts_ptr,
    contexts_ptr,
    tables_ptr,
    out_ptr,
    sequences,
    tiles,
    rounds,
    layer,
    query_token,
    query_head,
    table_stride,
    page_rows,
    scale,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    TILE_ROWS: gl.constexpr,
    BLOCK_KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    num_warps: gl.constexpr,
):
    ROWS: gl.constexpr = TILE_ROWS // 2
    dtype: gl.constexpr = kv_boxes.dtype
    QUERY_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, HEAD_DIM], dtype)
    upper_queries = gl.allocate_shared_memory(dtype, [ROWS, HEAD_DIM], QUERY_LAYOUT)
    lower_queries = gl.allocate_shared_memory(dtype, [ROWS, HEAD_DIM], QUERY_LAYOUT)
    keys = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_KEYS, HEAD_DIM], kv_boxes.layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_KEYS, HEAD_DIM], kv_boxes.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    keys_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    keys_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    values_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    values_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys_full.index(stage), count=1)
        mbarrier.init(values_full.index(stage), count=1)
        mbarrier.init(keys_empty.index(stage), count=2)
        mbarrier.init(values_empty.index(stage), count=2)
    programs = gl.num_programs(0)
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    queries_ptr, out_ptr, upper_queries, keys, values, keys_full, keys_empty, values_full,
                    values_empty, starts_ptr, counts_ptr, contexts_ptr, sequences, tiles, rounds, programs,
                    query_token, query_head, scale,
                    KV_HEADS, GROUP, TILE_ROWS, BLOCK_KEYS, HEAD_DIM, STAGES, 0,
                ),
            ),
            (
                _attend,
                (
                    queries_ptr, out_ptr, lower_queries, keys, values, keys_full, keys_empty, values_full,
                    values_empty, starts_ptr, counts_ptr, contexts_ptr, sequences, tiles, rounds, programs,
                    query_token, query_head, scale,
                    KV_HEADS, GROUP, TILE_ROWS, BLOCK_KEYS, HEAD_DIM, STAGES, 1,
                ),
            ),
            (
                _fetch,
                (
                    kv_boxes, keys, values, keys_full, keys_empty, values_full, values_empty, counts_ptr,
                    contexts_ptr, tables_ptr, sequences, tiles, rounds, programs, layer, table_stride,
                    page_rows, KV_HEADS, TILE_ROWS // GROUP, PAGE_SIZE, BLOCK_KEYS, HEAD_DIM, STAGES,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _tile(
    round_number,
    programs,
    sequences,
    tiles,
    counts_ptr,
    contexts_ptr,
    KV_HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    BLOCK_KEYS: gl.constexpr,
):
    """This program's tile in a round: its KV head, sequence, the sequence's count and context, the tile's
    first token, its end of keys, and how many blocks of keys that is. 0 blocks: there is nothing to do."""
    program = gl.program_id(0)
    ahead = round_number % 2 == 0
    index = round_number * programs + gl.where(ahead, program, programs - 1 - program)
    sequence = (index // KV_HEADS) % sequences
    tile = tiles - 1 - index // (KV_HEADS * sequences)
    count = gl.load(counts_ptr + sequence)
    context = gl.load(contexts_ptr + sequence)
    first_token = tile * TOKENS
    end = context + gl.minimum(first_token + TOKENS, count)
    blocks = gl.cdiv(end, BLOCK_KEYS)
    if (tile < 0) | (first_token >= count):
        blocks = 0
    return index % KV_HEADS, sequence, count, context, first_token, end, blocks


@gluon.jit
def _fetch(
    kv_boxes,
    keys,
    values,
    keys_full,
    keys_empty,
    values_full,
    values_empty,
    counts_ptr,
    contexts_ptr,
    tables_ptr,
    sequences,
    tiles,
    rounds,
    programs,
    layer,
    table_stride,
    page_rows,
    KV_HEADS: gl.constexpr,
    TOKENS: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    BLOCK_KEYS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One warp: blocks of keys and values into shared memory, the last block of a tile first."""
    number = 0
    for round_number in range(rounds):
        kv_head, sequence, _count, _context, _first, end, blocks = _tile(
            round_number, programs, sequences, tiles, counts_ptr, contexts_ptr, KV_HEADS, TOKENS, BLOCK_KEYS
        )
        table = tables_ptr + sequence * table_stride
        key_rows = (layer * 2 * KV_HEADS + kv_head) * PAGE_SIZE
        value_rows = key_rows + KV_HEADS * PAGE_SIZE
        for done in range(blocks):
            first_key = (blocks - 1 - done) * BLOCK_KEYS
            stage = number % STAGES
            # A fresh barrier counts as having completed the phase before its first.
            phase = (number // STAGES) & 1 ^ 1
            _fetch_block(
                kv_boxes, keys.index(stage), keys_full.index(stage), keys_empty.index(stage), phase,
                table, first_key, end, page_rows, key_rows, PAGE_SIZE, BLOCK_KEYS, HEAD_DIM,
            )  # fmt: skip
            _fetch_block(
                kv_boxes, values.index(stage), values_full.index(stage), values_empty.index(stage), phase,
                table, first_key, end, page_rows, value_rows, PAGE_SIZE, BLOCK_KEYS, HEAD_DIM,
            )  # fmt: skip
            number += 1


@gluon.jit
def _fetch_block(
    kv_boxes,
    block,
    full,
    empty,
    phase,
    table,
    first_key,
    end,
    page_rows,
    rows,
    PAGE_SIZE: gl.constexpr,
    BLOCK_KEYS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
):
    """Waits until the block's place is empty. Beyond the sequence's end page 0 is read: finite, and
    masked."""
    BOX: gl.constexpr = min(PAGE_SIZE, BLOCK_KEYS)
    mbarrier.wait(empty, phase)
    mbarrier.expect(full, BLOCK_KEYS * HEAD_DIM * 2)
    for box in gl.static_range(BLOCK_KEYS // BOX):
        key = first_key + box * BOX
        page = gl.load(table + key // PAGE_SIZE, mask=key < end, other=0)
        row = page * page_rows + rows + key % PAGE_SIZE
        tma.async_copy_global_to_shared(kv_boxes, [row, 0], full, block.slice(box * BOX, BOX, dim=0))


@gluon.jit
def _attend(
    queries_ptr,
    out_ptr,
    queries,
    keys,
    values,
    keys_full,
    keys_empty,
    values_full,
    values_empty,
    starts_ptr,
    counts_ptr,
    contexts_ptr,
    sequences,
    tiles,
    rounds,
    programs,
    query_token,
    query_head,
    scale,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    TILE_ROWS: gl.constexpr,
    BLOCK_KEYS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    HALF: gl.constexpr,
):
    """One warpgroup: its half of a tile's rows, a running softmax over the blocks as they come."""
    ROWS: gl.constexpr = TILE_ROWS // 2
    LOWEST: gl.constexpr = -1.0e20  # below every score
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_KEYS, 16])
    MIXED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, MIXED, 2)
    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    SCORES_ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    MIXED_ROW: gl.constexpr = gl.SliceLayout(1, MIXED)
    dtype: gl.constexpr = queries.dtype

    loaded_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LOADED)) + HALF * ROWS
    loaded_column = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LOADED))
    scores_row = gl.arange(0, ROWS, layout=SCORES_ROW) + HALF * ROWS
    mixed_row = gl.arange(0, ROWS, layout=MIXED_ROW) + HALF * ROWS
    mixed_column = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, MIXED))
    key_of = gl.arange(0, BLOCK_KEYS, layout=gl.SliceLayout(0, SCORES))
    zeros = gl.zeros([ROWS, BLOCK_KEYS], gl.float32, SCORES)

    number = 0
    for round_number in range(rounds):
        kv_head, sequence, count, context, first_token, _end, blocks = _tile(
            round_number, programs, sequences, tiles, counts_ptr, contexts_ptr, KV_HEADS, TILE_ROWS // GROUP,
            BLOCK_KEYS,
        )  # fmt: skip
        if blocks > 0:
            query_start = gl.load(starts_ptr + sequence).to(gl.int64)
            token = first_token + loaded_row // GROUP
            place = (query_start + token) * query_token + (kv_head * GROUP + loaded_row % GROUP) * query_head
            place = place[:, None] + loaded_column[None, :]
            queries.store(gl.load(queries_ptr + place, mask=(token < count)[:, None], other=0.0))
            fence_async_shared()
            position = context + gl.minimum(first_token + scores_row // GROUP, count - 1)
            seen_by_all = context + first_token + 1

            first_key = (blocks - 1) * BLOCK_KEYS
            stage = number % STAGES
            mbarrier.wait(keys_full.index(stage), (number // STAGES) & 1)
            run = warpgroup_mma(
                queries, keys.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True
            )
            scores = warpgroup_mma_wait(0, deps=(run,))
            mbarrier.arrive(keys_empty.index(stage), count=1)
            scores = gl.where((first_key + key_of)[None, :] <= position[:, None], scores, float("-inf"))
            # Finite, so that a row that sees nothing of this block makes no NaN: a later one outweighs it.
            highest = gl.maximum(gl.max(scores, axis=1) * scale, LOWEST)
            weights = gl.exp2(scores * scale - highest[:, None])
            total = gl.sum(weights, axis=1)
            operand = gl.convert_layout(weights.to(dtype), WEIGHTS)
            mixed = gl.zeros([ROWS, HEAD_DIM], gl.float32, MIXED)
            for _ in range(1, blocks):
                first_key -= BLOCK_KEYS
                before = number % STAGES
                before_phase = (number // STAGES) & 1
                number += 1
                stage = number % STAGES
                mbarrier.wait(keys_full.index(stage), (number // STAGES) & 1)
                run = warpgroup_mma(
                    queries, keys.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True
                )
                mbarrier.wait(values_full.index(before), before_phase)
                mixing = warpgroup_mma(operand, values.index(before), mixed, is_async=True)
                scores = warpgroup_mma_wait(1, deps=(run,))
                mbarrier.arrive(keys_empty.index(stage), count=1)
                if first_key + BLOCK_KEYS > seen_by_all:
                    is_seen = (first_key + key_of)[None, :] <= position[:, None]
                    scores = gl.where(is_seen, scores, float("-inf"))
                new_highest = gl.maximum(highest, gl.max(scores, axis=1) * scale)
                shrink = gl.exp2(highest - new_highest)
                weights = gl.exp2(scores * scale - new_highest[:, None])
                total = total * shrink + gl.sum(weights, axis=1)
                highest = new_highest
                # The operand is named so that its registers stay until the product has read them.
                mixed, operand = warpgroup_mma_wait(0, deps=(mixing, operand))
                mbarrier.arrive(values_empty.index(before), count=1)
                mixed = mixed * gl.convert_layout(shrink, MIXED_ROW)[:, None]
                operand = gl.convert_layout(weights.to(dtype), WEIGHTS)
            stage = number % STAGES
            mbarrier.wait(values_full.index(stage), (number // STAGES) & 1)
            mixing = warpgroup_mma(operand, values.index(stage), mixed, is_async=True)
            mixed, operand = warpgroup_mma_wait(0, deps=(mixing, operand))
            mbarrier.arrive(values_empty.index(stage), count=1)
            number += 1

            mixed = mixed / gl.convert_layout(total, MIXED_ROW)[:, None]
            token = first_token + mixed_row // GROUP
            head = (query_start + token) * (KV_HEADS * GROUP) + kv_head * GROUP + mixed_row % GROUP
            place = out_ptr + (head * HEAD_DIM)[:, None] + mixed_column[None, :]
            gl.store(place, mixed.to(dtype), mask=(token < count)[:, None])
