"""The engine as a worker uses it: order of calls, rows, choices, page copies, moves, memory."""

import dataclasses
from pathlib import Path

import pytest
import torch

from services.engine.batch import Row, SampleSpec
from services.engine.engine import Engine
from services.engine.errors import CheckpointError, EngineStateError, RowError, SegmentError
from services.engine.models.model_config import ModelConfig, read_model_config
from services.engine.peak_memory import peak_bytes
from services.protocol.messages import Sampling
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.engine.harness import (
    GREEDY,
    Sequence,
    new_engine,
    packed,
    prompt_of,
    run_together,
    start_engine,
    unpacked,
)

SAMPLED = Sampling(max_tokens=1, seed=11, temperature=0.9, top_p=0.95)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("model") / "tiny", seed=2, eos=False)


@pytest.fixture
def engine(model_dir: Path) -> Engine:
    return start_engine(model_dir)


def _nothing(done_bytes: int, total_bytes: int) -> None:
    pass


# ---------------------------------------------------------------- order of calls, sizes


def test_calls_out_of_order_are_refused(model_dir: Path) -> None:
    engine = new_engine(model_dir)
    with pytest.raises(EngineStateError, match="cannot become serving"):
        engine.allocate_pool(4)
    with pytest.raises(EngineStateError, match="between load and allocate_pool"):
        engine.measure_activations()
    with pytest.raises(EngineStateError, match="allocate the pool first"):
        engine.execute([Row([1], 0, [0])])
    engine.load(_nothing)
    with pytest.raises(EngineStateError, match="cannot become loaded"):
        engine.load(_nothing)
    engine.allocate_pool(4)
    with pytest.raises(EngineStateError, match="cannot become serving"):
        engine.allocate_pool(4)


def test_sizes_are_what_they_are_said_to_be(model_dir: Path) -> None:
    engine = new_engine(model_dir, dtype="bfloat16", page_size_tokens=16)
    model = read_model_config(model_dir)
    assert engine.load(_nothing) == model.parameter_bytes("bfloat16")
    assert engine.allocate_pool(10) == 10 * engine.page_bytes
    assert engine.page_bytes == 16 * model.kv_token_bytes("bfloat16") == 16 * engine.geometry.token_bytes
    assert engine.pool.data.shape == (10, 2, 2, 2, 16, 16)
    assert (engine.vocab_size, engine.eos_token_ids, engine.max_model_len) == (VOCAB_SIZE, (), 1024)
    assert new_engine(model_dir, max_model_len=99).max_model_len == 99


def test_activations_grow_with_what_bounds_them(model_dir: Path) -> None:
    """The logits of a large batch over a large vocabulary dominate, and must show."""
    measured = []
    for max_batch in (1, 64):
        engine = new_engine(model_dir, max_batch=max_batch, max_chunk_tokens=512, load_format="dummy")
        engine.model = _with_vocabulary(model_dir, 30_000)
        engine.load(_nothing)
        measured.append(engine.measure_activations())
    logits_bytes = 64 * 30_000 * 4
    assert measured[1] > logits_bytes
    assert measured[1] > measured[0]


def _with_vocabulary(model_dir: Path, vocab_size: int) -> ModelConfig:
    return dataclasses.replace(read_model_config(model_dir), vocab_size=vocab_size)


def test_peak_bytes_sees_what_was_freed_again() -> None:
    def work() -> None:
        torch.ones(10 << 20, dtype=torch.float32)

    # the kernel's counters lag by a few pages
    assert 39 << 20 <= peak_bytes(work, torch.device("cpu")) < 60 << 20


