"""The decoding roles with a step always in flight: the same tokens as one step after the other, whatever
arrives, is cancelled, ends or runs out of pages meanwhile, and nothing is left at rest."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import product, repeat
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.batch import Row, RowResult, SampledToken
from services.protocol.messages import (
    Cancel,
    Failed,
    FirstToken,
    Generate,
    ReserveKv,
    Sampling,
    SequenceRequest,
    StartDecode,
    Tokens,
)
from services.roles.decode import DecodeRole
from services.roles.limits import WorkerLimits
from services.roles.report_queue import ReportQueue
from services.roles.role import Occupancy, Role, WorkerContext
from services.roles.unified import UnifiedRole
from services.scheduler.pages import PagePool, chain_digest, chain_root
from services.scheduler.sequence import PENDING, Sequence, State
from services.transfer.receiver import Settled
from tests.unit.services.scheduler.harness import next_token

SIZE = 4
EOS = frozenset(range(5))
"""A tenth of what `next_token` draws."""
ROUTER = b"router"


class FakeLaunched:
    """Not known to be done before it has been asked `delay` times."""

    def __init__(self, results: list[RowResult], delay: int, failed: bool) -> None:
        self.results, self.delay, self.failed = results, delay, failed
        self.done = None

    @property
    def is_done(self) -> bool:
        self.delay -= 1
        return self.delay < 0

    def collect(self) -> list[RowResult]:
        assert self.delay < 0, "collected before it was done"
        if self.failed:
            raise RuntimeError("the device failed")
        return self.results


class FakeDevice:
    """An engine whose steps are known to the host only when they are collected, but done in order.

    What a row reads back from its pages must be its sequence, and the next token is a function of that.
    """

    device = SimpleNamespace(type="cpu")

    def __init__(self, pages: int) -> None:
        self.content = [[PENDING] * SIZE for _ in range(pages)]
        self.sampled: list[int] = []
        self.launches = 0
        self.queued_step = 0
        self.fails: set[int] = set()
        """Launches whose collection fails."""
        self.delays: Iterator[int] = repeat(0)
        """How often each launch is asked in vain whether it is done."""

    def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
        self.queued_step += bool(pairs)
        for source, target in pairs:
            self.content[target] = list(self.content[source])

    def write(self, pages: list[int], start: int, tokens: list[int]) -> None:
        for position, token in enumerate(tokens, start):
            self.content[pages[position // SIZE]][position % SIZE] = token

    def launch(self, rows: list[Row]) -> Any:
        self.launches += 1
        self.queued_step += 1
        results = [RowResult([SampledToken(token) for token in self._row(row)]) for row in rows]
        self.sampled = [sampled.token for result in results for sampled in result.sampled]
        return FakeLaunched(results, next(self.delays), self.launches in self.fails)

    def _row(self, row: Row) -> list[int]:
        tokens = row.tokens if row.sampled_by < 0 else [self.sampled[row.sampled_by]]
        assert PENDING not in tokens
        self.write(row.pages, row.start, tokens)
        end = row.start + len(tokens)
        prefix = [self.content[row.pages[at // SIZE]][at % SIZE] for at in range(end)]
        assert PENDING not in prefix
        for draw in row.samples:
            assert draw.position == end
            if draw.sampling.presence_penalty:
                assert draw.prompt + draw.output == prefix
        return [next_token(prefix, draw.choice) for draw in row.samples]


class FakeReceiver:
    """KV that has arrived as soon as it is asked for."""

    ready, in_flight = True, False

    def __init__(self, device: FakeDevice) -> None:
        self.device = device

    def open(self, sequence: Sequence, transfer_id: int, source: object, deadline_s: float) -> bool:
        self.device.write(sequence.pages, 0, sequence.tokens)
        return True

    def settle(self) -> Settled:
        return Settled()

    def end(self, transfer_id: int, abort_reason: str | None = None) -> bool:
        return False


class Served:
    """One role, what is asked of it and what it reports."""

    def __init__(self, kind: type[Role], pages: int, overlap: bool, max_batch: int = 4) -> None:
        self.pool = PagePool(pages, SIZE)
        self.device = FakeDevice(pages)
        self.limits = WorkerLimits(1000, pages * SIZE, max_batch, 1000, EOS)
        self.out: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        self.finished: set[tuple[int, int]] = set()
        self.failed: set[int] = set()
        self.silent: set[tuple[int, int | None]] = set()
        """What was cancelled: nothing may be reported of it any more."""
        self.works: dict[int, SequenceRequest] = {}
        context = WorkerContext(
            engine=self.device,  # type: ignore[arg-type]
            pool=self.pool,
            limits=self.limits,
            max_chunk_tokens=8,
            outbox=ReportQueue(self._reported),
            clock=lambda: 0.0,
            overlap=overlap,
        )
        self.context = context
        receiver: Any = FakeReceiver(self.device)
        self.role = UnifiedRole(context) if kind is UnifiedRole else DecodeRole(context, receiver)

    def expected(self, work: SequenceRequest, choice: int) -> list[int]:
        tokens = list(work.prompt)
        while True:
            tokens.append(next_token(tokens, choice))
            output = len(tokens) - len(work.prompt)
            at_limit = output == work.sampling.max_tokens or len(tokens) == self.limits.max_sequence_tokens
            if at_limit or (tokens[-1] in EOS and not work.sampling.ignore_eos):
                return tokens[len(work.prompt) :]

    def add(self, work: SequenceRequest) -> None:
        self.works[work.request_id] = work
        if isinstance(self.role, UnifiedRole):
            self.role.accept(ROUTER, Generate(work))
            return
        self.role.accept(ROUTER, ReserveKv(work, work.request_id, None))  # type: ignore[arg-type]
        going = []
        for choice in range(work.choices):  # the prefill worker's part
            tokens = self.expected(work, choice)
            self.out[work.request_id, choice] = tokens[:1]
            if len(tokens) > 1:
                going.append(FirstToken(choice, tokens[0]))
            else:
                self.finished.add((work.request_id, choice))
        if going:
            self.role.accept(ROUTER, StartDecode(work.request_id, going))
        else:
            self.role.accept(ROUTER, Cancel(work.request_id))

    def cancel(self, request_id: int, choice: int | None) -> None:
        self.role.accept(ROUTER, Cancel(request_id, choice))
        self.silent.add((request_id, choice))

    def step(self) -> bool:
        busy = self.role.step()
        self.context.outbox.flush()
        counts = self.pool.counts()
        assert counts.free + counts.cached + counts.used == counts.total
        assert busy or not self.role.in_flight
        return busy

    def run(self, most: int = 5000) -> None:
        for _ in range(most):
            if not self.step():
                return
        raise AssertionError("never at rest")

    def check(self) -> None:
        assert self.role.occupancy() == Occupancy() and not self.role.in_flight
        assert len(self.context.requests) == 0 and self.pool.counts().used == 0
        truth: dict[bytes, list[int]] = {}
        for work in self.works.values():
            for choice in range(work.choices):
                expected, key = self.expected(work, choice), (work.request_id, choice)
                if work.request_id in self.failed or self.silent & {key, (work.request_id, None)}:
                    assert self.out[key] == expected[: len(self.out[key])]
                else:
                    assert self.out[key] == expected and key in self.finished
                truth |= page_contents(work.salt, work.prompt + expected)
        for digest, page in self.pool._page_of.items():
            assert self.device.content[page] == truth[digest], "published is what was not computed"

    def _reported(self, router: bytes, reports: list[Any]) -> bool:
        for report in reports:
            if isinstance(report, Failed):
                self.failed.add(report.request_id)
            if isinstance(report, Tokens):
                key = (report.request_id, report.choice)
                assert not self.silent & {key, (report.request_id, None)} and key not in self.finished
                self.out[key] += report.tokens
                if report.finish is not None:
                    self.finished.add(key)
        return True


def page_contents(salt: bytes, tokens: list[int]) -> dict[bytes, list[int]]:
    contents: dict[bytes, list[int]] = {}
    digest = chain_root(salt)
    for start in range(0, len(tokens) - SIZE + 1, SIZE):
        digest = chain_digest(digest, tokens[start : start + SIZE])
        contents[digest] = tokens[start : start + SIZE]
    return contents


def random_work(random: Random, request_id: int, largest_tokens: int) -> SequenceRequest:
    prompt = [random.randrange(2) for _ in range(random.randint(1, min(20, largest_tokens - 1)))]
    sampling = Sampling(
        max_tokens=random.randint(1, 30),
        seed=request_id,
        presence_penalty=0.5 if random.random() < 0.15 else 0.0,
    )
    return SequenceRequest(request_id, prompt, sampling, choices=random.randint(1, 3))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([UnifiedRole, DecodeRole]),
    st.booleans(),
    st.integers(8, 40),
    st.integers(1, 10),
    st.integers(0, 2**32),
)
def test_every_choice_gets_its_tokens(
    kind: type[Role], overlap: bool, pages: int, requests: int, seed: int
) -> None:
    random = Random(seed)
    served = Served(kind, pages, overlap)
    if overlap:
        served.device.delays = (random.choice((0, 0, 1, 3)) for _ in repeat(None))
    for request_id in range(1, requests + 1):
        served.add(random_work(random, request_id, pages * SIZE))
        for _ in range(random.randrange(6)):
            served.step()
        if random.random() < 0.3:
            served.cancel(random.randint(1, request_id), random.choice([None, 0, 1]))
    served.run()
    served.check()


@pytest.mark.parametrize("kind", [UnifiedRole, DecodeRole])
def test_a_step_is_launched_before_the_one_before_is_collected(kind: type[Role]) -> None:
    """And none beyond the last that is needed: the length of a choice is known before its last token."""
    served = Served(kind, 40, overlap=True)
    work = next(
        work
        for prompt in range(100)
        if len(served.expected(work := SequenceRequest(1, [prompt], Sampling(max_tokens=9, seed=1)), 0)) == 9
    )
    served.add(work)
    while len(served.out[1, 0]) < 5:
        served.step()
    launches, tokens = served.device.launches, len(served.out[1, 0])
    served.step()
    assert (served.device.launches, len(served.out[1, 0])) == (launches + 1, tokens + 1)
    assert served.role.in_flight
    served.run()
    served.check()
    prefill = 1 if kind is UnifiedRole else 0
    assert served.device.launches == 8 + prefill


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kind", [UnifiedRole, DecodeRole])
def test_a_failed_step_fails_the_requests_it_touched(kind: type[Role], overlap: bool) -> None:
    served = Served(kind, 60, overlap)
    for request_id in (1, 2):
        served.add(
            SequenceRequest(request_id, [9, request_id], Sampling(max_tokens=40, seed=1, ignore_eos=True))
        )
    for _ in range(4):
        served.step()
    served.device.fails = {served.device.launches + 1}
    served.step()
    later = SequenceRequest(3, [9, 1, 2, 3], Sampling(max_tokens=6, seed=1))
    served.add(later)
    served.run()
    assert served.failed >= {1, 2}
    assert (3 in served.failed) == overlap, "its step went on from what the failed one computed"
    assert served.context.counters["engine_errors"] == 1
    served.works = {} if overlap else {3: later}
    served.check()
    assert not served.pool.match_prefix(b"", [9, 1], 2)
    again = SequenceRequest(4, [9, 1, 2, 3], Sampling(max_tokens=6, seed=1))
    served.works = {}
    served.add(again)
    served.run()
    served.check()


def test_a_prompt_that_loses_its_pages_while_its_end_is_in_flight_is_computed_again() -> None:
    """An older choice crosses a page border just then, which its prompt's length decides."""
    lost = 0
    for length, pages in product(range(4, 12), (11, 12, 13)):
        served = Served(UnifiedRole, pages, overlap=True)
        served.add(SequenceRequest(1, [7] * length, Sampling(max_tokens=25, seed=1, ignore_eos=True)))
        served.step()
        served.add(SequenceRequest(2, [8] * 36, Sampling(max_tokens=5, seed=1, ignore_eos=True), choices=2))
        busy = True
        while busy:
            step = served.role._step_in_flight  # type: ignore[attr-defined]
            ends = [one.sequence for one in step.plan.chunks if one.samples] if step else []
            busy = served.step()
            lost += any(sequence.state is State.WAITING for sequence in ends)
        served.check()
    assert lost
