"""The router's own account of what it has sent to each worker. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from router.requests import Flight


@dataclass(slots=True)
class Seat:
    """What this router has on one worker."""

    queued_prompts: int = 0
    queued_tokens: int = 0
    live_tokens: int = 0
    live_requests: int = 0


class Seats:
    """A flight sits on its prefill worker until its prompt has run, and on its decode worker to its end."""

    def __init__(self, endpoints: Iterable[str]) -> None:
        self.of = {endpoint: Seat() for endpoint in endpoints}
        self._queued: set[int] = set()
        self._decodes: dict[int, str] = {}

    def take(self, flight: Flight) -> None:
        self._queued.add(flight.work.request_id)
        seat = self.of[flight.prefill or flight.decode]
        seat.queued_prompts += 1
        seat.queued_tokens += len(flight.work.prompt)
        self.take_decode(flight)

    def take_decode(self, flight: Flight) -> None:
        self.leave_decode(flight)
        self._decodes[flight.work.request_id] = flight.decode
        seat = self.of[flight.decode]
        seat.live_tokens += len(flight.work.prompt)
        seat.live_requests += 1

    def leave_prefill(self, flight: Flight) -> None:
        if flight.work.request_id in self._queued:
            self._queued.discard(flight.work.request_id)
            seat = self.of[flight.prefill or flight.decode]
            seat.queued_prompts -= 1
            seat.queued_tokens -= len(flight.work.prompt)

    def leave_decode(self, flight: Flight) -> None:
        endpoint = self._decodes.pop(flight.work.request_id, None)
        if endpoint is not None:
            seat = self.of[endpoint]
            seat.live_tokens -= len(flight.work.prompt)
            seat.live_requests -= 1

    def leave(self, flight: Flight) -> None:
        self.leave_prefill(flight)
        self.leave_decode(flight)
