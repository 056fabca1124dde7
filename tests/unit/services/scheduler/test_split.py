"""Prefill and decode schedulers together: computed on one, KV copied, decoded on the other."""

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from services.protocol.messages import FirstToken
from services.scheduler.decode import DecodeScheduler
from services.scheduler.pages import PagePool
from services.scheduler.prefill import PrefillScheduler
from services.scheduler.sequence import State
from tests.unit.services.scheduler.harness import FakeKv, expected, work


class Pair:
    """Both schedulers, and a transfer that copies KV by token, whatever the page sizes."""

    def __init__(self, prefill_pages: int, decode_pages: int, prefill_size: int, decode_size: int) -> None:
        self.prefill_pool = PagePool(prefill_pages, prefill_size)
        self.decode_pool = PagePool(decode_pages, decode_size)
        self.prefill = PrefillScheduler(self.prefill_pool, 4, 8)
        self.decode = DecodeScheduler(self.decode_pool, 4, 8)
        self.prefill_kv, self.decode_kv = FakeKv(self.prefill_pool), FakeKv(self.decode_pool)
        self.out: dict[tuple[int, int], list[int]] = {}
        self.reserved: dict[int, int] = {}

    def reserve(self) -> None:
        for sequence in self.decode.reserve():
            request_id = sequence.work.request_id
            self.reserved[request_id] = sequence.cached_tokens
            self.prefill.confirm(request_id)

    def prefill_step(self) -> bool:
        plan = self.prefill.schedule()
        sampled = self.prefill_kv.compute(plan)
        self.prefill.launched(plan)
        for sequence, tokens in sampled:
            if tokens:
                self._first_tokens(sequence.work.request_id, sequence.choices, tokens)
                sequence.choices = []
        return bool(plan)

    def _first_tokens(self, request_id: int, choices: list[int], tokens: list[int]) -> None:
        sequence = self.prefill.get(request_id)
        assert sequence is not None
        going = []
        for choice, token in zip(choices, tokens, strict=True):
            assert (request_id, choice) not in self.out, "first token drawn twice"
            self.out[request_id, choice] = [token]
            if sequence.work.sampling.max_tokens > 1:
                going.append(FirstToken(choice, token))
        if going:
            self.decode.join(request_id, going)
        else:
            self.prefill.end(request_id)
            self.decode.end(request_id)

    def transfer(self) -> None:
        for request_id, sequence in list(self.prefill.holding.items()):
            target = self.decode.reservations.get(request_id)
            if request_id not in self.reserved or target is None:
                continue
            have = self.reserved[request_id]
            kv = self.prefill_kv.read(sequence.pages, sequence.prompt_tokens)[have:]
            self.decode_kv.write(target.prompt.pages, have, kv)  # type: ignore[arg-type]
            self.decode.arrived(request_id)
            self.prefill.end(request_id)

    def decode_step(self) -> bool:
        self.decode_kv.copy_pages(self.decode.start())
        plan = self.decode.schedule()
        sampled = self.decode_kv.compute(plan)
        self.decode.launched(plan)
        for sequence, tokens in sampled:
            if tokens:
                key = (sequence.work.request_id, sequence.choices[0])
                sequence.settle(tokens[0])
                self.out[key].append(tokens[0])
                if len(self.out[key]) == sequence.work.sampling.max_tokens:
                    self.decode.end(*key)
        return bool(plan)

    def at_rest(self) -> bool:
        return (
            len(self.prefill) == len(self.decode) == 0
            and self.prefill_pool.counts().used == self.decode_pool.counts().used == 0
            and len(self.prefill.batch) == len(self.decode.batch) == 0
        )


specs_strategy = st.lists(
    st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=18), st.integers(1, 6), st.integers(1, 3)),
    min_size=1,
    max_size=7,
)


