"""The router's own account of what it has sent to each worker. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from router.routing.attempt import Flight


@dataclass(slots=True)
class Seat:
    """What this router has on one worker. `uncached_tokens` are those of `queued_tokens` that it is not
    expected to have in its prefix cache; `turn` is the number of the last prompt that went there."""

    queued_prompts: int = 0
    queued_tokens: int = 0
    uncached_tokens: int = 0
    live_tokens: int = 0
    live_requests: int = 0
    turn: int = 0

    @property
    def empty(self) -> bool:
        return not (self.queued_prompts or self.live_requests)


class Seats:
    """A flight sits on its prefill worker until its prompt has run, and on its decode worker to its end."""

    def __init__(self, endpoints: Iterable[str]) -> None:
        self.of = {endpoint: Seat() for endpoint in endpoints}
        self._queued: dict[int, int] = {}
        """Uncached tokens by request."""
        self._decodes: dict[int, str] = {}
        self._turns = 0

    def add(self, endpoint: str) -> None:
        self.of.setdefault(endpoint, Seat())

    def remove(self, endpoint: str) -> None:
        """Of a worker on which nothing sits."""
        self.of.pop(endpoint, None)

    def take(self, flight: Flight, cached_tokens: int = 0) -> None:
        """`cached_tokens` of the prompt are expected to be on the worker that computes it."""
        uncached = max(0, len(flight.work.prompt) - cached_tokens)
        self._queued[flight.work.request_id] = uncached
        seat = self.of[flight.prefill or flight.decode]
        seat.queued_prompts += 1
        seat.queued_tokens += len(flight.work.prompt)
        seat.uncached_tokens += uncached
        self._turns += 1
        seat.turn = self._turns
        self.take_decode(flight)

    def take_decode(self, flight: Flight) -> None:
        self.leave_decode(flight)
        self._decodes[flight.work.request_id] = flight.decode
        seat = self.of[flight.decode]
        seat.live_tokens += len(flight.work.prompt)
        seat.live_requests += 1
        seat.turn = self._turns

    def leave_prefill(self, flight: Flight) -> None:
        uncached = self._queued.pop(flight.work.request_id, None)
        if uncached is not None:
            seat = self.of[flight.prefill or flight.decode]
            seat.queued_prompts -= 1
            seat.queued_tokens -= len(flight.work.prompt)
            seat.uncached_tokens -= uncached

    def leave_decode(self, flight: Flight) -> None:
        endpoint = self._decodes.pop(flight.work.request_id, None)
        if endpoint is not None:
            seat = self.of[endpoint]
            seat.live_tokens -= len(flight.work.prompt)
            seat.live_requests -= 1

    def leave(self, flight: Flight) -> None:
        self.leave_prefill(flight)
        self.leave_decode(flight)
