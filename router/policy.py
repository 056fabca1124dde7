"""Which workers a request goes to. Pure: what is known of the workers comes in, names come out.

A prefill worker is chosen by the prompt tokens that wait before this one (its queueing delay), a decode
worker by the share of its pages in use (a full pool holds prefill back, or retracts), as in Mooncake and
DistServe. Both are the larger of what the worker last reported and what this router knows it has sent:
a report is up to a heartbeat old, and a burst in between must not all go to one worker.
"""

from collections.abc import Sequence

from msgspec import Struct

from services.messages import Role, TransferAddress


class Candidate(Struct, frozen=True):
    """One worker that can take work now. `queued_tokens` and `live_tokens` are this router's own account:
    prompt tokens sent and not yet prefilled; tokens of the sequences it holds."""

    name: str
    role: Role
    model_digest: str
    transfer: TransferAddress | None
    page_size_tokens: int
    pages: int
    reported_queued: int
    reported_running: int
    reported_used_pages: int
    queued_tokens: int
    live_tokens: int


class Pairing(Struct, frozen=True):
    """Where work goes. `prefill` and `source` are None with a unified worker."""

    prefill: str | None
    decode: str
    source: TransferAddress | None


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


def _by_queue(worker: Candidate) -> tuple[int, int, float, str]:
    return (worker.queued_tokens, worker.reported_queued, used_share(worker), worker.name)


def _by_pages(worker: Candidate, incoming_tokens: int) -> tuple[bool, float, int, str]:
    share = used_share(worker, incoming_tokens)
    return (share > 1, share, worker.reported_running, worker.name)


def _by_both(worker: Candidate, incoming_tokens: int) -> tuple[bool, int, float, str]:
    share = used_share(worker, incoming_tokens)
    return (share > 1, worker.queued_tokens, share, worker.name)


def spare(
    workers: Sequence[Candidate], avoid: frozenset[str], strict: bool = False
) -> Sequence[Candidate]:
    """The workers without those to `avoid`. Unless `strict`, who is of a role that has no other stays."""
    if not avoid:
        return workers
    usable = [worker for worker in workers if worker.role == "unified" or worker.transfer is not None]
    others = {worker.role for worker in usable if worker.name not in avoid}
    return [
        worker
        for worker in workers
        if worker.name not in avoid or (not strict and worker.role not in others)
    ]


def place_decode(workers: Sequence[Candidate], model_digest: str, prompt_tokens: int) -> Candidate | None:
    """The decode worker for KV that a prefill worker of this model has. None: there is none."""
    decodes = [worker for worker in workers if worker.role == "decode" and worker.transfer is not None]
    alike = [worker for worker in decodes if worker.model_digest == model_digest]
    return min(alike, key=lambda worker: _by_pages(worker, prompt_tokens), default=None)


def place(workers: Sequence[Candidate], prompt_tokens: int) -> Placement | None:
    """A unified worker if there is one, else a prefill and a decode worker of the same model.

    None: nobody can take it. Ties go to the first name, so the choice is a function of its arguments.
    """
    unified = [worker for worker in workers if worker.role == "unified"]
    if unified:
        return Placement(None, min(unified, key=lambda worker: _by_both(worker, prompt_tokens)))
    prefills = [worker for worker in workers if worker.role == "prefill" and worker.transfer is not None]
    for prefill in sorted(prefills, key=_by_queue):
        decode = place_decode(workers, prefill.model_digest, prompt_tokens)
        if decode is not None:
            return Placement(prefill, decode)
    return None
