"""What must hold after every turn of a process, and what is left at rest."""

from collections.abc import Mapping

from kvtransfer.messages import SlotUse
from kvtransfer.protocol.machine import TransferMachine
from kvtransfer.protocol.sender import REMEMBERED_ENDS
from kvtransfer.protocol.slots import Direction, SlotState
from services.roles.decode import DecodeRole
from services.roles.prefill import PrefillRole
from services.scheduler.sequence import Sequence, State
from services.worker import Worker
from tests.sim.kernel import Violation


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
    pool = worker.context.pool
    sequences = sequences_of(worker)
    held = [0] * pool.total
    for one in sequences:
        for page in one.pages:
            held[page] += 1
    if pool._holders != held:
        raise Violation(f"{name}: pages are held {held}, the pool counts {pool._holders}")
    idle = {*pool._free, *pool._idle}
    if len(idle) != len(pool._free) + len(pool._idle) or any(held[page] for page in idle):
        raise Violation(f"{name}: free {pool._free}, cached {[*pool._idle]}, held {held}")
    if len(idle) + sum(map(bool, held)) != pool.total:
        raise Violation(f"{name}: a page is lost: {len(idle)} free or cached, held {held}")
    for one in sequences:
        if one.state is State.ENDED or one.computed_tokens > one.capacity_tokens:
            raise Violation(f"{name}: {one}")
    known = {one.work.request_id for one in sequences}
    if known != worker.context.requests._running.keys():
        raise Violation(f"{name}: requests {worker.context.requests.all()}, scheduled {sorted(known)}")


def check_borders(name: str, counters: Mapping[str, int]) -> None:
    """Nothing has failed that nobody foresaw: borders keep it from other requests, not from this eye."""
    failed = {at: count for at, count in counters.items() if at.startswith("internal_errors_") and count}
    if failed:
        raise Violation(f"{name}: {failed}")


def check_slots(name: str, machine: TransferMachine) -> None:
    """Every slot is free, or in the hands of exactly one transfer in the state that belongs there."""
    pool, sender, receiver = machine.pool, machine.sender, machine.receiver
    counts = pool.counts()
    if counts.free + counts.granted + counts.filled + counts.quarantined != len(pool):
        raise Violation(f"{name}: {counts} of {len(pool)} slots")
    holders: list[SlotUse] = [*sender._assigned.values()]
    for write in sender._writes.values():
        holders += write.local
    for incoming in receiver._transfers.values():
        holders += incoming.granted.values()
    taken = set()
    for slot, entry in enumerate(pool._slots):
        if entry.state is SlotState.FREE:
            continue
        taken.add((slot, entry.generation))
        if entry.state is SlotState.FILLED and entry.direction is Direction.RECEIVE:
            holders.append(SlotUse(slot, entry.generation))
    if len(holders) != len(taken) or {(one.slot, one.generation) for one in holders} != taken:
        raise Violation(f"{name}: slots {taken} are taken, {holders} are accounted for")
    most = sender.limits.max_transfers
    if max(len(sender._transfers), len(receiver._transfers)) > most or len(sender._ended) > REMEMBERED_ENDS:
        raise Violation(f"{name}: {len(sender._transfers)} and {len(receiver._transfers)} transfers are kept")


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
    if worker.context.pool.counts().used or worker.role.in_flight:
        return f"{worker.context.pool.counts()}, in flight: {worker.role.in_flight}"
    role = worker.role
    if isinstance(role, PrefillRole) and len(role.sender):
        return f"{len(role.sender)} transfers out"
    if isinstance(role, DecodeRole) and len(role.receiver):
        return f"{len(role.receiver)} transfers in"
    return None
