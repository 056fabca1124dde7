"""The chunks of a prompt whose KV leaves: all of it, within the budget, and a small one at the end."""

from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.chunks import DEFAULT_TAIL_TOKENS, LEAST_HEAD_TAILS, chunk_tokens
from services.scheduler.pages import PagePool
from services.scheduler.prefill import PrefillScheduler
from tests.unit.services.scheduler.harness import work

TAIL = DEFAULT_TAIL_TOKENS


def chunks_of(prompt_tokens: int, budget_tokens: int, tail_tokens: int) -> list[int]:
    chunks = []
    while prompt_tokens:
        chunks.append(chunk_tokens(prompt_tokens, budget_tokens, tail_tokens))
        prompt_tokens -= chunks[-1]
    return chunks


@given(st.integers(1, 1 << 17), st.integers(16, 1 << 14), st.integers(0, 2048))
def test_every_token_once_and_at_most_one_step_more(prompt: int, budget: int, tail: int) -> None:
    chunks = chunks_of(prompt, budget, tail)
    assert sum(chunks) == prompt and min(chunks) > 0 and max(chunks) <= budget
    assert len(chunks) <= -(-prompt // budget) + 1
    assert chunks_of(prompt, budget, 0) == [budget] * (prompt // budget) + [prompt % budget] * (
        prompt % budget > 0
    )


@given(st.integers(1, 1 << 16))
def test_what_is_left_exposed_is_bounded_whatever_the_budget(prompt: int) -> None:
    """With a budget of the whole prompt: a tail, or a prompt too short to be cut."""
    chunks = chunks_of(prompt, 1 << 16, TAIL)
    assert chunks == [prompt] if prompt < (1 + LEAST_HEAD_TAILS) * TAIL else chunks == [prompt - TAIL, TAIL]


def test_the_prefill_policy_cuts_the_tail_off() -> None:
    for tail, expected in ((1, [8, 8, 7, 1]), (2, [8, 8, 6, 2]), (3, [8, 8, 8]), (0, [8, 8, 8])):
        scheduler = PrefillScheduler(PagePool(20, 4), 4, 8, tail)
        scheduler.add(work(1, list(range(24))))
        scheduler.confirm(1)
        found = []
        while plan := scheduler.schedule():
            found += [chunk.count for chunk in plan.chunks]
            scheduler.launched(plan)
        assert found == expected
