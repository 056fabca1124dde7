"""The unified role over the real engine: a step in flight while the next is planned changes no token."""

from collections import defaultdict
from typing import Any

import pytest

from services.engine.batch import Row, SampleSpec
from services.engine.engine import Engine
from services.engine.errors import EngineStateError, RowError
from services.protocol.messages import Generate, PrefillDone, Sampling, SequenceRequest, TokenLogprob, Tokens
from services.roles.limits import WorkerLimits
from services.roles.report_queue import ReportQueue
from services.roles.role import Occupancy, WorkerContext
from services.roles.unified import UnifiedRole
from services.scheduler.pages import PagePool
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.engine.harness import GREEDY, Sequence, prompt_of, run_ahead, run_together, start_engine

PAGES = 40
SAMPLED = Sampling(max_tokens=1, seed=11, temperature=0.9, top_p=0.95, logprobs=2)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    directory = make_checkpoint("qwen3", tmp_path_factory.mktemp("model") / "tiny", seed=2, eos=False)
    return start_engine(directory, pages=PAGES)


WORKS = [
    SequenceRequest(1, prompt_of(9), Sampling(max_tokens=12, seed=3, temperature=0.0)),
    SequenceRequest(
        2, prompt_of(30, 1), Sampling(max_tokens=9, seed=4, temperature=0.8, logprobs=3), choices=3
    ),
    SequenceRequest(
        3, prompt_of(5, 2), Sampling(max_tokens=14, seed=5, temperature=1.0, top_p=0.9, top_k=40)
    ),
    SequenceRequest(
        4, prompt_of(17, 3), Sampling(max_tokens=10, seed=6, temperature=0.7, repetition_penalty=1.3)
    ),
    SequenceRequest(5, prompt_of(11, 4), Sampling(max_tokens=8, seed=7, temperature=0.0, prompt_logprobs=1)),
    SequenceRequest(
        6, prompt_of(26, 5), Sampling(max_tokens=20, seed=8, temperature=1.0, frequency_penalty=0.4)
    ),
]


def served(
    engine: Engine, works: list[SequenceRequest], overlap: bool, eos: frozenset[int], pages: int = PAGES
) -> Any:
    """Every choice's tokens, log probabilities and end, and the requests' prompt log probabilities."""
    out: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    logprobs: defaultdict[tuple[int, int], list[TokenLogprob]] = defaultdict(list)
    finished: dict[tuple[int, int], str] = {}
    prompts: dict[int, list[TokenLogprob] | None] = {}

    def send(router: bytes, reports: list[Any]) -> bool:
        for report in reports:
            if isinstance(report, PrefillDone):
                prompts[report.request_id] = report.prompt_logprobs
            elif isinstance(report, Tokens):
                key = (report.request_id, report.choice)
                out[key] += report.tokens
                logprobs[key] += report.logprobs or []
                if report.finish is not None:
                    finished[key] = report.finish
        return True

    pool = PagePool(pages, 4)
    context = WorkerContext(
        engine=engine,
        pool=pool,
        limits=WorkerLimits(VOCAB_SIZE, pages * 4, 8, 100, eos),
        max_chunk_tokens=16,
        outbox=ReportQueue(send),
        clock=lambda: 0.0,
        overlap=overlap,
    )
    role = UnifiedRole(context)
    for work in works:
        role.accept(b"router", Generate(work))
        role.step()
    was_in_flight = False
    while role.step():
        was_in_flight |= role.in_flight
        context.outbox.flush()
    context.outbox.flush()
    assert was_in_flight == overlap
    assert role.occupancy() == Occupancy() and pool.counts().used == 0 and not context.requests
    return dict(out), dict(logprobs), finished, prompts, role.preemptions()


