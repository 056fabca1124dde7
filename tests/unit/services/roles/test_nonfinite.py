"""Requests whose numbers are not finite, on the decoding roles with a step in flight: exactly they fail, and
nothing of what they computed from there on is found as a prefix."""

from itertools import repeat
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.batch import Row
from services.protocol.messages import Cancel, Failed, Sampling, SequenceRequest
from services.roles.decode import DecodeRole
from services.roles.role import Role
from services.roles.unified import UnifiedRole
from tests.unit.services.roles.test_overlap import SIZE, FakeDevice, Served, page_contents

BAD = frozenset({2, 13, 17, 23, 31})
"""Tokens whose numbers are not finite. 2 ends a choice, so that only a step launched too far computes it."""


class Spoiling(FakeDevice):
    """Says of each row where its first bad token is. What a row only reads does not show, as in a pool that
    keeps no NaN."""

    def launch(self, rows: list[Row]) -> Any:
        sampled = self.sampled
        launched = super().launch(rows)
        for row, result in zip(rows, launched.results, strict=True):
            tokens = row.tokens if row.sampled_by < 0 else [sampled[row.sampled_by]]
            for position, token in enumerate(tokens, row.start):
                if token in BAD:
                    result.spoil(position)
        return launched


class Judged(Served):
    def __init__(self, kind: type[Role], pages: int, overlap: bool) -> None:
        super().__init__(kind, pages, overlap)
        self.device = self.context.engine = Spoiling(pages)  # type: ignore[assignment]
        if isinstance(self.role, DecodeRole):
            self.role.receiver.device = self.device  # type: ignore[attr-defined]
        self.codes: dict[int, str] = {}

    def is_bad(self, work: SequenceRequest) -> bool:
        outputs = [self.expected(work, choice)[:-1] for choice in range(work.choices)]
        return not BAD.isdisjoint([*work.prompt, *(token for output in outputs for token in output)])

    def check(self) -> None:
        cancelled = {request_id for request_id, _ in self.silent}
        bad = {one.request_id for one in self.works.values() if self.is_bad(one)}
        assert self.failed - cancelled == bad - cancelled
        assert set(self.codes.values()) <= {"invalid_logits"}
        assert self.context.counters["requests_failed_invalid_logits"] == len(self.failed)
        super().check()
        for work in self.works.values():
            for choice in range(work.choices):
                tokens = work.prompt + self.expected(work, choice)
                sound = next((at for at, token in enumerate(tokens) if token in BAD), len(tokens))
                contents, kept = (page_contents(work.salt, part) for part in (tokens, tokens[:sound]))
                assert not self.pool._page_of.keys() & (contents.keys() - kept.keys())

    def _reported(self, router: bytes, reports: list[Any]) -> bool:
        self.codes |= {one.request_id: one.code for one in reports if isinstance(one, Failed)}
        return super()._reported(router, reports)


def some_work(random: Random, request_id: int, kind: type[Role], largest_tokens: int) -> SequenceRequest:
    """Prompts that begin alike, of a decode role without a bad token: those end at the prefill worker."""
    length = random.randint(1, min(20, largest_tokens - 1))
    rare = [13] if kind is UnifiedRole else [1]
    prompt = [random.choice([0, 0, 0, 0, 0, 0, 0, 1, *rare]) for _ in range(length)]
    if random.random() < 0.5:
        prompt = [0] * length
        if kind is UnifiedRole and length > 6:
            prompt[6] = 13
    sampling = Sampling(max_tokens=random.randint(1, 30), seed=1)
    return SequenceRequest(request_id, prompt, sampling, choices=random.randint(1, 3))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([UnifiedRole, DecodeRole]),
    st.booleans(),
    st.integers(8, 40),
    st.integers(1, 10),
    st.integers(0, 2**32),
)
def test_exactly_the_bad_requests_fail(
    kind: type[Role], overlap: bool, pages: int, requests: int, seed: int
) -> None:
    random = Random(seed)
    judged = Judged(kind, pages, overlap)
    if overlap:
        judged.device.delays = (random.choice((0, 0, 1, 3)) for _ in repeat(None))
    for request_id in range(1, requests + 1):
        judged.add(some_work(random, request_id, kind, pages * SIZE))
        for _ in range(random.randrange(6)):
            judged.step()
        if random.random() < 0.2:
            judged.cancel(random.randint(1, request_id), None)
    judged.run()
    judged.check()


def test_one_that_took_the_pages_before_it_was_known() -> None:
    """The second request finds the first one's prompt while that step is in flight, and computes only what
    follows; one that shares no more than what comes before the bad token goes on."""
    judged = Judged(UnifiedRole, 40, overlap=True)
    limits = Sampling(max_tokens=3, seed=1, ignore_eos=True)
    judged.add(SequenceRequest(1, [0, 0, 0, 0, 0, 13, 0, 0], limits))
    judged.step()
    judged.add(SequenceRequest(2, [0, 0, 0, 0, 0, 13, 0, 0, 1], limits))
    judged.add(SequenceRequest(3, [0, 0, 0, 0, 0, 0, 1], limits))
    judged.step()
    assert judged.failed == {1, 2}
    assert judged.pool.prefix_hits_tokens == 12
    judged.run()
    judged.check()


@pytest.mark.parametrize("kind", [UnifiedRole, DecodeRole])
def test_what_ended_before_it_was_known_leaves_no_prefix(kind: type[Role]) -> None:
    judged = Judged(kind, 40, overlap=True)
    work = next(
        work
        for first in range(200)
        if first not in BAD
        and judged.is_bad(
            work := SequenceRequest(1, [first], Sampling(max_tokens=12, seed=1, ignore_eos=True))
        )
    )
    judged.add(work)
    tokens = work.prompt + judged.expected(work, 0)
    bad_at = next(at for at, token in enumerate(tokens) if token in BAD)
    while len(judged.out[1, 0]) < bad_at:
        judged.step()
    assert judged.role.in_flight and not judged.failed
    judged.role.accept(b"router", Cancel(1))
    judged.silent.add((1, None))
    judged.run()
    judged.check()
