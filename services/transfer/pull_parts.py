"""A decode worker's transfers, each joined from its parts (kv_parts.py): one lane for each of our ranks.

Every rank asks for the heads it has, of those ranks of the source that have them. Each part is committed as
it is whole; the request goes on when all are. If one fails, the others are ended.
"""

from dataclasses import dataclass

from kvtransfer.messages import Aborted, Arrived
from services.protocol.messages import WorkerTransferAddress
from services.scheduler.sequence import Sequence
from services.transfer.head_slices import HeadSlice, parts_of
from services.transfer.pull import IncomingTransfer, KvPull, Settled
from services.transfer.push_parts import LOST_ELSEWHERE


@dataclass(slots=True, eq=False)
class _Joined:
    whole: IncomingTransfer
    """What the role is told of the transfer; its `missing_tokens` are those of the parts together."""
    parts: dict[int, HeadSlice]
    """Those that are not whole yet, by id."""


class PullParts:
    """`lanes[i]` is that of rank i; `kv_heads` are the model's."""

    def __init__(self, lanes: list[KvPull], kv_heads: int) -> None:
        self._lanes, self._kv_heads = lanes, kv_heads
        self._joined: dict[int, _Joined] = {}
        self._of_part: dict[int, _Joined] = {}

    def __len__(self) -> int:
        return len(self._joined)

    @property
    def ready(self) -> bool:
        """Whether anything can be asked for; not while a transfer process is being restarted."""
        return all(lane.ready for lane in self._lanes)

    @property
    def in_flight(self) -> bool:
        """Whether an unpack is being waited for."""
        return any(lane.in_flight for lane in self._lanes)

    def open(
        self, sequence: Sequence, transfer_id: int, source: WorkerTransferAddress, deadline_s: float
    ) -> IncomingTransfer:
        """Ask for what the prefix cache does not have; an empty range only confirms the reservation. Raises
        ValueError if the source has a number of ranks that does not divide the heads."""
        sources = source.ranks
        if self._kv_heads % len(sources):
            raise ValueError(f"{len(sources)} ranks of the source do not divide {self._kv_heads} KV heads")
        parts = parts_of(transfer_id, self._kv_heads, len(sources), len(self._lanes))
        missing_tokens = 0
        for part in parts:
            incoming = self._lanes[part.destination_rank].open(
                sequence, part.part_id, sources[part.source_rank], deadline_s, part.destination_heads
            )
            missing_tokens += incoming.missing_tokens
        whole = IncomingTransfer(transfer_id, sequence, missing_tokens)
        if missing_tokens:
            joined = _Joined(whole, {part.part_id: part for part in parts})
            self._joined[transfer_id] = joined
            self._of_part |= dict.fromkeys(joined.parts, joined)
        return whole

    def unpack(self, event: Arrived) -> None:
        """Take the segments into pages. The client reports none of a part that has ended here."""
        joined = self._of_part.get(event.transfer_id)
        if joined is not None:
            self._lanes[joined.parts[event.transfer_id].destination_rank].unpack(event)

    def settle(self) -> Settled:
        """Free the slots whose unpacks are done, and judge what was in them."""
        settled = Settled()
        for lane in self._lanes:
            done = lane.settle()
            for part_id, reason in done.broken:
                joined = self._of_part.get(part_id)
                if joined is not None:
                    settled.broken.append((joined.whole.transfer_id, reason))
            for incoming in done.whole:
                joined = self._of_part.pop(incoming.transfer_id, None)
                if joined is None:
                    continue
                del joined.parts[incoming.transfer_id]
                joined.whole.transfer_s = max(joined.whole.transfer_s, incoming.transfer_s)
                if not joined.parts:
                    joined.whole.missing_tokens = 0
                    del self._joined[joined.whole.transfer_id]
                    settled.whole.append(joined.whole)
        return settled

    def aborted(self, event: Aborted) -> int | None:
        """A part has ended without a commit, and its transfer with it, whose id is returned; None if it was
        not open."""
        joined = self._of_part.pop(event.transfer_id, None)
        if joined is None:
            return None
        part = joined.parts.pop(event.transfer_id)
        self._lanes[part.destination_rank].close(event.transfer_id)
        self.close(joined.whole.transfer_id, abort_reason=event.reason)
        return joined.whole.transfer_id

    def close(self, transfer_id: int, abort_reason: str | None = None) -> bool:
        """Forget a transfer; with a reason, tell the transfer processes to end it. False if none was open."""
        joined = self._joined.pop(transfer_id, None)
        if joined is None:
            return False
        for part_id, part in joined.parts.items():
            del self._of_part[part_id]
            self._lanes[part.destination_rank].close(part_id, abort_reason)
        return True

    def open_ids(self) -> list[int]:
        return list(self._joined)

    def clear(self, lost_rank: int) -> None:
        """The transfer process of a rank was restarted: no transfer gets all its parts any more."""
        self._lanes[lost_rank].clear()
        for transfer_id in list(self._joined):
            self.close(transfer_id, abort_reason=LOST_ELSEWHERE)
