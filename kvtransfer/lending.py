"""Who is lent the free send slots. Pure."""

from collections.abc import Iterable

from kvtransfer.limits import Limits
from kvtransfer.messages import SlotUse
from kvtransfer.send import Send, SendState
from kvtransfer.slots import Direction, SlotPool


def lend(
    pool: SlotPool, limits: Limits, transfers: Iterable[Send], now_s: float
) -> dict[int, list[SlotUse]]:
    """Takes free slots for confirmed transfers whose prompts have pages, each slot against one of its grants:
    one at a time, to who has fewest, oldest first. The slots by transfer."""
    wanting = [t for t in transfers if t.state is SendState.CONFIRMED and t.ready and t.wants_slots()]
    transfers_waiting = len(wanting)
    lent: dict[int, list[SlotUse]] = {}
    while wanting and pool.free:
        transfer = min(wanting, key=lambda t: len(t.lent))
        most = limits.slots_per_transfer
        if not transfer.packed.tokens:
            share = limits.before_data(pool.free, len(transfer.lent), transfers_waiting)
            most = max(limits.idle_slots_per_transfer, share)
        if len(transfer.lent) >= most:
            wanting.remove(transfer)
            continue
        use = pool.take(transfer.transfer_id, Direction.SEND, now_s)
        transfer.lent[use.slot] = use
        lent.setdefault(transfer.transfer_id, []).append(use)
        if not transfer.wants_slots():
            wanting.remove(transfer)
    return lent
