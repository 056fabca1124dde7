"""The steps that a worker rehearses at its start: nothing that a request can want is missing."""

from pathlib import Path

import pytest

from services.config import WorkerConfig
from services.engine.attention.decode_attention import decode_splits
from services.engine.profile_run import mixed_steps, powers_of_two, small_chunks

PROCESSORS = 132
TUNED_BATCHES = (1, 8, 64, 256)
"""Of the shipped table for decode attention: a batch has the launch of the next one here."""


def worker(max_batch: int, max_chunk_tokens: int = 2048) -> WorkerConfig:
    return WorkerConfig(
        "w",
        "unified",
        Path("/model"),
        "ipc://unused",
        page_size_tokens=64,
        max_batch=max_batch,
        max_chunk_tokens=max_chunk_tokens,
    )


def launch_of(batch: int, kv_heads: int, context: int) -> tuple[int, int]:
    return min(one for one in TUNED_BATCHES if one >= batch), decode_splits(
        batch, kv_heads, context, PROCESSORS
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize(("max_batch", "max_model_len"), [(256, 40960), (64, 4096), (9, 100), (2, 70)])
def test_every_batch_and_context_is_rehearsed(kv_heads: int, max_batch: int, max_model_len: int) -> None:
    steps = mixed_steps(worker(max_batch), kv_heads, max_model_len, PROCESSORS)
    warmed_up = {launch_of(len(rows) - 1, kv_heads, rows[1].start + 1) for rows in steps}
    wanted = {
        launch_of(batch, kv_heads, context)
        for batch in range(1, max_batch)
        for context in range(1, max_model_len + 1, 7)
    }
    assert wanted <= warmed_up
    for chunk, *decodes in steps:
        assert len(chunk.tokens) > 1
        assert all(len(row.pages) * 64 > row.start for row in decodes)


def test_chunks_are_no_larger_than_a_step() -> None:
    sizes = [len(row.tokens) for row in small_chunks(worker(8), 40960)]
    assert sizes == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert [len(row.tokens) for row in small_chunks(worker(8, max_chunk_tokens=100), 40960)][-1] == 64
    assert [len(row.tokens) for row in small_chunks(worker(8), 20)][-1] == 16


def test_powers_of_two() -> None:
    assert [powers_of_two(most) for most in (0, 1, 2, 3, 4)] == [[], [1], [1, 2], [1, 2], [1, 2, 4]]
