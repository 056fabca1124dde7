"""A prefill worker's transfers, each joined from its parts (kv_parts.py): one lane for each of our ranks.

1. `open`      only the part of both ranks 0: how many ranks there are on the other side is not known yet
2. `join`      its confirmation tells; the other parts are opened. The transfer is confirmed when all are,
               committed when all are, and has failed when one has
3. `pack`, `deliver`   every lane packs its own heads into its own slots, at its own pace
"""

from dataclasses import dataclass, field

from kvtransfer.client import SlotsAssigned, TransferLost, WorkerEvent
from kvtransfer.messages import Aborted, SendCommitted, SendConfirmed, SendGranted
from services.scheduler.sequence import Chunk, Sequence
from services.transfer.head_slices import HeadSlice, parts_of
from services.transfer.push import KvPush

LOST_ELSEWHERE = "the transfer process of another rank is gone"


@dataclass(slots=True, eq=False)
class _Joined:
    transfer_id: int
    sequence: Sequence
    deadline_s: float
    parts: dict[int, HeadSlice] = field(default_factory=dict)
    """Those that are open, by id."""
    unconfirmed: set[int] = field(default_factory=set)
    confirmed: tuple[int, int] | None = None
    """The range of tokens that the first part was asked for; all are asked for the same."""


class PushParts:
    """`lanes[i]` is that of rank i; `kv_heads` are the model's."""

    def __init__(self, lanes: list[KvPush], kv_heads: int) -> None:
        self._lanes, self._kv_heads = lanes, kv_heads
        self._joined: dict[int, _Joined] = {}
        self._of_part: dict[int, _Joined] = {}

    def __len__(self) -> int:
        return len(self._joined)

    @property
    def in_flight(self) -> bool:
        """Whether a pack is being waited for."""
        return any(lane.in_flight for lane in self._lanes)

    def open(self, sequence: Sequence, transfer_id: int, deadline_s: float) -> None:
        joined = _Joined(transfer_id, sequence, deadline_s)
        self._joined[transfer_id] = joined
        # Its heads are known once the other side's ranks are; the lane needs them to pack, not to open.
        self._open_part(joined, HeadSlice(transfer_id, 0, 0, range(0), range(0)))

    def join(self, event: WorkerEvent) -> WorkerEvent | None:
        """What an event about a part says about its transfer; None: nothing yet, or nothing any more."""
        match event:
            case TransferLost():
                return event
            case SendConfirmed(transfer_id=part_id):
                joined = self._of_part.get(part_id)
                return None if joined is None else self._confirm(joined, event)
            case SlotsAssigned(slots=slots, rank=rank):
                self._lanes[rank].assign(slots)
                return None
            case SendGranted(transfer_id=part_id):
                joined = self._of_part.get(part_id)
                if joined is not None:
                    self._lane(joined.parts[part_id]).granted(event)
                return None
            case SendCommitted(transfer_id=part_id):
                joined = self._of_part.pop(part_id, None)
                if joined is None:
                    return None
                self._lane(joined.parts.pop(part_id)).close(part_id)
                if joined.parts or joined.unconfirmed:
                    return None
                del self._joined[joined.transfer_id]
                return SendCommitted(joined.transfer_id)
            case Aborted(transfer_id=part_id, reason=reason):
                joined = self._of_part.pop(part_id, None)
                if joined is None:
                    return None
                self._lane(joined.parts.pop(part_id)).close(part_id)
                self.close(joined.transfer_id, abort_reason=reason)
                return Aborted(joined.transfer_id, reason)
            case _:
                return event

    def ready(self, transfer_id: int) -> None:
        """A confirmed transfer's sequence has its pages."""
        joined = self._joined.get(transfer_id)
        for part_id, part in joined.parts.items() if joined is not None else ():
            self._lane(part).ready(part_id)

    def computed(self, chunks: list[Chunk], start_s: float, end_s: float) -> None:
        """A step with these chunks ran from `start_s` to `end_s`."""
        for lane in self._lanes:
            lane.computed(chunks, start_s, end_s)

    def pack(self) -> int:
        """Queue packs for whatever is computed and has a slot; returns the tokens."""
        return sum(lane.pack() for lane in self._lanes)

    def deliver(self) -> int:
        """Hand over the slots whose packs are done; returns how many."""
        return sum(lane.deliver() for lane in self._lanes)

    def close(self, transfer_id: int, abort_reason: str | None = None) -> None:
        """Forget a transfer; with a reason, tell the transfer processes to end it. Idempotent."""
        joined = self._joined.pop(transfer_id, None)
        if joined is None:
            return
        for part_id, part in joined.parts.items():
            del self._of_part[part_id]
            self._lane(part).close(part_id, abort_reason)

    def clear(self, lost_rank: int) -> None:
        """The transfer process of a rank was restarted: no transfer has all its parts any more."""
        self._lanes[lost_rank].clear()
        for transfer_id in list(self._joined):
            self.close(transfer_id, abort_reason=LOST_ELSEWHERE)

    def _confirm(self, joined: _Joined, event: SendConfirmed) -> SendConfirmed | Aborted | None:
        tokens = (event.start_token, event.end_token)
        if joined.confirmed is None:
            self._open_others(joined, event.tp)
            joined.confirmed = tokens
        part = joined.parts[event.transfer_id]
        alike = tokens == joined.confirmed and event.kv_heads == len(part.source_heads)
        if not alike or not self._lane(part).confirmed(event, part.source_heads):
            reason = "the destination wants another prompt, or other heads"
            self.close(joined.transfer_id, abort_reason=reason)
            return Aborted(joined.transfer_id, reason)
        joined.unconfirmed.discard(event.transfer_id)
        if joined.unconfirmed:
            return None
        return SendConfirmed(joined.transfer_id, *tokens, self._kv_heads, event.segment_tokens, event.tp)

    def _open_others(self, joined: _Joined, destination_tp: int) -> None:
        if self._kv_heads % destination_tp:
            return  # the first part's heads will not be those that the destination names
        for part in parts_of(joined.transfer_id, self._kv_heads, len(self._lanes), destination_tp):
            if part.part_id == joined.transfer_id:
                joined.parts[part.part_id] = part
            else:
                self._open_part(joined, part)

    def _open_part(self, joined: _Joined, part: HeadSlice) -> None:
        joined.parts[part.part_id] = part
        joined.unconfirmed.add(part.part_id)
        self._of_part[part.part_id] = joined
        self._lane(part).open(joined.sequence, part.part_id, joined.deadline_s)

    def _lane(self, part: HeadSlice) -> KvPush:
        return self._lanes[part.source_rank]
