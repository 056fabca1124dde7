"""The KV sender of a prefill worker: it packs computed tokens into assigned slots and hands those over.

A transfer is a list of slices (head_slices.py), one for each pair of ranks that share heads; between workers
of one rank it has one slice. Packing follows computation chunk by chunk, so that a prompt's head travels
while its tail is computed.

1. `open`      opens the slice between both ranks 0: how many ranks the destination has is not known yet
2. `on_event`  its confirmation says so, and the other slices are opened. A transfer is confirmed when all its
               slices are, committed when all are, and has failed when one has. Grants say for how many
               segments the destination has room; assigned slots belong to no transfer before they are packed
3. `pack`      slots go to tokens whose step is done, the oldest request's first; each rank packs its heads
               into its slots by one launch. Tokens that are still being computed take no slot, and nothing
               waits on the device
4. `deliver`   slots whose packs are done go to the transfer process of their rank
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from kvtransfer.client import SlotsAssigned, TransferClient, WorkerEvent
from kvtransfer.messages import Aborted, Segment, SendCommitted, SendConfirmed, SendGranted, SlotUse
from kvtransfer.spans import Spans
from services.engine.kv.copies import Copy
from services.engine.kv.run_table import SlotRun
from services.scheduler.sequence import Chunk, Sequence
from services.transfer.copies import KvCopier
from services.transfer.head_slices import HeadSlice, slices_of

LOST_ELSEWHERE = "the transfer process of another rank is gone"

PackedRun = tuple["OutgoingSlice", SlotUse, int, int]
"""A slice, the slot it is packed into, and the first and the number of its tokens there."""


@dataclass(slots=True, eq=False)
class Packing:
    """Slots that are being packed by one copy; the copy's run number i is `runs[i]`."""

    runs: list[PackedRun]
    copy: Copy
    queued_s: float


@dataclass(slots=True, eq=False)
class SendingRank:
    """One rank of this worker: what packs its heads, its transfer process, and its slots."""

    copier: KvCopier
    client: TransferClient
    slots: deque[SlotUse] = field(default_factory=deque)
    """Assigned to us, and not being packed."""
    packing: deque[Packing] = field(default_factory=deque)
    """In the order in which they end; also of transfers that have ended meanwhile."""


@dataclass(slots=True, eq=False)
class SlicedSend:
    transfer_id: int
    sequence: Sequence
    deadline_s: float
    slices: dict[int, "OutgoingSlice"] = field(default_factory=dict)
    """Those that are open, by id."""
    confirmed_tokens: tuple[int, int] | None = None
    """The range that the first slice was asked for; all are asked for the same."""


