"""The KV receiver of a decode worker: it unpacks arrived segments into reserved pages, and commits.

A transfer is a list of slices (head_slices.py): every rank asks for the heads it has, of those ranks of the
source that have them. A slice is committed as it is whole; the request goes on when all are; if one fails,
the others are ended.

Nothing is decoded from KV that is not known to be whole: the transfer process has checked epoch, slot
generation, range and length of each segment and that none overlaps another; here the tokens are counted
and, where checksums are on, each segment's content is judged once its unpack is done, before the commit.

1. `open`     asks for what the prefix cache does not have
2. `arrived`  takes notice of segments that have arrived
3. `settle`   queues the unpacks of what has arrived, by one launch a rank, as soon as no step uses its pages
              any more for who had them before; of those that are done the slots go back, and slices that are
              whole are committed. Nobody waits, and what has to wait holds up nothing else
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from kvtransfer.client import TransferClient
from kvtransfer.messages import Aborted, Arrived, Segment, SlotUse
from kvtransfer.spans import Spans
from services.engine.errors import ChecksumMismatch
from services.engine.kv.copies import Copy
from services.engine.kv.run_table import SlotRun
from services.protocol.messages import WorkerTransferAddress
from services.scheduler.sequence import Sequence
from services.transfer.copies import KvCopier
from services.transfer.head_slices import HeadSlice, slices_of
from services.transfer.sender import LOST_ELSEWHERE

ArrivedRun = tuple["IncomingSlice", Segment]


@dataclass(slots=True, eq=False)
class Unpacking:
    """Slots that are being unpacked by one copy; the copy's run number i is `runs[i]`."""

    runs: list[ArrivedRun]
    copy: Copy
    queued_s: float


@dataclass(slots=True, eq=False)
class ReceivingRank:
    """One rank of this worker: what unpacks its heads, and its transfer process."""

    copier: KvCopier
    client: TransferClient
    arrived: list[ArrivedRun] = field(default_factory=list)
    """Not queued yet."""
    unpacking: deque[Unpacking] = field(default_factory=deque)
    """In the order in which they end; also of transfers that have ended meanwhile."""


@dataclass(slots=True, eq=False)
class SlicedReceive:
    """`transfer_s` is how long the slowest slice took from its first arrival until it was whole."""

    transfer_id: int
    sequence: Sequence
    slices: dict[int, "IncomingSlice"] = field(default_factory=dict)
    """Those that are not whole yet, by id."""
    transfer_s: float = 0.0


@dataclass(slots=True, eq=False)
class IncomingSlice:
    transfer: SlicedReceive
    heads: HeadSlice
    rank: ReceivingRank
    missing_tokens: int
    first_arrival_s: float | None = None
    last_copy: Copy | None = None
    """The latest that unpacks some of it."""


@dataclass(slots=True)
class Settled:
    """Transfers that are whole now, and those that turned out broken, with the reason; the latter are
    still open, for the caller to end."""

    whole: list[SlicedReceive] = field(default_factory=list)
    broken: list[tuple[int, str]] = field(default_factory=list)


