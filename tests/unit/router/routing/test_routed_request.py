"""Journeys: whatever is lost on the way, the client gets every token once, and one end."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.routing.attempt import Phase
from router.routing.retry_queue import WaitingRoom
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
    journey = world.journey
    assert journey.ended and not world.jobs, (journey.legs, world.jobs)
    for choice, tokens in client.tokens.items():
        assert tokens == expected(choice, len(tokens))
        assert tokens == journey.tokens[choice]
    assert client.prefilled <= 1
    assert all(leg.flight is None or leg.flight.ended for leg in journey.legs)
    if journey.phase is Phase.FINISHED:
        assert not client.errors
        for choice in range(choices):
            count = min(max_tokens, stops.get(choice, max_tokens))
            assert client.tokens[choice] == expected(choice, count)
        assert set(client.finishes) == set(range(choices))
    else:
        assert journey.phase is Phase.FAILED and client.errors == [journey.error]
        assert sum(world.budget.denied.values()) == 1, "it fails only where a budget says so"
        assert client.errors[0].status == 503 and client.errors[0].retry_after_s is not None


def decoding_journey(budget: RetryBudget, choices: int = 1) -> tuple[World, Client]:
    client = Client()
    world = World(choices, 9, False, client, budget.max_retries)
    world.journey.budget = world.budget = budget
    for _ in range(3):
        world.step(0)
    assert [leg.flight.phase for leg in world.journey.legs if leg.flight] == [Phase.DECODING]
    return world, client


def test_choices_go_on_by_themselves_with_what_the_client_has() -> None:
    world, client = decoding_journey(RetryBudget(3, 0.0, 9), choices=2)
    world.lose("d1")
    assert [leg.choices for leg in world.journey.legs] == [[0], [1]]
    assert all(leg.waiting and leg.avoid == {"d1"} and leg.retries == 1 for leg in world.journey.legs)
    world.place()
    works = [leg.flight.work for leg in world.journey.legs if leg.flight is not None]
    for choice, work in enumerate(works):
        assert work.prompt == PROMPT + client.tokens[choice] and len(client.tokens[choice]) == 2
        assert (work.first_choice, work.choices, work.output_tokens) == (choice, 1, 2)
        assert work.sampling.prompt_logprobs is None and work.sampling.max_tokens == 9
    assert works[0].request_id != works[1].request_id
    assert world.budget.counts == {"decode_lost": 1}, "one loss is one retry, whatever it splits into"


def test_what_kills_every_worker_ends_at_its_own_count() -> None:
    world, client = decoding_journey(RetryBudget(2, 0.0, 99))
    delays: list[float] = []
    while not world.journey.ended:
        flight = world.journey.legs[0].flight
        assert flight is not None
        world.lose(flight.decode)
        if not world.journey.ended:
            delays.append(world.journey.legs[0].not_before_s)
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
    assert world.journey.phase is Phase.FAILED and not world.jobs
    assert (client.errors[0].code, client.errors[0].committed) == ("worker_lost", False)


@pytest.mark.parametrize("code", ["invalid", "too_long", "deadline"])
def test_what_another_attempt_cannot_mend_is_not_tried_again(code: str) -> None:
    client = Client()
    world = World(1, 9, False, client, 3)
    del world.jobs["p1", 1]
    world.report("p1", Failed(1, code, "no", True))  # type: ignore[arg-type]
    assert world.journey.phase is Phase.FAILED and not world.jobs and not world.budget.counts


def test_the_waiting_room_is_bounded_and_forgets_who_has_left() -> None:
    room = WaitingRoom(2)
    legs = [World(1, 1, True, Client(), 1).journey.legs[0] for _ in range(3)]
    for leg in legs:
        leg.waiting = True
        leg.flight = None
    legs[1].not_before_s = 5.0
    assert room.add(legs[0]) and room.add(legs[1]) and not room.add(legs[2])
    assert room.add(legs[0]) and len(room) == 2, "nobody waits twice"
    assert room.take_due(1.0) == [legs[0]] and len(room) == 1
    legs[1].journey.end(1.0)
    assert room.add(legs[2]) and room.add(legs[0])
    assert room.take_due(9.0) == [legs[2], legs[0]]
