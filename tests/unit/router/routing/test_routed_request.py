"""Journeys: whatever is lost on the way, the client gets every token once, and one end."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.routing.attempt import AttemptPhase
from router.routing.retry_queue import RetryQueue
from router.routing.routed_request import FIRST_BACKOFF_S, RetryBudget
from services.protocol.messages import Failed
from tests.unit.router.routing.routed import PROMPT, Client, World, expected

EVENTS = st.one_of(
    st.tuples(st.just("step"), st.integers(0, 9)),
    st.tuples(st.just("step"), st.integers(0, 9)),
    st.tuples(st.just("lose"), st.integers(0, 3)),
    st.tuples(st.just("transfer"), st.integers(0, 3)),
    st.tuples(st.just("place"), st.just(0)),
    st.tuples(st.just("late"), st.just(0)),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(EVENTS, max_size=40),
    st.integers(1, 3),
    st.integers(1, 6),
    st.booleans(),
    st.integers(0, 20),
    st.dictionaries(st.integers(0, 2), st.integers(1, 4), max_size=2),
)
def test_no_token_is_lost_or_repeated_and_there_is_one_end(
    events: list[tuple[str, int]],
    choices: int,
    max_tokens: int,
    unified: bool,
    retries: int,
    stops: dict[int, int],
) -> None:
    client = Client(stops)
    world = World(choices, max_tokens, unified, client, retries)
    workers = ["u0", "u1"] if unified else ["p0", "p1", "d0", "d1"]
    for kind, number in events:
        if kind == "step":
            world.step(number)
        elif kind == "lose":
            world.lose(workers[number % len(workers)])
        elif kind == "transfer":
            world.fail_transfers(workers[number % len(workers)])
        elif kind == "late":
            world.say_late()
        else:
            world.place()
    for _ in range(500):
        world.place()
        if not world.step(0):
            break
    routed = world.routed
    assert routed.ended and not world.jobs, (routed.branches, world.jobs)
    for choice, tokens in client.tokens.items():
        assert tokens == expected(choice, len(tokens))
        assert tokens == routed.tokens[choice]
    assert client.prefilled <= 1
    assert all(branch.attempt is None or branch.attempt.ended for branch in routed.branches)
    if routed.phase is AttemptPhase.FINISHED:
        assert not client.errors
        for choice in range(choices):
            count = min(max_tokens, stops.get(choice, max_tokens))
            assert client.tokens[choice] == expected(choice, count)
        assert set(client.finishes) == set(range(choices))
    else:
        assert routed.phase is AttemptPhase.FAILED and client.errors == [routed.error]
        assert sum(world.budget.denied.values()) == 1, "it fails only where a budget says so"
        assert client.errors[0].status == 503 and client.errors[0].retry_after_s is not None


def decoding_journey(budget: RetryBudget, choices: int = 1) -> tuple[World, Client]:
    client = Client()
    world = World(choices, 9, False, client, budget.max_retries)
    world.routed.budget = world.budget = budget
    for _ in range(3):
        world.step(0)
    assert [branch.attempt.phase for branch in world.routed.branches if branch.attempt] == [
        AttemptPhase.DECODING
    ]
    return world, client


def test_choices_go_on_by_themselves_with_what_the_client_has() -> None:
    world, client = decoding_journey(RetryBudget(3, 0.0, 9), choices=2)
    world.lose("d1")
    assert [branch.choices for branch in world.routed.branches] == [[0], [1]]
    assert all(
        branch.waiting and branch.avoid == {"d1"} and branch.retries == 1 for branch in world.routed.branches
    )
    world.place()
    works = [branch.attempt.work for branch in world.routed.branches if branch.attempt is not None]
    for choice, work in enumerate(works):
        assert work.prompt == PROMPT + client.tokens[choice] and len(client.tokens[choice]) == 2
        assert (work.first_choice, work.choices, work.output_tokens) == (choice, 1, 2)
        assert work.sampling.prompt_logprobs is None and work.sampling.max_tokens == 9
    assert works[0].request_id != works[1].request_id
    assert world.budget.counts == {"decode_lost": 1}, "one loss is one retry, whatever it splits into"


def test_what_kills_every_worker_ends_at_its_own_count() -> None:
    world, client = decoding_journey(RetryBudget(2, 0.0, 99))
    delays: list[float] = []
    while not world.routed.ended:
        attempt = world.routed.branches[0].attempt
        assert attempt is not None
        world.lose(attempt.decode)
        if not world.routed.ended:
            delays.append(world.routed.branches[0].not_before_s)
            world.place()
            for _ in range(3):
                world.step(0)
    assert delays == [0.0, FIRST_BACKOFF_S]
    assert world.budget.counts == {"decode_lost": 2} and world.budget.denied == {"count": 1}
    assert client.errors[0].code == "worker_lost" and client.errors[0].committed


def test_all_prompts_together_have_a_share() -> None:
    budget = RetryBudget(max_retries=3, share=0.5, burst=1)
    assert budget.take(0, "x") and not budget.take(0, "x")
    budget.on_prompt()
    assert not budget.take(0, "x")
    budget.on_prompt()
    assert budget.take(2, "x") and not budget.take(0, "x")
    for _ in range(9):
        budget.on_prompt()
    assert budget.level == 1, "what is saved is bounded"
    assert not budget.take(3, "x"), "its own count comes first"
    assert budget.denied == {"share": 3, "count": 1} and budget.counts == {"x": 2}


def test_a_denied_pairing_fails_with_its_own_error_and_frees_the_prefill_worker() -> None:
    client = Client()
    world = World(1, 9, False, client, 0)
    world.lose("d1")
    assert world.routed.phase is AttemptPhase.FAILED and not world.jobs
    assert (client.errors[0].code, client.errors[0].committed) == ("worker_lost", False)


@pytest.mark.parametrize("code", ["invalid", "too_long", "deadline"])
def test_what_another_attempt_cannot_mend_is_not_tried_again(code: str) -> None:
    client = Client()
    world = World(1, 9, False, client, 3)
    del world.jobs["p1", 1]
    world.report("p1", Failed(1, code, "no", True))  # type: ignore[arg-type]
    assert world.routed.phase is AttemptPhase.FAILED and not world.jobs and not world.budget.counts


def test_the_waiting_room_is_bounded_and_forgets_who_has_left() -> None:
    room = RetryQueue(2)
    branches = [World(1, 1, True, Client(), 1).routed.branches[0] for _ in range(3)]
    for branch in branches:
        branch.waiting = True
        branch.attempt = None
    branches[1].not_before_s = 5.0
    assert room.add(branches[0]) and room.add(branches[1]) and not room.add(branches[2])
    assert room.add(branches[0]) and len(room) == 2, "nobody waits twice"
    assert room.take_due(1.0) == [branches[0]] and len(room) == 1
    branches[1].routed.end(1.0)
    assert room.add(branches[2]) and room.add(branches[0])
    assert room.take_due(9.0) == [branches[2], branches[0]]
