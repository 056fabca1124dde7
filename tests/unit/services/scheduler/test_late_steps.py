"""Steps that the device runs long after they were queued: what is packed and unpacked beside them, by the
numbers that the schedulers give, is never what a step may still write or read."""

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from services.protocol.messages import FirstToken, Sampling, SequenceRequest
from services.scheduler.decode import DecodeScheduler
from services.scheduler.pages import PagePool
from services.scheduler.prefill import PrefillScheduler
from services.scheduler.sequence import Sequence, StepPlan

SIZE = 4


class LateDevice:
    """Which step was the last to be queued that uses a page, and which one writes a token of it."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.used_by: dict[int, int] = {}
        self.written_by: dict[tuple[int, int], int] = {}

    def queue(self, plan: StepPlan) -> None:
        """To be called before the scheduler's `launched`, as a role does."""
        self.pool.step += 1
        for sequence in plan.sequences():
            for page in sequence.pages:
                self.used_by[page] = self.pool.step
        spans = [(one, one.computed_tokens, 1) for one in plan.decodes]
        spans += [(one.sequence, one.start, one.count) for one in plan.chunks]
        for sequence, start, count in spans:
            for token in range(start, start + count):
                self.written_by[sequence.pages[token // SIZE], token % SIZE] = self.pool.step

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        if pairs:
            self.pool.step += 1
            for pair in pairs:
                for page in pair:
                    self.used_by[page] = self.pool.step

    def check_reserved(self, sequence: Sequence) -> None:
        """No step after the named one uses the pages that will be written."""
        fresh = sequence.pages[sequence.cached_tokens // SIZE :]
        latest = max((self.used_by.get(page, 0) for page in fresh), default=0)
        assert latest <= sequence.free_after_step <= self.pool.step

    def check_done(self, sequence: Sequence, passed_step: int) -> None:
        """What counts as computed by then was written by then, and no token of what was is left out; of a
        prefix that was found, no page."""
        done = sequence.tokens_done(passed_step)
        steps = [
            self.written_by[sequence.pages[token // SIZE], token % SIZE]
            for token in range(sequence.computed_tokens)
        ]
        assert all(step <= passed_step for step in steps[:done])
        if done < sequence.computed_tokens:
            unit = SIZE if done < sequence.cached_tokens else 1
            assert max(steps[done : done + unit]) > passed_step


def some_prompt(random: Random, limit: int) -> list[int]:
    """Many begin alike, so that prefixes are found."""
    return [random.randrange(2)] * random.randint(1, limit)


@settings(max_examples=150, deadline=None)
@given(st.integers(8, 40), st.integers(0, 2**32))
def test_pages_that_are_reserved_are_free_after_the_step_that_is_named(pages: int, seed: int) -> None:
    random, pool = Random(seed), PagePool(pages, SIZE)
    scheduler, device = DecodeScheduler(pool, 4, 8), LateDevice(pool)
    reserved: list[Sequence] = []
    for request_id in range(1, 25):
        sampling = Sampling(max_tokens=random.randint(2, 12), seed=1)
        choices = random.randint(1, 3)
        scheduler.add(
            SequenceRequest(request_id, some_prompt(random, pages * SIZE // 2), sampling, choices=choices)
        )
        for _ in range(random.randrange(4)):
            new = scheduler.reserve()
            for sequence in new:
                device.check_reserved(sequence)
            reserved += new
            if reserved and random.random() < 0.7:
                one = reserved.pop(random.randrange(len(reserved))).work
                if one.request_id in scheduler.reservations:
                    scheduler.arrived(one.request_id)
                    scheduler.join(one.request_id, [FirstToken(choice, 7) for choice in one.choice_numbers])
            device.copy(scheduler.start())
            plan = scheduler.schedule()
            if plan:
                device.queue(plan)
                scheduler.launched(plan)
                for sequence in plan.decodes:
                    sequence.settle(9)
                    if len(sequence.tokens) >= sequence.limit_tokens:
                        scheduler.end(sequence.work.request_id, sequence.choices[0])
            if random.random() < 0.3:
                scheduler.end(random.randint(1, request_id))


@settings(max_examples=150, deadline=None)
@given(st.integers(8, 40), st.integers(0, 2**32))
def test_tokens_count_as_computed_with_the_step_that_computes_them(pages: int, seed: int) -> None:
    random, pool = Random(seed), PagePool(pages, SIZE)
    scheduler, device = PrefillScheduler(pool, 4, 8, tail_tokens=2), LateDevice(pool)
    known: list[Sequence] = []
    passed = 0
    for request_id in range(1, 25):
        sampling = Sampling(max_tokens=4, seed=1)
        known.append(
            scheduler.add(SequenceRequest(request_id, some_prompt(random, pages * SIZE // 2), sampling))
        )
        for _ in range(random.randrange(5)):
            if random.random() < 0.5:
                scheduler.confirm(random.randint(1, request_id))
            plan = scheduler.schedule()
            if plan:
                device.queue(plan)
                scheduler.launched(plan)
            passed = random.randint(passed, pool.step)
            for sequence in known:
                if sequence.pages:
                    device.check_done(sequence, passed)
            if random.random() < 0.3:
                scheduler.end(random.randint(1, request_id))