def test_dummy_weights_run(model_dir: Path, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text((model_dir / name).read_text())
    with pytest.raises(CheckpointError, match="holds neither"):
        start_engine(tmp_path)
    outputs = []
    for _ in range(2):
        engine = start_engine(tmp_path, load_format="dummy")
        outputs.append(run_together(engine, [Sequence(prompt_of(9), list(range(8)))], 6))
    assert outputs[0] == outputs[1]


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row([], 0, [0]), "at least one token"),
        (Row([1], -1, [0]), "start >= 0"),
        (Row([1, 2], 3, [0]), "1 pages do not cover positions up to 4"),
        (Row([1], 0, []), "0 pages do not cover"),
        (Row([1], 0, [128]), "page out of range: the pool has 128"),
        (Row([1], 0, [-1]), "page out of range"),
        (Row([VOCAB_SIZE], 0, [0]), "token out of range: the vocabulary has 320"),
        (Row([-1], 0, [0]), "token out of range"),
        (Row([1], 0, [0], targets=[1, 2]), "2 targets for 1 tokens"),
        (Row([1], 0, [0], targets=[VOCAB_SIZE]), "target out of range"),
        (
            Row(
                [1],
                0,
                [0],
                [SampleSpec(0, 1, Sampling(max_tokens=1, seed=1, logit_bias={VOCAB_SIZE: 1.0}), [1], [])],
            ),
            "draw names a token out of range",
        ),
        (
            Row(
                [1],
                0,
                [0],
                [SampleSpec(0, 1, Sampling(max_tokens=1, seed=1, repetition_penalty=2), [VOCAB_SIZE], [])],
            ),
            "draw names a token out of range",
        ),
    ],
)
def test_impossible_rows_are_refused_before_anything_is_written(
    engine: Engine, row: Row, message: str
) -> None:
    good = Row([5, 6], 0, [1])
    with pytest.raises(RowError, match=message):
        engine.execute([good, row])
    assert not engine.pool.data.any()


def test_no_rows_no_results(engine: Engine) -> None:
    assert engine.execute([]) == []


def test_results_come_in_the_rows_order(engine: Engine) -> None:
    """Rows are reordered inside; what each gets must not be."""
    prompts = [prompt_of(length, seed) for seed, length in enumerate((3, 1, 30, 1, 12))]
    tables = [list(range(at * 12, at * 12 + 12)) for at in range(5)]
    together = run_together(engine, [Sequence(p, t) for p, t in zip(prompts, tables, strict=True)], 8)
    alone = [run_together(engine, [Sequence(p, t)], 8)[0] for p, t in zip(prompts, tables, strict=True)]
    assert together == alone
    assert len({tuple(output) for output in together}) == 5


def test_sampled_tokens_do_not_depend_on_batch_chunks_or_pages(engine: Engine) -> None:
    prompt = prompt_of(41)
    alone = run_together(engine, [Sequence(prompt, list(range(20)), SAMPLED)], 12)[0]
    others = [
        Sequence(prompt_of(9 + at, at), list(range(40 + at * 8, 48 + at * 8)), SAMPLED) for at in range(4)
    ]
    mine = Sequence(prompt, list(range(99, 79, -1)), SAMPLED, chunk=7)
    run_together(engine, [*others[:2], mine, *others[2:]], 12)
    assert mine.output == alone
    assert alone != run_together(engine, [Sequence(prompt, list(range(20)))], 12)[0]


def test_choices_start_from_one_prefill(engine: Engine) -> None:
    """Several draws of one row equal separate runs of the same prompt with those choice numbers."""
    prompt, pages = prompt_of(10), [3, 4, 5]
    samples = [SampleSpec(choice, 10, SAMPLED, prompt, []) for choice in range(6)]
    (together,) = engine.execute([Row(prompt, 0, pages, samples)])
    for choice, sampled in enumerate(together.sampled):
        (alone,) = engine.execute([Row(prompt, 0, pages, [samples[choice]])])
        assert alone.sampled[0].token == sampled.token
    assert len({sampled.token for sampled in together.sampled}) > 1


def test_a_chunk_that_draws_nothing_gives_nothing(engine: Engine) -> None:
    (result,) = engine.execute([Row([1, 2, 3], 0, [0])])
    assert result.sampled == []
    assert result.prompt_logprobs == []


