"""The unified scheduler: every choice gets its tokens, under memory pressure too, and nothing is left."""

from hypothesis import given, settings
from hypothesis import strategies as st

from services.protocol.messages import FirstToken, SequenceRequest
from services.scheduler.pages import PagePool
from services.scheduler.sequence import PENDING, Sequence, State
from services.scheduler.unified import UnifiedScheduler
from tests.unit.services.scheduler.harness import FakeKv, expected, work

SIZE = 4


def drive(
    works: list[SequenceRequest],
    pool: PagePool,
    max_batch: int = 8,
    chunk: int = 16,
    max_steps: int = 5000,
    overlap: bool = False,
) -> dict[tuple[int, int], list[int]]:
    """Run everything to its end; returns the tokens of each (request, choice). With `overlap`, a step's
    tokens are told to the scheduler only after the next step was launched."""
    scheduler, kv = UnifiedScheduler(pool, max_batch, chunk), FakeKv(pool)
    out: dict[tuple[int, int], list[int]] = {}
    in_flight: list[tuple[Sequence, list[int]]] = []
    for one in works:
        scheduler.add(one)
    for _ in range(max_steps):
        plan = scheduler.schedule()
        if not plan and not in_flight:
            break
        assert plan.tokens == len(plan.decodes) + sum(one.count for one in plan.chunks)
        assert len(plan.decodes) <= max_batch and plan.tokens <= max(chunk, max_batch)
        sampled = kv.compute(plan)
        scheduler.launched(plan)
        settled, in_flight = (in_flight, sampled) if overlap else (sampled, [])
        for sequence, tokens in settled:
            if tokens and sequence.state is not State.ENDED:
                take(scheduler, kv, sequence, tokens, out)
    assert len(scheduler) == 0, "requests are left"
    assert not len(scheduler.batch) and not scheduler.batch.resuming and not scheduler.waiting
    assert pool.counts().used == 0
    return out


def take(
    scheduler: UnifiedScheduler,
    kv: FakeKv,
    sequence: Sequence,
    tokens: list[int],
    out: dict[tuple[int, int], list[int]],
) -> None:
    """A sequence's sampled tokens become known."""
    request_id = sequence.work.request_id
    if len(sequence.tokens) > sequence.prompt_tokens:
        choice = sequence.choices[0]
        out[request_id, choice].append(tokens[0])
        assert sequence.settle(tokens[0]) == len(out[request_id, choice])
        if len(out[request_id, choice]) == sequence.work.sampling.max_tokens:
            scheduler.end(request_id, choice)
    elif sequence.state is State.RUNNING:
        going = []
        for choice, token in zip(sequence.choices, tokens, strict=True):
            out[request_id, choice] = [token]
            if sequence.work.sampling.max_tokens > 1:
                going.append(FirstToken(choice, token))
        kv.copy_pages(scheduler.fork(sequence, going))


