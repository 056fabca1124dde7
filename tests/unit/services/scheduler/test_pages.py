"""The page pool keeps its books under any sequence of operations, and prefixes are found only if true."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.scheduler.errors import OutOfPages, PageAccountingError
from services.scheduler.pages import PagePool, chain_digest, chain_root

PAGES, SIZE = 12, 4


def publish_all(pool: PagePool, pages: list[int], tokens: list[int], salt: bytes = b"") -> None:
    digest = chain_root(salt)
    for index in range(len(tokens) // SIZE):
        digest = chain_digest(digest, tokens[index * SIZE : (index + 1) * SIZE])
        pool.publish(pages[index], digest, 0)


class PoolMachine(RuleBasedStateMachine):
    """Random holders against a plain model: a list of (pages, tokens) that somebody owns."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PAGES, SIZE)
        self.held: list[tuple[list[int], list[int]]] = []

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=16), publish=st.booleans())
    def take(self, tokens: list[int], publish: bool) -> None:
        cached = self.pool.match_prefix(b"", tokens, len(tokens))
        needed = self.pool.pages_for(len(tokens)) - len(cached)
        if not self.pool.can_allocate(needed):
            self.pool.release(cached)
            return
        pages = cached + self.pool.allocate(needed)
        if publish:
            publish_all(self.pool, pages, tokens)
        self.held.append((pages, tokens))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        pages, tokens = data.draw(st.sampled_from(self.held))
        self.pool.share(pages)
        self.held.append((list(pages), tokens))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        self.pool.release(self.held.pop(index)[0])

    @invariant()
    def books_balance(self) -> None:
        counts = self.pool.counts()
        assert counts.free + counts.cached + counts.used == counts.total == PAGES
        assert counts.used == len({page for pages, _ in self.held for page in pages})
        assert self.pool.available == counts.free + counts.cached

    def teardown(self) -> None:
        for pages, _ in self.held:
            self.pool.release(pages)
        assert self.pool.counts().used == 0
        assert self.pool.can_allocate(PAGES)


TestPoolMachine = PoolMachine.TestCase


def test_a_prefix_is_found_after_its_holder_left() -> None:
    pool = PagePool(4, SIZE)
    tokens = list(range(10))
    pages = pool.allocate(3)
    publish_all(pool, pages, tokens)
    pool.release(pages)
    assert pool.match_prefix(b"", tokens, len(tokens)) == pages[:2]


def test_a_prefix_is_never_longer_than_the_limit() -> None:
    pool = PagePool(4, SIZE)
    tokens = list(range(8))
    pages = pool.allocate(2)
    publish_all(pool, pages, tokens)
    assert pool.match_prefix(b"", tokens, 7) == pages[:1]


def test_tenants_do_not_see_each_other() -> None:
    pool = PagePool(4, SIZE)
    tokens = list(range(8))
    publish_all(pool, pool.allocate(2), tokens, salt=b"alice")
    assert pool.match_prefix(b"bob", tokens, 8) == []
    assert len(pool.match_prefix(b"alice", tokens, 8)) == 2


def test_an_evicted_prefix_is_forgotten() -> None:
    pool = PagePool(2, SIZE)
    tokens = list(range(8))
    pages = pool.allocate(2)
    publish_all(pool, pages, tokens)
    pool.release(pages)
    other = pool.allocate(1)  # evicts the tail: a head without its tail is still a prefix
    assert pool.match_prefix(b"", tokens, 8) == pages[:1]
    assert other == pages[1:]


@given(st.lists(st.integers(0, 1), max_size=24), st.lists(st.integers(0, 1), max_size=24))
def test_a_match_is_exactly_the_common_full_pages(first: list[int], second: list[int]) -> None:
    pool = PagePool(16, SIZE)
    pages = pool.allocate(pool.pages_for(len(first)))
    publish_all(pool, pages, first)
    common = 0
    while (common + 1) * SIZE <= min(len(first), len(second)) and (
        first[: (common + 1) * SIZE] == second[: (common + 1) * SIZE]
    ):
        common += 1
    assert pool.match_prefix(b"", second, len(second)) == pages[:common]


def test_misuse_is_an_error_not_a_leak() -> None:
    pool = PagePool(2, SIZE)
    pages = pool.allocate(1)
    with pytest.raises(OutOfPages):
        pool.allocate(2)
    pool.release(pages)
    with pytest.raises(PageAccountingError):
        pool.release(pages)
    with pytest.raises(PageAccountingError):
        pool.share(pages)
    with pytest.raises(PageAccountingError):
        pool.publish(pages[0], b"digest", 0)
