"""The rows, and the batch that is brought to one context: simulated token by token."""

import pytest

from deploy.bench.engine.workload import Decode, Offline, PrefillRow, prompt_lengths, workload


def test_the_rows_as_they_are() -> None:
    load = workload(1, quick=False)
    assert [(row.batch, row.context) for row in load.decodes] == [
        (1, 1024), (1, 16384), (64, 1024), (256, 1024)
    ]  # fmt: skip
    assert PrefillRow(32, 4096) in load.prefills
    assert load.offline == Offline(800, 1024, 256)
    assert load.steps >= 64
    assert load.longest_tokens >= 16384 + load.warm_steps + load.steps


def test_quick_measures_less_often_but_the_same_rows() -> None:
    load, quick = workload(1, quick=False), workload(1, quick=True)
    assert (quick.decodes, quick.prefills) == (load.decodes, load.prefills)
    assert quick.steps >= 64
    assert (quick.repeats, quick.offline.requests) == (1, 200)


@pytest.mark.parametrize("shrink", [2, 64, 1024])
def test_shrunk_rows_are_small_different_and_not_empty(shrink: int) -> None:
    load = workload(shrink, quick=False)
    assert len(set(load.decodes)) == len(load.decodes)
    assert len(set(load.prefills)) == len(load.prefills)
    assert min(row.batch for row in load.decodes) == 1
    assert max(row.tokens for row in load.prefills) == 16384 // shrink
    assert all(load.steps <= row.context for row in load.decodes)
    assert load.offline.requests >= 1 <= load.offline.output_tokens


@pytest.mark.parametrize(
    ("batch", "context", "chunk"),
    [(1, 968, 2048), (64, 968, 2048), (256, 968, 2048), (7, 33, 16), (5, 1, 16)],
)
def test_all_sequences_meet_at_one_context(batch: int, context: int, chunk: int) -> None:
    lengths = prompt_lengths(batch, context, chunk)
    assert run_prompts(lengths, chunk) == pytest.approx([context] * batch, abs=2)


def test_equal_prompts_would_not_meet() -> None:
    """Else the test above could not fail."""
    reached = run_prompts([968] * 256, 2048)
    assert max(reached) - min(reached) > 100


def run_prompts(lengths: list[int], chunk: int) -> list[int]:
    """Tokens with KV of each sequence, in the step that computes the last prompt's last chunk: a step takes
    one token of each sequence whose prompt is done, then what is left of it for prompts, oldest first."""
    computed = [0] * len(lengths)
    while any(done < length for done, length in zip(computed, lengths, strict=True)):
        decoding = [at for at, length in enumerate(lengths) if computed[at] >= length]
        budget = chunk - len(decoding)
        for at in decoding:
            computed[at] += 1
        for at, length in enumerate(lengths):
            if at not in decoding and budget > 0:
                count = min(budget, length - computed[at])
                computed[at] += count
                budget -= count
    return computed


def test_names_are_those_of_the_table() -> None:
    assert Decode(64, 1024).name == "decode step, batch 64 at 1024"
    assert PrefillRow(1, 8192).name == "prefill 8192"
    assert PrefillRow(32, 4096).name == "prefill 32 x 4096"
    assert Offline(800, 1024, 256).name == "offline 800 x (1024 in, 256 out)"
