"""The router's own account of its workers."""

from router.routing.attempt import Attempt, Times
from router.routing.load import LoadTracker, WorkerLoad
from services.protocol.messages import Sampling, SequenceRequest


def attempt(request_id: int, tokens: int, prefill: str | None, decode: str) -> Attempt:
    work = SequenceRequest(request_id, [1] * tokens, Sampling(max_tokens=4, seed=1))
    return Attempt(None, work, Times(0.0), 1, prefill=prefill, decode=decode)  # type: ignore[arg-type]


def test_a_pair_is_seated_until_its_parts_are_done() -> None:
    worker_loads = LoadTracker(["p", "d"])
    one, two = attempt(1, 100, "p", "d"), attempt(2, 50, "p", "d")
    worker_loads.assign(one, cached_tokens=64)
    worker_loads.assign(two)
    assert worker_loads.of["p"] == WorkerLoad(
        queued_prompts=2, queued_tokens=150, uncached_tokens=86, last_assigned=2
    )
    assert worker_loads.of["d"] == WorkerLoad(live_tokens=150, live_requests=2, last_assigned=2)
    worker_loads.release_prefill(one)
    worker_loads.release_prefill(one)
    assert worker_loads.of["p"] == WorkerLoad(
        queued_prompts=1, queued_tokens=50, uncached_tokens=50, last_assigned=2
    )
    assert not worker_loads.of["p"].empty
    for each in (one, two):
        worker_loads.release(each)
    assert worker_loads.of["p"].empty
    assert worker_loads.of["d"].empty
    assert worker_loads.of["p"] == WorkerLoad(last_assigned=2)
    assert worker_loads.of["d"] == WorkerLoad(last_assigned=2)


def test_a_unified_worker_has_both_parts() -> None:
    worker_loads = LoadTracker(["u"])
    one = attempt(1, 100, None, "u")
    worker_loads.assign(one, cached_tokens=640)
    assert worker_loads.of["u"] == WorkerLoad(1, 100, 0, 100, 1, 1), "no more is cached than there is"
    worker_loads.release(one)
    assert worker_loads.of["u"] == WorkerLoad(last_assigned=1)


def test_another_decode_worker_takes_a_seat_over() -> None:
    worker_loads = LoadTracker(["p", "d"])
    worker_loads.add("e")
    one = attempt(1, 100, "p", "d")
    worker_loads.assign(one)
    one.decode = "e"
    worker_loads.assign_decode(one)
    assert worker_loads.of["d"].empty
    assert worker_loads.of["e"].live_tokens == 100
    worker_loads.remove("d")
    worker_loads.release(one)
    assert all(worker_load.empty for worker_load in worker_loads.of.values())
