"""The placement policy: which workers a prompt goes to. Pure: facts about workers in, names out.

A prefill worker is chosen by the tokens that are computed before this prompt's first one is there: those that
wait, and what of the prompt it has not cached. A decode worker is chosen by the share of its pages that would
be in use, without those that need not be moved there (a full pool holds prefill back, or retracts). So a
prefix draws a prompt to where it is, until that worker is behind by as many tokens as the prefix is long.
The costs are those of Mooncake (Qin et al., 2024) and DistServe (Zhong et al., 2024). Pages are the larger of
what the worker last reported and what this router knows it has sent: a report is up to a heartbeat old, and a
burst in between must not all go to one worker. docs/placement.md explains it with numbers.
"""

from collections.abc import Sequence

from msgspec import Struct

from services.protocol.messages import Role, WorkerTransferAddress


class Candidate(Struct, frozen=True):
    """One worker that can take work now. `queued_tokens`, `uncached_tokens` and `live_tokens` are this
    router's own account: prompt tokens sent and not yet prefilled, and those of them that must be computed;
    tokens of the sequences it holds. `cached_tokens` of the prompt to be placed are expected to be there.
    `last_assigned` is the number of the last prompt it was given."""

    name: str
    role: Role
    model_digest: str
    transfer: WorkerTransferAddress | None
    page_size_tokens: int
    pages: int
    reported_queued: int
    reported_running: int
    reported_used_pages: int
    queued_tokens: int
    live_tokens: int
    uncached_tokens: int = 0
    cached_tokens: int = 0
    last_assigned: int = 0

    def can_hold(self, prompt_tokens: int) -> bool:
        """Whether an empty pool would have room for it."""
        return -(-prompt_tokens // self.page_size_tokens) <= self.pages


class Pairing(Struct, frozen=True):
    """Where work goes. `prefill` and `source` are None with a unified worker."""

    prefill: str | None
    decode: str
    source: WorkerTransferAddress | None


class Placement(Struct, frozen=True):
    """`prefill` is None where `decode` is a unified worker that does both."""

    prefill: Candidate | None
    decode: Candidate

    @property
    def pairing(self) -> Pairing:
        if self.prefill is None:
            return Pairing(None, self.decode.name, None)
        return Pairing(self.prefill.name, self.decode.name, self.prefill.transfer)


def used_share(worker: Candidate, incoming_tokens: int = 0) -> float:
    """The share of the pool in use if a sequence of `incoming_tokens` came."""
    size = worker.page_size_tokens
    used = max(worker.reported_used_pages, -(-worker.live_tokens // size))
    return (used + -(-incoming_tokens // size)) / max(1, worker.pages)


def _by_queue(worker: Candidate, incoming_tokens: int) -> tuple[bool, int, int, float, int, str]:
    share = used_share(worker, incoming_tokens)
    # Less the prompt's length, which is the same for all.
    cost_tokens = worker.uncached_tokens - worker.cached_tokens
    return (share > 1, cost_tokens, worker.reported_queued, share, worker.last_assigned, worker.name)


def _by_pages(worker: Candidate, incoming_tokens: int) -> tuple[bool, float, int, int, str]:
    whole = share = used_share(worker, incoming_tokens)
    if worker.cached_tokens:
        share = used_share(worker, incoming_tokens - worker.cached_tokens)
    return (whole > 1, share, worker.reported_running, worker.last_assigned, worker.name)


def spare(workers: Sequence[Candidate], avoid: frozenset[str], strict: bool = False) -> Sequence[Candidate]:
    """The workers without those to `avoid`. Unless `strict`, a worker stays if its role has no other."""
    if not avoid:
        return workers
    usable = [worker for worker in workers if worker.role == "unified" or worker.transfer is not None]
    others = {worker.role for worker in usable if worker.name not in avoid}
    return [
        worker for worker in workers if worker.name not in avoid or (not strict and worker.role not in others)
    ]


def place_decode(workers: Sequence[Candidate], model_digest: str, prompt_tokens: int) -> Candidate | None:
    """The decode worker for KV that a prefill worker of this model has. None: there is none."""
    decodes = [
        worker
        for worker in workers
        if worker.role == "decode" and worker.transfer is not None and worker.can_hold(prompt_tokens)
    ]
    alike = [worker for worker in decodes if worker.model_digest == model_digest]
    return min(alike, key=lambda worker: _by_pages(worker, prompt_tokens), default=None)


def place(workers: Sequence[Candidate], prompt_tokens: int) -> Placement | None:
    """A unified worker if there is one, else a prefill and a decode worker of the same model.

    None: nobody can take it. A worker whose whole pool is too small is never taken; one that is full now
    comes last. Ties go to the worker that was given nothing for longest, then to the first name, so the
    choice is a function of its arguments.
    """
    able = [worker for worker in workers if worker.can_hold(prompt_tokens)]
    unified = [worker for worker in able if worker.role == "unified"]
    if unified:
        return Placement(None, min(unified, key=lambda worker: _by_queue(worker, prompt_tokens)))
    prefills = [worker for worker in able if worker.role == "prefill" and worker.transfer is not None]
    for prefill in sorted(prefills, key=lambda worker: _by_queue(worker, prompt_tokens)):
        decode = place_decode(able, prefill.model_digest, prompt_tokens)
        if decode is not None:
            return Placement(prefill, decode)
    return None
