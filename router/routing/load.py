"""Per-worker load accounting: what the router has sent to each worker and not yet seen done. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from router.routing.attempt import Attempt


@dataclass(slots=True)
class WorkerLoad:
    """What this router has on one worker. `uncached_tokens` are those of `queued_tokens` that are not
    expected to be in its prefix cache; `last_assigned` is the number of the last prompt that went there."""

    queued_prompts: int = 0
    queued_tokens: int = 0
    uncached_tokens: int = 0
    live_tokens: int = 0
    live_requests: int = 0
    last_assigned: int = 0

    @property
    def empty(self) -> bool:
        return not (self.queued_prompts or self.live_requests)


class LoadTracker:
    """The loads of all workers. An attempt counts on its prefill worker until its prompt has run, and on its
    decode worker to its end."""

    def __init__(self, endpoints: Iterable[str]) -> None:
        self.of = {endpoint: WorkerLoad() for endpoint in endpoints}
        self._queued: dict[int, int] = {}
        """Uncached tokens by request."""
        self._decodes: dict[int, str] = {}
        self._assignments = 0

    def add(self, endpoint: str) -> None:
        self.of.setdefault(endpoint, WorkerLoad())

    def remove(self, endpoint: str) -> None:
        """The worker must have no load."""
        self.of.pop(endpoint, None)

    def assign(self, attempt: Attempt, cached_tokens: int = 0) -> None:
        """`cached_tokens` of the prompt are expected to be on the worker that computes it."""
        uncached = max(0, len(attempt.work.prompt) - cached_tokens)
        self._queued[attempt.work.request_id] = uncached
        worker_load = self.of[attempt.prefill or attempt.decode]
        worker_load.queued_prompts += 1
        worker_load.queued_tokens += len(attempt.work.prompt)
        worker_load.uncached_tokens += uncached
        self._assignments += 1
        worker_load.last_assigned = self._assignments
        self.assign_decode(attempt)

    def assign_decode(self, attempt: Attempt) -> None:
        self.release_decode(attempt)
        self._decodes[attempt.work.request_id] = attempt.decode
        worker_load = self.of[attempt.decode]
        worker_load.live_tokens += len(attempt.work.prompt)
        worker_load.live_requests += 1
        worker_load.last_assigned = self._assignments

    def release_prefill(self, attempt: Attempt) -> None:
        uncached = self._queued.pop(attempt.work.request_id, None)
        if uncached is not None:
            worker_load = self.of[attempt.prefill or attempt.decode]
            worker_load.queued_prompts -= 1
            worker_load.queued_tokens -= len(attempt.work.prompt)
            worker_load.uncached_tokens -= uncached

    def release_decode(self, attempt: Attempt) -> None:
        endpoint = self._decodes.pop(attempt.work.request_id, None)
        if endpoint is not None:
            worker_load = self.of[endpoint]
            worker_load.live_tokens -= len(attempt.work.prompt)
            worker_load.live_requests -= 1

    def release(self, attempt: Attempt) -> None:
        self.release_prefill(attempt)
        self.release_decode(attempt)
