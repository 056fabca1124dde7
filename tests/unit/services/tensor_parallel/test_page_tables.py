"""Page tables by number: whatever the leader's lists do, all ranks run on the same ones."""

from random import Random

import pytest

from services.engine.batch import Row, SampleSpec
from services.protocol.messages import Sampling
from services.tensor_parallel.messages import Grown, Step
from services.tensor_parallel.page_tables import PageTables, SentPageTables

DRAW = SampleSpec(0, 1, Sampling(max_tokens=1, seed=7), [], [])


def test_ranks_see_the_leaders_pages_in_lists_that_last() -> None:
    """Random sequences grow, end and come back, far more than the book keeps at a time."""
    random = Random(5)
    book, rank = SentPageTables(capacity=6), PageTables()
    lists: list[list[int]] = [[random.randrange(100)] for _ in range(20)]
    sent_pages = 0
    for _ in range(300):
        chosen = random.sample(range(20), random.randint(1, 8))
        for at in chosen:
            if random.random() < 0.2:
                lists[at] = [random.randrange(100)]
            lists[at] += random.choices(range(100), k=random.randint(0, 2))
        rows = [Row([1], 0, lists[at], [DRAW]) for at in chosen]
        step, own = book.step(rows)
        there = rank.rows(step)
        assert [row.pages for row in own] == [row.pages for row in there] == [lists[at] for at in chosen]
        assert [row.samples for row in own] == [[DRAW]] * len(rows)
        assert [len(row.samples) for row in there] == [1] * len(rows)
        sent_pages += sum(len(one.pages) for one in step.grown)
        again, own_again = book.step(rows)
        assert again.grown == []
        assert [id(row.pages) for row in own_again] == [id(row.pages) for row in own]
        assert [id(row.pages) for row in rank.rows(again)] == [id(row.pages) for row in there]
    assert sent_pages > 0


def test_what_does_not_follow_is_refused() -> None:
    rank = PageTables()
    rank.apply([Grown(0, 0, [1, 2])])
    with pytest.raises(ValueError, match="from 3 do not follow"):
        rank.apply([Grown(0, 3, [4])])
    with pytest.raises(ValueError, match="no page table 9"):
        rank.pages(9)
    assert rank.rows(Step([], [])) == []