class KvReceiver:
    """`ranks[i]` are the copier and the transfer client of rank i; `kv_heads` are the model's."""

    def __init__(
        self,
        ranks: Iterable[tuple[KvCopier, TransferClient]],
        kv_heads: int,
        clock: Callable[[], float],
        spans: Spans,
    ) -> None:
        self._ranks = [ReceivingRank(copier, client) for copier, client in ranks]
        self._kv_heads = kv_heads
        self._clock = clock
        self._spans = spans
        self._transfers: dict[int, SlicedReceive] = {}
        self._slices: dict[int, IncomingSlice] = {}
        """All that are not whole yet, of any transfer."""
        self._just_aborted: dict[int, ReceivingRank] = {}
        """Slices that were aborted here since the last `settle`, by id: what the clients had taken in before
        may still be on its way to `arrived`."""

    def __len__(self) -> int:
        return len(self._transfers)

    @property
    def ready(self) -> bool:
        """Whether anything can be asked for; not while a transfer process is being restarted."""
        return all(rank.client.ready for rank in self._ranks)

    @property
    def in_flight(self) -> bool:
        """Whether an unpack is being waited for."""
        return any(rank.unpacking or rank.arrived for rank in self._ranks)

    def open(
        self, sequence: Sequence, transfer_id: int, source: WorkerTransferAddress, deadline_s: float
    ) -> bool:
        """Asks for what the prefix cache does not have. True if that is nothing: the reservation is confirmed
        and the transfer has ended already. Raises ValueError if the source has a number of ranks that does
        not divide the heads."""
        sources = source.ranks
        if self._kv_heads % len(sources):
            raise ValueError(f"{len(sources)} ranks of the source do not divide {self._kv_heads} KV heads")
        start_token, end_token = sequence.cached_tokens, sequence.prompt_tokens
        transfer = SlicedReceive(transfer_id, sequence)
        self._transfers[transfer_id] = transfer
        for heads in slices_of(transfer_id, self._kv_heads, len(sources), len(self._ranks)):
            slice_id, rank = heads.slice_id, self._ranks[heads.destination_rank]
            one = IncomingSlice(transfer, heads, rank, end_token - start_token)
            self._slices[slice_id] = transfer.slices[slice_id] = one
            address, head_count = sources[heads.source_rank], len(heads.destination_heads)
            rank.client.open_receive(slice_id, address, start_token, end_token, deadline_s, head_count)
            if one.missing_tokens == 0:
                self._commit(one)
        if transfer.slices:
            return False
        del self._transfers[transfer_id]
        return True

    def arrived(self, event: Arrived) -> None:
        """The segments are taken into pages with the next `settle`. Those of a slice that has ended here are
        only freed: by the client, or here if it has ended since the client took them in."""
        one = self._slices.get(event.transfer_id)
        if one is None:
            rank = self._just_aborted.get(event.transfer_id)
            if rank is not None:
                rank.client.freed([_use(segment) for segment in event.segments])
            return
        if one.first_arrival_s is None:
            one.first_arrival_s = self._clock()
        one.rank.arrived += [(one, segment) for segment in event.segments]

    def settle(self) -> Settled:
        """Queues what has arrived, frees the slots whose unpacks are done, and judges what was in them."""
        self._just_aborted.clear()
        settled = Settled()
        for rank in self._ranks:
            freed: list[SlotUse] = []
            if rank.arrived:
                self._queue_arrived(rank, freed)
            while rank.unpacking and rank.unpacking[0].copy.is_done:
                self._take_unpacked(rank.unpacking.popleft(), freed, settled)
            if freed:
                rank.client.freed(freed)
        return settled

    def aborted(self, event: Aborted) -> int | None:
        """A slice has ended without a commit, and its transfer with it, whose id is returned; None if it was
        not open."""
        one = self._slices.get(event.transfer_id)
        if one is None:
            return None
        self._end_slice(one)
        self.end(one.transfer.transfer_id, abort_reason=event.reason)
        return one.transfer.transfer_id

    def end(self, transfer_id: int, abort_reason: str | None = None) -> bool:
        """Forgets a transfer; with a reason, the transfer processes are asked to end it. False if it was not
        open."""
        transfer = self._transfers.pop(transfer_id, None)
        if transfer is None:
            return False
        for one in list(transfer.slices.values()):
            self._end_slice(one, abort_reason)
        return True

    def rank_lost(self, lost_rank: int) -> list[int]:
        """The transfer process of a rank was restarted: no transfer gets all its slices any more. Returns
        those that end. The former slots are gone, and none is freed."""
        rank, ended = self._ranks[lost_rank], list(self._transfers)
        for one in [one for one in self._slices.values() if one.rank is rank]:
            self._end_slice(one)  # nobody is there to be asked
        rank.arrived.clear()
        rank.unpacking.clear()
        for transfer_id in ended:
            self.end(transfer_id, abort_reason=LOST_ELSEWHERE)
        self._just_aborted = {one: of for one, of in self._just_aborted.items() if of is not rank}
        return ended

    # ------------------------------------------------------------ slices

    def _commit(self, one: IncomingSlice) -> None:
        transfer, sequence, slice_id = one.transfer, one.transfer.sequence, one.heads.slice_id
        del self._slices[slice_id], transfer.slices[slice_id]
        one.rank.client.commit(slice_id)
        now_s, moved_tokens = self._clock(), sequence.prompt_tokens - sequence.cached_tokens
        self._spans.note(slice_id, "commit", sequence.cached_tokens, moved_tokens, now_s, now_s)

    def _end_slice(self, one: IncomingSlice, abort_reason: str | None = None) -> None:
        """Its pages may be given away now, and written by a step that must not overtake the unpacks."""
        slice_id, copy = one.heads.slice_id, one.last_copy
        del self._slices[slice_id], one.transfer.slices[slice_id]
        if copy is not None and not copy.is_done:
            one.rank.copier.fence(copy)
        if abort_reason is not None:
            self._just_aborted[slice_id] = one.rank
            one.rank.client.abort(slice_id, abort_reason)

    # ------------------------------------------------------------ one rank's slots

    def _queue_arrived(self, rank: ReceivingRank, freed: list[SlotUse]) -> None:
        """One copy for all whose pages nobody uses any more; the others stay. Slots of slices that have ended
        meanwhile are only freed."""
        passed_step = rank.copier.passed_step()
        ready: list[ArrivedRun] = []
        waiting: list[ArrivedRun] = []
        for run in rank.arrived:
            one, segment = run
            if self._slices.get(one.heads.slice_id) is not one:
                freed.append(_use(segment))
            elif one.transfer.sequence.free_after_step <= passed_step:
                ready.append(run)
            else:
                waiting.append(run)
        rank.arrived = waiting
        if ready:
            self._queue(rank, ready)

    def _queue(self, rank: ReceivingRank, runs: list[ArrivedRun]) -> None:
        with_checksums = any(segment.checksum is not None for _, segment in runs)
        copy = rank.copier.unpack(
            [
                SlotRun(
                    one.transfer.sequence.pages,
                    segment.start_token,
                    segment.token_count,
                    segment.slot,
                    one.heads.destination_heads,
                )
                for one, segment in runs
            ],
            with_checksums,
        )
        for run in runs:
            run[0].last_copy = copy
        rank.unpacking.append(Unpacking(runs, copy, self._clock()))

    def _take_unpacked(self, done: Unpacking, freed: list[SlotUse], settled: Settled) -> None:
        now_s = self._clock()
        for run, (one, segment) in enumerate(done.runs):
            freed.append(_use(segment))
            slice_id, start_token, token_count = one.heads.slice_id, segment.start_token, segment.token_count
            self._spans.note(slice_id, "unpack", start_token, token_count, done.queued_s, now_s)
            if self._slices.get(slice_id) is not one:
                continue  # it has ended meanwhile
            try:
                done.copy.judge(run, segment.checksum)
            except ChecksumMismatch as mismatch:
                reason = f"tokens [{start_token}, {start_token + token_count}): {mismatch}"
                settled.broken.append((one.transfer.transfer_id, reason))
                continue
            one.missing_tokens -= token_count
            if one.missing_tokens == 0:
                if one.first_arrival_s is not None:
                    one.transfer.transfer_s = max(one.transfer.transfer_s, now_s - one.first_arrival_s)
                self._commit(one)
                if not one.transfer.slices:
                    del self._transfers[one.transfer.transfer_id]
                    settled.whole.append(one.transfer)


def _use(segment: Segment) -> SlotUse:
    return SlotUse(segment.slot, segment.generation)