@pytest.mark.parametrize("pages", [PAGES, 12])
def test_the_same_tokens_with_a_step_in_flight(engine: Engine, pages: int) -> None:
    free, *_ = served(engine, WORKS, False, frozenset())
    # tokens that end some choices in the middle
    eos = frozenset({free[1, 0][5], free[2, 1][3], free[3, 0][6]})
    tokens, logprobs, finished, prompts, preemptions = served(engine, WORKS, False, eos, pages)
    overlapped = served(engine, WORKS, True, eos, pages)
    assert overlapped[0] == tokens and overlapped[2] == finished
    assert set(finished.values()) == {"stop", "length"}
    assert (preemptions > 0) == (overlapped[4] > 0) == (pages < PAGES)
    for key, expected in logprobs.items():
        assert [one.logprob for one in overlapped[1][key]] == pytest.approx(
            [one.logprob for one in expected], abs=1e-4
        )
    for request_id, expected_prompt in prompts.items():
        given = overlapped[3][request_id]
        assert (given is None) == (expected_prompt is None)
        assert [one.logprob for one in given or []] == pytest.approx(
            [one.logprob for one in expected_prompt or []], abs=1e-4
        )


def test_launches_ahead_give_the_same_tokens(engine: Engine) -> None:
    """Chunks beside decodes; sequences that stop early; going on from tokens that are known."""
    outputs = []
    for run in (run_together, run_ahead):
        sequences = [
            Sequence(prompt_of(length), list(range(at * 10, at * 10 + 10)), SAMPLED, chunk=7)
            for at, length in enumerate((1, 7, 18))
        ]
        for count, total in ((3, 6), (2, 13), (1, 20)):
            run(engine, sequences[:count], total)
        outputs.append([sequence.output for sequence in sequences])
    assert outputs[0] == outputs[1]
    assert [len(output) for output in outputs[0]] == [20, 13, 6]


def test_a_row_goes_on_from_a_draw_of_the_launch_before(engine: Engine) -> None:
    """Chunks, decodes and several choices in one launch: the draws are counted through the rows as given."""
    prompts = [prompt_of(length, length) for length in (3, 12, 1)]
    tables = [list(range(at * 10, at * 10 + 10)) for at in range(3)]
    sampled = Sampling(max_tokens=1, seed=5)
    rows = []
    for prompt, table in zip(prompts, tables, strict=True):
        rows.append(Row(prompt, 0, table, [SampleSpec(at, len(prompt), sampled, [], []) for at in range(2)]))
    first = engine.launch(rows)
    pending = []
    for at, (prompt, table) in enumerate(zip(prompts, tables, strict=True)):
        end = len(prompt)
        pending.append(
            Row([-1], end, table, [SampleSpec(0, end + 1, sampled, [], [])], sampled_by=2 * at + 1)
        )
    second = engine.launch(pending)
    sampled = [result.sampled[1].token for result in first.collect()]
    assert len(set(sampled)) == 3
    found = [result.sampled[0].token for result in second.collect()]
    for row, token in zip(pending, sampled, strict=True):
        row.tokens, row.sampled_by = [token], -1
    assert found == [result.sampled[0].token for result in engine.execute(pending)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row([-1], 1, [0], sampled_by=1), "wants sample 1 of 1"),
        (Row([1, 2], 1, [0], sampled_by=0), "row of 2 tokens"),
    ],
)
def test_draws_that_were_not_are_refused(engine: Engine, row: Row, message: str) -> None:
    engine.execute([Row([1], 0, [0], [SampleSpec(0, 1, GREEDY, [], [])])])
    with pytest.raises(RowError, match=message):
        engine.launch([row])


def test_a_launch_is_collected_once_and_only_its_own(engine: Engine) -> None:
    sequences = [Sequence(prompt_of(6, at), list(range(at * 5, at * 5 + 5))) for at in range(2)]
    expected = run_together(engine, [Sequence(one.prompt, one.pages) for one in sequences], 1)
    launches = [engine.launch([sequence.next_row()]) for sequence in sequences]
    found = [[sampled.token for sampled in launched.collect()[0].sampled] for launched in launches]
    assert found == expected
    with pytest.raises(EngineStateError, match="collected once"):
        launches[0].collect()
