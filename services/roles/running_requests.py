"""The requests a worker answers for: whose they are, until when, and what has been measured of them."""

from dataclasses import dataclass, field

from services.protocol.messages import SequenceRequest, TokenLogprob


@dataclass(slots=True, eq=False)
class RunningRequest:
    """One request on this worker. Times are this process's clock, in seconds."""

    work: SequenceRequest
    router: bytes
    arrived_s: float
    deadline_at_s: float
    transfer_id: int | None = None
    started_s: float | None = None
    joined_s: float | None = None
    lease_until_s: float | None = None
    """While KV is held for it: when its router is asked whether that is still wanted."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


class Requests:
    """All running requests by id, with one sweep over their deadlines."""

    def __init__(self) -> None:
        self._running: dict[int, RunningRequest] = {}
        self._by_transfer: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._running)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._running

    def add(
        self, work: SequenceRequest, router: bytes, now_s: float, transfer_id: int | None = None
    ) -> RunningRequest:
        running = RunningRequest(work, router, now_s, now_s + work.deadline_s, transfer_id)
        self._running[work.request_id] = running
        if transfer_id is not None:
            self._by_transfer[transfer_id] = work.request_id
        return running

    def get(self, request_id: int) -> RunningRequest | None:
        return self._running.get(request_id)

    def of_transfer(self, transfer_id: int) -> RunningRequest | None:
        request_id = self._by_transfer.get(transfer_id)
        return None if request_id is None else self._running.get(request_id)

    def has_transfer(self, transfer_id: int) -> bool:
        return transfer_id in self._by_transfer

    def rename_transfer(self, running: RunningRequest, transfer_id: int | None) -> None:
        """From now on the request's KV is transferred under another id; None: under none."""
        if running.transfer_id is not None:
            self._by_transfer.pop(running.transfer_id, None)
        running.transfer_id = transfer_id
        if transfer_id is not None:
            self._by_transfer[transfer_id] = running.work.request_id

    def remove(self, request_id: int) -> RunningRequest | None:
        running = self._running.pop(request_id, None)
        if running is not None and running.transfer_id is not None:
            self._by_transfer.pop(running.transfer_id, None)
        return running

    def all(self) -> list[RunningRequest]:
        return list(self._running.values())

    def of_router(self, router: bytes) -> list[RunningRequest]:
        return [running for running in self._running.values() if running.router == router]

    def expired(self, now_s: float) -> list[RunningRequest]:
        return [running for running in self._running.values() if running.deadline_at_s <= now_s]
