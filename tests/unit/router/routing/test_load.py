"""The router's own account of its workers."""

from router.routing.attempt import Flight, Times
from router.routing.load import Seat, Seats
from services.protocol.messages import Sampling, Work


def flight(request_id: int, tokens: int, prefill: str | None, decode: str) -> Flight:
    work = Work(request_id, [1] * tokens, Sampling(max_tokens=4, seed=1))
    return Flight(work, decode, None, Times(0.0), 1, prefill=prefill)  # type: ignore[arg-type]


def test_a_pair_is_seated_until_its_parts_are_done() -> None:
    seats = Seats(["p", "d"])
    one, two = flight(1, 100, "p", "d"), flight(2, 50, "p", "d")
    seats.take(one, cached_tokens=64)
    seats.take(two)
    assert seats.of["p"] == Seat(queued_prompts=2, queued_tokens=150, uncached_tokens=86, turn=2)
    assert seats.of["d"] == Seat(live_tokens=150, live_requests=2, turn=2)
    seats.leave_prefill(one)
    seats.leave_prefill(one)
    assert seats.of["p"] == Seat(queued_prompts=1, queued_tokens=50, uncached_tokens=50, turn=2)
    assert not seats.of["p"].empty
    for each in (one, two):
        seats.leave(each)
    assert seats.of["p"].empty
    assert seats.of["d"].empty
    assert seats.of["p"] == Seat(turn=2)
    assert seats.of["d"] == Seat(turn=2)


def test_a_unified_worker_has_both_parts() -> None:
    seats = Seats(["u"])
    one = flight(1, 100, None, "u")
    seats.take(one, cached_tokens=640)
    assert seats.of["u"] == Seat(1, 100, 0, 100, 1, 1), "no more is cached than there is"
    seats.leave(one)
    assert seats.of["u"] == Seat(turn=1)


def test_another_decode_worker_takes_a_seat_over() -> None:
    seats = Seats(["p", "d"])
    seats.add("e")
    one = flight(1, 100, "p", "d")
    seats.take(one)
    one.decode = "e"
    seats.take_decode(one)
    assert seats.of["d"].empty
    assert seats.of["e"].live_tokens == 100
    seats.remove("d")
    seats.leave(one)
    assert all(seat.empty for seat in seats.of.values())