works_strategy = st.lists(
    st.tuples(
        st.lists(st.integers(0, 1), min_size=1, max_size=20),
        st.integers(1, 8),
        st.integers(1, 3),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(works_strategy, st.integers(8, 30), st.integers(3, 20), st.booleans(), st.booleans())
def test_every_choice_gets_its_tokens(
    specs: list[tuple[list[int], int, int]], pages: int, chunk: int, prefix_cache: bool, overlap: bool
) -> None:
    works = [work(i + 1, prompt, count, choices) for i, (prompt, count, choices) in enumerate(specs)]
    out = drive(works, PagePool(pages, SIZE, prefix_cache), max_batch=3, chunk=chunk, overlap=overlap)
    for one in works:
        for choice in range(one.choices):
            wanted = expected(one.prompt, choice, one.sampling.max_tokens)
            assert out[one.request_id, choice] == wanted


def test_decodes_come_before_chunks() -> None:
    pool = PagePool(64, SIZE)
    scheduler, kv = UnifiedScheduler(pool, 8, 8), FakeKv(pool)
    first = scheduler.add(work(1, [1, 2]))
    plan = scheduler.schedule()
    kv.compute(plan)
    scheduler.launched(plan)
    scheduler.fork(first, [FirstToken(0, 5)])
    scheduler.add(work(2, list(range(30))))
    plan = scheduler.schedule()
    assert [one.work.request_id for one in plan.decodes] == [1]
    assert [(one.sequence.work.request_id, one.count) for one in plan.chunks] == [(2, 7)]


def test_pressure_preempts_the_youngest() -> None:
    pool = PagePool(6, SIZE)
    scheduler, kv = UnifiedScheduler(pool, 8, 32), FakeKv(pool)
    prompts = {one: scheduler.add(work(one, [one] * 7, max_tokens=20)) for one in (1, 2)}
    plan = scheduler.schedule()
    kv.compute(plan)
    scheduler.launched(plan)
    for request_id, prompt in prompts.items():
        scheduler.fork(prompt, [FirstToken(0, request_id)])
    for _ in range(40):
        plan = scheduler.schedule()
        kv.compute(plan)
        scheduler.launched(plan)
        for sequence in plan.decodes:
            sequence.settle(9)
        if scheduler.batch.resuming:
            break
    assert [one.work.request_id for one in scheduler.batch.resuming] == [2]
    assert scheduler.batch.preemptions == 1
    for request_id in prompts:
        assert scheduler.end(request_id)
    assert pool.counts().used == 0


def test_a_preempted_choice_waits_for_the_token_it_was_drawn() -> None:
    pool = PagePool(6, SIZE)
    scheduler = UnifiedScheduler(pool, 8, 32)
    prompts = {one: scheduler.add(work(one, [one] * 7, max_tokens=20)) for one in (1, 2)}
    scheduler.launched(scheduler.schedule())
    for request_id, prompt in prompts.items():
        scheduler.fork(prompt, [FirstToken(0, request_id)])
    in_flight: list[Sequence] = []
    while True:
        plan = scheduler.schedule()
        scheduler.launched(plan)
        if scheduler.batch.resuming:
            break
        for sequence in in_flight:
            sequence.settle(9)
        in_flight = plan.decodes
    [waiting] = scheduler.batch.resuming
    assert waiting in in_flight and waiting.tokens[-1] == PENDING
    scheduler.end(1)
    assert not scheduler.schedule() and scheduler.batch.resuming == [waiting]
    waiting.settle(9)
    assert [one.sequence for one in scheduler.schedule().chunks] == [waiting]
    assert scheduler.end(2) and pool.counts().used == 0


def test_a_placeholder_is_never_part_of_a_prefix() -> None:
    """A choice that ends while two of its tokens are unknown, the first of which fills a page."""
    pool = PagePool(8, SIZE)
    scheduler, kv = UnifiedScheduler(pool, 8, 32), FakeKv(pool)
    prompt = scheduler.add(work(1, [1] * 6, max_tokens=20))
    kv.compute(plan := scheduler.schedule())
    scheduler.launched(plan)
    scheduler.fork(prompt, [FirstToken(0, 5)])
    for _ in range(2):
        kv.compute(plan := scheduler.schedule())
        scheduler.launched(plan)
    [sequence] = plan.decodes
    assert sequence.tokens == [1] * 6 + [5, PENDING, PENDING] and sequence.computed_tokens == 8
    scheduler.end(1)
    assert pool.counts().cached == 1, "the second page holds a token that nobody knows"
    assert len(pool.match_prefix(b"", [1] * 4, 4)) == 1


@settings(max_examples=60, deadline=None)
@given(works_strategy, st.data())
def test_ending_anything_at_any_time_leaves_nothing(
    specs: list[tuple[list[int], int, int]], data: st.DataObject
) -> None:
    pool = PagePool(20, SIZE)
    scheduler, kv = UnifiedScheduler(pool, 4, 8), FakeKv(pool)
    for i, (prompt, count, choices) in enumerate(specs):
        scheduler.add(work(i + 1, prompt, count, choices))
    for _ in range(data.draw(st.integers(0, 12))):
        plan = scheduler.schedule()
        sampled = kv.compute(plan)
        scheduler.launched(plan)
        for sequence, tokens in sampled:
            if tokens and len(sequence.tokens) == sequence.prompt_tokens:
                firsts = [FirstToken(c, t) for c, t in zip(sequence.choices, tokens, strict=True)]
                kv.copy_pages(scheduler.fork(sequence, firsts))
            elif tokens:
                sequence.settle(tokens[0])
        victim = data.draw(st.integers(1, len(specs)))
        choice = data.draw(st.sampled_from([None, 0, 1, 2]))
        scheduler.end(victim, choice)
    for request_id in range(1, len(specs) + 1):
        scheduler.end(request_id)
    assert len(scheduler) == 0 and pool.counts().used == 0
    assert not len(scheduler.batch) and not scheduler.batch.resuming and not scheduler.waiting
