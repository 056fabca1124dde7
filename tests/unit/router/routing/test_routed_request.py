"""Routed requests: whatever is lost on the way, the client gets every token once, and one end."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.routing.attempt import Attempt, AttemptPhase, Wait
from router.routing.policy import Pairing
from router.routing.retry_queue import RetryQueue
from router.routing.routed_request import FIRST_BACKOFF_S, Decision, NextStep, RetryBudget, WorkersOffer
from services.protocol.messages import Failed
from tests.unit.router.routing.routed import PROMPT, SOURCE, Client, World, expected

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
    assert routed.ended and not world.jobs, (routed.attempts, world.jobs)
    for choice, tokens in client.tokens.items():
        assert tokens == expected(choice, len(tokens))
        assert tokens == routed.tokens[choice]
    assert client.prefilled <= 1
    assert all(attempt.ended for attempt in routed.attempts)
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


def decoding_request(budget: RetryBudget, choices: int = 1) -> tuple[World, Client]:
    client = Client()
    world = World(choices, 9, False, client, budget.max_retries)
    world.routed.budget = world.budget = budget
    for _ in range(3):
        world.step(0)
    assert [attempt.phase for attempt in world.routed.attempts] == [AttemptPhase.DECODING]
    return world, client


def test_choices_go_on_by_themselves_with_what_the_client_has() -> None:
    world, client = decoding_request(RetryBudget(3, 0.0, 9), choices=2)
    world.lose("d1")
    assert [list(attempt.work.choice_numbers) for attempt in world.routed.attempts] == [[0], [1]]
    assert all(
        attempt.wait == Wait(0.0) and attempt.avoid == {"d1"} and attempt.retries == 1
        for attempt in world.routed.attempts
    )
    world.place()
    assert not any(attempt.wait for attempt in world.routed.attempts)
    works = [attempt.work for attempt in world.routed.attempts]
    for choice, work in enumerate(works):
        assert work.prompt == PROMPT + client.tokens[choice] and len(client.tokens[choice]) == 2
        assert (work.first_choice, work.choices, work.output_tokens) == (choice, 1, 2)
        assert work.sampling.prompt_logprobs is None and work.sampling.max_tokens == 9
    assert works[0].request_id != works[1].request_id
    assert world.budget.counts == {"decode_lost": 1}, "one loss is one retry, whatever it splits into"


def test_what_kills_every_worker_ends_at_its_own_count() -> None:
    world, client = decoding_request(RetryBudget(2, 0.0, 99))
    delays: list[float] = []
    while not world.routed.ended:
        world.lose(world.routed.attempts[0].decode)
        if not world.routed.ended:
            wait = world.routed.attempts[0].wait
            assert wait is not None
            delays.append(wait.not_before_s)
            world.place()
            for _ in range(3):
                world.step(0)
    assert delays == [0.0, FIRST_BACKOFF_S]
    assert world.budget.counts == {"decode_lost": 2} and world.budget.denied == {"count": 1}
    assert client.errors[0].code == "worker_lost" and client.errors[0].committed


def test_all_prompts_together_have_a_share() -> None:
    budget = RetryBudget(max_retries=3, share=0.5, burst=1)

    def take(retries: int) -> bool:
        bound = budget.denial(retries)
        if bound is None:
            budget.spend("x")
        else:
            budget.deny(bound)
        return bound is None

    assert take(0) and not take(0)
    budget.on_prompt()
    assert not take(0)
    budget.on_prompt()
    assert take(2) and not take(0)
    for _ in range(9):
        budget.on_prompt()
    assert budget.level == 1, "what is saved is bounded"
    assert not take(3), "its own count comes first"
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


def test_the_retry_queue_is_bounded_and_forgets_what_has_ended() -> None:
    queue = RetryQueue(2)
    attempts = [World(1, 1, True, Client(), 1).routed.attempts[0] for _ in range(3)]
    for attempt in attempts:
        attempt.wait = Wait()
    attempts[1].wait = Wait(5.0)
    for attempt in attempts[:2]:
        assert queue.has_room(attempt)
        queue.add(attempt)
    assert not queue.has_room(attempts[2])
    assert queue.has_room(attempts[0])
    queue.add(attempts[0])
    assert len(queue) == 2, "nothing waits twice"
    assert queue.take_due(1.0) == [attempts[0]] and len(queue) == 1
    attempts[1].routed.end(1.0)
    for attempt in (attempts[2], attempts[0]):
        assert queue.has_room(attempt)
        queue.add(attempt)
    assert queue.take_due(9.0) == [attempts[2], attempts[0]]


def waiting(client: Client, code: str) -> tuple[World, Attempt]:
    """An attempt that waits after a failure of its prefill worker."""
    world = World(1, 9, False, client, 3)
    del world.jobs["p1", 1]
    world.report("p1", Failed(1, code, "no", True))  # type: ignore[arg-type]
    return world, world.routed.attempts[0]


def test_what_waits_gets_workers_or_waits_on_or_fails() -> None:
    world, attempt = waiting(Client(), "internal")
    routed = world.routed
    assert routed.decide(attempt) == Decision(NextStep.GO_ON), "it has been decided already"
    assert (
        routed.decide(attempt, WorkersOffer(Pairing("p0", "d0", SOURCE), True, False)).step is NextStep.START
    )
    for due in (True, False):
        assert routed.decide(attempt, WorkersOffer(None, due, True)) == Decision(NextStep.WAIT)
        assert routed.decide(attempt, WorkersOffer(None, due, False)) == Decision(
            NextStep.FAIL, attempt.error
        )


def test_an_overloaded_cluster_is_not_waited_for() -> None:
    world, attempt = waiting(Client(), "overloaded")
    routed = world.routed
    assert attempt.wait == Wait(0.0, strict=True)
    assert routed.decide(attempt, WorkersOffer(None, False, True)) == Decision(NextStep.WAIT), (
        "not looked yet"
    )
    assert routed.decide(attempt, WorkersOffer(None, True, True)) == Decision(NextStep.FAIL, attempt.error)


def test_a_request_that_has_ended_decides_nothing_more() -> None:
    world, attempt = waiting(Client(), "internal")
    world.routed.end(1.0)
    assert (
        world.routed.decide(attempt, WorkersOffer(Pairing("p0", "d0", SOURCE), True, True)).step
        is NextStep.GO_ON
    )
