"""What must hold after every turn of a process, and what is left at rest."""

from collections import Counter

from kvtransfer.machine import TransferMachine
from kvtransfer.messages import SlotUse
from kvtransfer.slots import Direction, SlotState
from services.roles.decode import DecodeRole
from services.roles.prefill import PrefillRole
from services.scheduler.sequence import Sequence, State
from services.worker import Worker
from tests.sim.kernel import Violation


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise Violation(what)


def sequences_of(worker: Worker) -> list[Sequence]:
    """Everything in a role's scheduler that may hold pages."""
    scheduler = worker.role.scheduler  # type: ignore[attr-defined]
    found: list[Sequence] = []
    for held in scheduler._sequences.values():
        found += [held] if isinstance(held, Sequence) else held
    for reservation in getattr(scheduler, "reservations", {}).values():
        found.append(reservation.prompt)
    return found


def check_pages(name: str, worker: Worker) -> None:
    """Every page is free, cached or used, exactly one of them, and used by those who hold it."""
    pool = worker.parts.pool
    sequences = sequences_of(worker)
    held = Counter(page for one in sequences for page in one.pages)
    free, idle = pool._free, pool._idle
    used = [page for page, holders in enumerate(pool._holders) if holders]
    _require(len(set(free)) == len(free), f"{name}: a page is free twice")
    _require(
        len(free) + len(idle) + len(used) == pool.total and not (idle.keys() & set(used)),
        f"{name}: {len(free)} pages free, {len(idle)} cached, {len(used)} used of {pool.total}",
    )
    _require(
        all(pool._holders[page] == held[page] for page in range(pool.total)),
        f"{name}: pages are held {dict(held)}, the pool counts {pool._holders}",
    )
    for one in sequences:
        _require(one.state is not State.ENDED, f"{name}: request {one.work.request_id} has ended and is kept")
        _require(
            one.computed_tokens <= one.capacity_tokens,
            f"{name}: request {one.work.request_id} has computed {one.computed_tokens} tokens in "
            f"{one.capacity_tokens}",
        )
    known = {one.work.request_id for one in sequences}
    _require(
        known == {live.work.request_id for live in worker.parts.requests.all()},
        f"{name}: requests {sorted(live.work.request_id for live in worker.parts.requests.all())}, "
        f"scheduled {sorted(known)}",
    )


def check_slots(name: str, machine: TransferMachine) -> None:
    """Every slot is free, or in the hands of exactly one transfer in the state that belongs there."""
    pool, sender, receiver = machine.pool, machine.sender, machine.receiver
    counts = pool.counts()
    total = counts.free + counts.granted + counts.filled + counts.quarantined
    _require(total == len(pool), f"{name}: {counts} of {len(pool)} slots")
    holders: Counter[SlotUse] = Counter()
    for outgoing in sender._transfers.values():
        holders.update(outgoing.lent.values())
    holders.update(sender._returning.values())
    for write in sender._writes.values():
        holders.update(write.local)
    for incoming in receiver._transfers.values():
        holders.update(incoming.granted.values())
    holders.update(pool.uses(Direction.RECEIVE, SlotState.FILLED))
    present = [use for direction in Direction for state in SlotState for use in pool.uses(direction, state)]
    taken = {use for use in present if pool.holder(use.slot) is not None}
    if holders.keys() != taken or any(count != 1 for count in holders.values()):
        raise Violation(f"{name}: {taken} are taken, {list(holders.elements())} are accounted for")
    limit = sender.limits.max_transfers
    _require(len(sender._transfers) <= limit >= len(receiver._transfers), f"{name}: too many transfers")


def transfer_rest(machine: TransferMachine) -> str | None:
    counts = machine.pool.counts()
    if counts.free != len(machine.pool):
        return str(counts)
    if machine.sender._transfers or machine.receiver._transfers:
        outgoing = [(one.transfer_id, one.state) for one in machine.sender._transfers.values()]
        incoming = [(one.transfer_id, one.state) for one in machine.receiver._transfers.values()]
        return f"transfers out {outgoing}, in {incoming}"
    return None


def worker_rest(worker: Worker) -> str | None:
    occupancy = worker.role.occupancy()
    if any((occupancy.queued, occupancy.running, occupancy.reserved, occupancy.holding)):
        return str(occupancy)
    if worker.parts.pool.counts().used or worker.role.in_flight:
        return f"{worker.parts.pool.counts()}, in flight: {worker.role.in_flight}"
    role = worker.role
    moving = role.push if isinstance(role, PrefillRole) else role.pull if isinstance(role, DecodeRole) else ()
    if moving:
        return f"{len(moving)} transfers"
    return None