@dataclass(slots=True, eq=False)
class OutgoingSlice:
    """`next_token` is the first one not packed yet; `end_token` and `segment_tokens`, the most that fit a
    slot, are set once confirmed. `grants` is how many more segments the destination has room for, `ready`
    whether the sequence has pages that nobody takes away. `last_copy` is the latest that packs some of it."""

    transfer: SlicedSend
    heads: HeadSlice
    rank: SendingRank
    next_token: int = 0
    end_token: int = 0
    segment_tokens: int = 0
    grants: int = 0
    ready: bool = False
    last_copy: Copy | None = None

    def wanted_slots(self) -> int:
        """How many slots it could use at once, all its tokens being computed; as the transfer process counts
        them when it assigns."""
        if not self.ready or not self.segment_tokens:
            return 0
        return min(self.grants, -(-(self.end_token - self.next_token) // self.segment_tokens))


class KvSender:
    """`ranks[i]` are the copier and the transfer client of rank i; `kv_heads` are the model's."""

    def __init__(
        self,
        ranks: Iterable[tuple[KvCopier, TransferClient]],
        kv_heads: int,
        clock: Callable[[], float],
        spans: Spans,
    ) -> None:
        self._ranks = [SendingRank(copier, client) for copier, client in ranks]
        self._kv_heads = kv_heads
        self._clock = clock
        self._spans = spans
        self._transfers: dict[int, SlicedSend] = {}
        self._of_request: dict[int, SlicedSend] = {}
        self._slices: dict[int, OutgoingSlice] = {}
        """All that are open, of any transfer."""

    def __len__(self) -> int:
        return len(self._transfers)

    @property
    def in_flight(self) -> bool:
        """Whether a pack is being waited for."""
        return any(rank.packing for rank in self._ranks)

    def open(self, sequence: Sequence, transfer_id: int, deadline_s: float) -> None:
        transfer = SlicedSend(transfer_id, sequence, deadline_s)
        self._transfers[transfer_id] = transfer
        self._of_request[sequence.work.request_id] = transfer
        # Its heads are known once the other side's ranks are; it needs them to pack, not to open.
        self._open_slice(transfer, HeadSlice(transfer_id, 0, 0, range(0), range(0)))

    def on_event(self, event: WorkerEvent) -> WorkerEvent | None:
        """What an event about a slice means for its transfer; None: nothing yet, or nothing any more. An
        event that is about no slice is returned as it is."""
        if isinstance(event, SlotsAssigned):
            self._ranks[event.rank].slots.extend(event.slots)
            return None
        if not isinstance(event, SendConfirmed | SendGranted | SendCommitted | Aborted):
            return event
        one = self._slices.get(event.transfer_id)
        if one is None:
            return None
        transfer = one.transfer
        match event:
            case SendConfirmed():
                return self._confirm(one, event)
            case SendGranted(segments=segments):
                one.grants += segments
            case SendCommitted():
                self._end_slice(one)
                if not transfer.slices:
                    self._forget(transfer)
                    return SendCommitted(transfer.transfer_id)
            case Aborted(reason=reason):
                self._end_slice(one)
                self.end(transfer.transfer_id, abort_reason=reason)
                return Aborted(transfer.transfer_id, reason)
        return None

    def ready(self, transfer_id: int) -> None:
        """A confirmed transfer's sequence has its pages, and nothing takes them away."""
        transfer = self._transfers.get(transfer_id)
        for slice_id, one in transfer.slices.items() if transfer is not None else ():
            one.ready = True
            one.rank.client.send_ready(slice_id)

    def computed(self, chunks: list[Chunk], start_s: float, end_s: float) -> None:
        """A step with these chunks ran from `start_s` to `end_s`."""
        for chunk in chunks:
            transfer = self._of_request.get(chunk.sequence.work.request_id)
            for slice_id in transfer.slices if transfer is not None else ():
                self._spans.note(slice_id, "compute", chunk.start, chunk.count, start_s, end_s)

    def pack(self) -> int:
        """Queues packs for what is computed and has a slot; returns how many tokens. Slots that nobody could
        use go back."""
        return sum(self._pack_rank(rank) for rank in self._ranks if rank.slots)

    def deliver(self) -> int:
        """Hands over the slots whose packs are done; returns how many."""
        return sum(self._deliver_rank(rank) for rank in self._ranks)

    def end(self, transfer_id: int, abort_reason: str | None = None) -> None:
        """Forgets a transfer; with a reason, the transfer processes are asked to end it. Idempotent."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            return
        for one in list(transfer.slices.values()):
            self._end_slice(one, abort_reason)
        self._forget(transfer)

    def rank_lost(self, lost_rank: int) -> None:
        """The transfer process of a rank was restarted: no transfer has all its slices any more, and nothing
        can be packed into the former slots."""
        rank = self._ranks[lost_rank]
        for one in [one for one in self._slices.values() if one.rank is rank]:
            self._end_slice(one)  # nobody is there to be asked
        rank.slots.clear()
        for packing in rank.packing:
            packing.runs.clear()
        for transfer_id in list(self._transfers):
            self.end(transfer_id, abort_reason=LOST_ELSEWHERE)

    # ------------------------------------------------------------ slices

    def _confirm(self, one: OutgoingSlice, event: SendConfirmed) -> SendConfirmed | Aborted | None:
        transfer, tokens = one.transfer, (event.start_token, event.end_token)
        if transfer.confirmed_tokens is None:
            transfer.confirmed_tokens = tokens
            self._open_others(one, event.tp)
        if (
            tokens != transfer.confirmed_tokens
            or event.end_token != transfer.sequence.prompt_tokens
            or event.kv_heads != len(one.heads.source_heads)
        ):
            reason = "the destination wants another prompt, or other heads"
            self.end(transfer.transfer_id, abort_reason=reason)
            return Aborted(transfer.transfer_id, reason)
        one.next_token, one.end_token = tokens
        one.segment_tokens = event.segment_tokens
        if not all(one.end_token for one in transfer.slices.values()):
            return None
        return SendConfirmed(transfer.transfer_id, *tokens, self._kv_heads, event.segment_tokens, event.tp)

    def _open_others(self, first: OutgoingSlice, destination_tp: int) -> None:
        if self._kv_heads % destination_tp:
            return  # the first slice's heads will not be those that the destination names
        transfer_id = first.transfer.transfer_id
        for heads in slices_of(transfer_id, self._kv_heads, len(self._ranks), destination_tp):
            if heads.slice_id == transfer_id:
                first.heads = heads
            else:
                self._open_slice(first.transfer, heads)

    def _open_slice(self, transfer: SlicedSend, heads: HeadSlice) -> None:
        one = OutgoingSlice(transfer, heads, self._ranks[heads.source_rank])
        self._slices[heads.slice_id] = transfer.slices[heads.slice_id] = one
        one.rank.client.open_send(heads.slice_id, transfer.deadline_s)

    def _end_slice(self, one: OutgoingSlice, abort_reason: str | None = None) -> None:
        """Its pages may be given away now, and written by a step that must not overtake the packs."""
        slice_id, copy = one.heads.slice_id, one.last_copy
        del self._slices[slice_id], one.transfer.slices[slice_id]
        if copy is not None and not copy.is_done:
            one.rank.copier.fence(copy)
        if abort_reason is not None:
            one.rank.client.abort(slice_id, abort_reason)

    def _forget(self, transfer: SlicedSend) -> None:
        del self._transfers[transfer.transfer_id]
        request_id = transfer.sequence.work.request_id
        if self._of_request.get(request_id) is transfer:
            del self._of_request[request_id]

    # ------------------------------------------------------------ one rank's slots

    def _pack_rank(self, rank: SendingRank) -> int:
        slots, passed_step = rank.slots, rank.copier.passed_step()
        runs: list[PackedRun] = []
        wanted_slots = packed = 0
        granted = [one for one in self._slices.values() if one.rank is rank and one.grants]
        for one in sorted(granted, key=lambda one: one.transfer.sequence.arrival):
            end_token = min(one.transfer.sequence.tokens_done(passed_step), one.end_token)
            start = first = one.next_token
            while slots and one.grants and start < end_token:
                count = min(end_token - start, one.segment_tokens)
                runs.append((one, slots.popleft(), start, count))
                one.grants -= 1
                start += count
            one.next_token = start
            packed += start - first
            wanted_slots += one.wanted_slots()
        if runs:
            self._queue(rank, runs)
        if len(slots) > wanted_slots:
            rank.client.freed([slots.pop() for _ in range(len(slots) - wanted_slots)])
        return packed

    def _queue(self, rank: SendingRank, runs: list[PackedRun]) -> None:
        copy = rank.copier.pack(
            [
                SlotRun(one.transfer.sequence.pages, start, count, use.slot, one.heads.source_heads)
                for one, use, start, count in runs
            ],
            rank.client.checksum,
        )
        for run in runs:
            run[0].last_copy = copy
        rank.packing.append(Packing(runs, copy, self._clock()))

    def _deliver_rank(self, rank: SendingRank) -> int:
        filled: dict[int, list[Segment]] = {}
        delivered = 0
        while rank.packing and rank.packing[0].copy.is_done:
            done, now_s = rank.packing.popleft(), self._clock()
            copy, byte_counts = done.copy, done.copy.byte_counts
            for run, (one, use, start, count) in enumerate(done.runs):
                slice_id = one.heads.slice_id
                if self._slices.get(slice_id) is not one:
                    rank.slots.append(use)  # it has ended meanwhile; the slot is as good as new
                    continue
                segment = Segment(
                    use.slot, use.generation, start, count, byte_counts[run], copy.checksum(run)
                )
                filled.setdefault(slice_id, []).append(segment)
                self._spans.note(slice_id, "pack", start, count, done.queued_s, now_s)
                delivered += 1
        for slice_id, segments in filled.items():
            rank.client.filled(slice_id, segments)
        return delivered