@settings(max_examples=150, deadline=None)
@given(
    specs_strategy,
    st.integers(8, 24),
    st.integers(8, 24),
    st.sampled_from([2, 4]),
    st.sampled_from([2, 4]),
    st.integers(0, 2**32),
)
def test_every_choice_gets_its_tokens_whatever_the_interleaving(
    specs: list[tuple[list[int], int, int]], pages_p: int, pages_d: int, size_p: int, size_d: int, seed: int
) -> None:
    random = Random(seed)
    pair = Pair(pages_p * 4 // size_p, pages_d * 4 // size_d, size_p, size_d)
    works = [work(i + 1, prompt, count, choices) for i, (prompt, count, choices) in enumerate(specs)]
    for one in works:
        pair.prefill.add(one)
        pair.decode.add(one)
    actions = [pair.reserve, pair.prefill_step, pair.transfer, pair.decode_step]
    for _ in range(3000):
        random.choice(actions)()
        if pair.at_rest():
            break
    for action in actions * 400:  # whatever chance left undone
        action()
    assert pair.at_rest()
    for one in works:
        for choice in range(one.choices):
            assert pair.out[one.request_id, choice] == expected(one.prompt, choice, one.sampling.max_tokens)


def test_confirmed_prompts_run_before_unconfirmed_ones() -> None:
    scheduler = PrefillScheduler(PagePool(32, 4), 4, 8)
    scheduler.add(work(1, [1] * 6))
    scheduler.add(work(2, [2] * 6))
    scheduler.confirm(2)
    assert [one.sequence.work.request_id for one in scheduler.schedule().chunks] == [2]


def test_an_unconfirmed_prompt_gives_its_pages_to_a_confirmed_one_and_is_not_drawn_twice() -> None:
    pool = PagePool(4, 4)
    scheduler = PrefillScheduler(pool, 4, 16)
    first = scheduler.add(work(1, [1] * 12))
    plan = scheduler.schedule()
    assert plan.chunks[0].samples
    scheduler.launched(plan)
    first.choices = []  # the role has reported its first token
    assert first.state is State.HOLDING
    scheduler.add(work(2, [2] * 12))
    scheduler.confirm(2)
    plan = scheduler.schedule()
    assert [one.sequence.work.request_id for one in plan.chunks] == [2]
    assert first.state is State.WAITING and not first.pages
    scheduler.launched(plan)
    scheduler.end(2)
    assert not scheduler.schedule(), "nothing to gain from computing it before it is confirmed"
    scheduler.confirm(1)
    plan = scheduler.schedule()
    assert [(one.sequence.work.request_id, one.samples) for one in plan.chunks] == [(1, ())]
    scheduler.launched(plan)
    scheduler.end(1)
    assert pool.counts().used == 0


def test_no_pages_no_reservation() -> None:
    scheduler = DecodeScheduler(PagePool(4, 4), 4, 8)
    scheduler.add(work(1, [1] * 12))
    scheduler.add(work(2, [2] * 12))
    assert [one.work.request_id for one in scheduler.reserve()] == [1]
    assert scheduler.reserve() == []
    scheduler.end(1)
    assert [one.work.request_id for one in scheduler.reserve()] == [2]
    assert scheduler.end(2)


def test_a_fully_cached_prompt_needs_no_transfer() -> None:
    scheduler = DecodeScheduler(PagePool(8, 4), 4, 8)
    for request_id in (1, 2):
        scheduler.add(work(request_id, [3] * 8))
        [sequence] = scheduler.reserve()
        if request_id == 1:
            assert sequence.cached_tokens == 0
            scheduler.arrived(1)
            scheduler.end(1)
        else:
            assert sequence.cached_tokens == 8
    scheduler.end(2)


def test_choices_ended_before_they_start_end_the_request() -> None:
    scheduler = DecodeScheduler(PagePool(8, 4), 4, 8)
    scheduler.add(work(1, [3] * 5, choices=3))
    scheduler.reserve()
    scheduler.join(1, [FirstToken(0, 1), FirstToken(2, 1)])
    assert not scheduler.end(1, 0)
    assert scheduler.end(1, 2), "choice 1 had already ended with its first token"
    assert len(scheduler) == 0 and scheduler.batch.pool.counts().used == 0