def test_prompt_logprobs_do_not_depend_on_chunks(engine: Engine) -> None:
    prompt = prompt_of(90)
    (whole,) = engine.execute([Row(prompt, 0, list(range(30)), [], prompt[1:], 2)])
    assert len(whole.prompt_logprobs) == 89
    parts = []
    for start in range(0, 90, 32):
        targets = prompt[start + 1 : start + 33]
        row = Row(prompt[start : start + 32], start, list(range(40, 70)), [], targets, 2)
        beside = Row([4], 0, [100], [SampleSpec(0, 1, GREEDY, [4], [])])
        parts += engine.execute([row, beside])[0].prompt_logprobs
    for found, expected in zip(parts, whole.prompt_logprobs, strict=True):
        assert found.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert [top.logprob for top in found.top] == pytest.approx(
            [top.logprob for top in expected.top], abs=1e-4
        )


def test_a_nan_does_not_pass_to_the_next_user_of_a_page(engine: Engine, model_dir: Path) -> None:
    expected = run_together(engine, [Sequence(prompt_of(6), [0, 1, 2])], 4)
    weight = engine.decoder.embedding
    saved = weight[7].clone()
    with torch.inference_mode():
        weight[7] = torch.nan
        engine.execute([Row([7] * 12, 0, [0, 1, 2])])
        weight[7] = saved
    assert bool(engine.pool.data.isfinite().all())
    assert run_together(engine, [Sequence(prompt_of(6), [0, 1, 2])], 4) == expected


# ---------------------------------------------------------------- the pool's moves


def test_a_sequence_goes_on_from_copied_pages(engine: Engine) -> None:
    """Copy-on-write: a fork that writes into its copy leaves the original's continuation as it was."""
    prompt = prompt_of(10)
    expected = run_together(engine, [Sequence(prompt, list(range(10)))], 9)[0]
    original = Sequence(prompt, list(range(20, 30)))
    original.take(engine.execute([original.next_row()])[0])
    engine.copy_pages([(20, 40), (21, 41), (22, 42)])
    fork = Sequence(prompt, list(range(40, 50)))
    fork.done_tokens, fork.output = 10, [(original.output[0] + 1) % 300]
    run_together(engine, [fork], 5)
    assert run_together(engine, [original], 9)[0] == expected
    assert fork.output[1:] != expected[1:5]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(0, 128)], "page 128 out of range"),
        ([(-1, 2)], "page -1"),
        ([(0, 1), (1, 2)], "overlap"),
        ([(0, 1)] * 2, "over"),
    ],
)
def test_impossible_copies_are_refused(engine: Engine, pairs: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(SegmentError, match=message):
        engine.copy_pages(pairs)
    engine.copy_pages([])


@pytest.mark.parametrize("segment_tokens", [5, 16, 64])
def test_decode_goes_on_from_transferred_kv(model_dir: Path, segment_tokens: int) -> None:
    """What the system is for: prefill in one engine, decode in another with other page sizes, segment by
    segment in any order, and the tokens are those of one engine alone."""
    prompt = prompt_of(50)
    prefill = start_engine(model_dir, page_size_tokens=16, pages=20)
    decode = start_engine(model_dir, page_size_tokens=4, pages=60)
    expected = run_together(prefill, [Sequence(prompt, list(range(10, 20)), SAMPLED)], 10)[0]

    source_pages, destination_pages = [7, 2, 9, 0, 1], list(range(50, 20, -1))
    sequence = Sequence(prompt, source_pages, SAMPLED, chunk=20)
    while not sequence.output:
        sequence.take(prefill.execute([sequence.next_row()])[0])
    slots = []
    for start in range(0, 50, segment_tokens):
        slot = memoryview(bytearray(1 << 16))
        count = min(segment_tokens, 50 - start)
        byte_count, digest = packed(prefill, source_pages, start, count, slot, True)
        assert byte_count == count * prefill.geometry.token_bytes
        slots.append((start, count, slot, digest))
    for start, count, slot, digest in reversed(slots):
        unpacked(decode, destination_pages, start, count, slot, digest)
    assert prefill.geometry == decode.geometry

    joined = Sequence(prompt, destination_pages, SAMPLED)
    joined.done_tokens, joined.output = 50, list(sequence.output)
    assert run_together(decode, [joined], 10)[0] == expected
