"""The decode side of transfers: arrived segments are unpacked into reserved pages, then committed.

Nothing is decoded from KV that is not known to be whole: the transfer process has checked epoch, slot
generation, range and length of each segment and that none overlaps another; here the tokens are counted
and, where checksums are on, each segment's content is judged once its unpack is done, before the commit.

1. `open`    ask for what the prefix cache does not have
2. `unpack`  take notice of segments that have arrived
3. `settle`  queue the unpacks of what has arrived, by one launch, as soon as no step uses its pages any more
             for who had them before; of those that are done the slots go back, and transfers that are whole
             are committed. Nobody waits, and what has to wait holds up nothing else
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from kvtransfer.client import TransferClient
from kvtransfer.messages import Arrived, Segment, SlotUse, TransferAddress
from kvtransfer.spans import Spans
from services.engine.errors import ChecksumMismatch
from services.engine.kv.copies import Copy
from services.engine.kv.run_table import SlotRun
from services.scheduler.sequence import Sequence
from services.transfer.copies import KvCopier


@dataclass(slots=True, eq=False)
class IncomingTransfer:
    transfer_id: int
    sequence: Sequence
    missing_tokens: int
    heads: range = range(0)
    first_arrival_s: float | None = None
    transfer_s: float = 0.0


Piece = tuple[IncomingTransfer, Segment]


@dataclass(frozen=True, slots=True)
class Unpacking:
    """Slots that are being unpacked by one move; `move`'s run number i is piece number i."""

    pieces: list[Piece]
    move: Copy
    queued_s: float


@dataclass(slots=True)
class Settled:
    """Transfers that are whole now, and those that turned out broken, with the reason; the latter are
    still open, for the caller to end."""

    whole: list[IncomingTransfer] = field(default_factory=list)
    broken: list[tuple[int, str]] = field(default_factory=list)


class KvPull:
    """Of one rank. A transfer here is a part of one, where a worker has several ranks."""

    def __init__(
        self, moves: KvCopier, client: TransferClient, clock: Callable[[], float], spans: Spans
    ) -> None:
        self._moves = moves
        self._client = client
        self._clock = clock
        self._spans = spans
        self._incoming: dict[int, IncomingTransfer] = {}
        self._arrived: list[Piece] = []
        """Not queued yet."""
        self._unpacking: deque[Unpacking] = deque()
        """In the order in which they end; also of transfers that have ended meanwhile."""

    def __len__(self) -> int:
        return len(self._incoming)

    @property
    def ready(self) -> bool:
        """Whether anything can be asked for; not while the transfer process is being restarted."""
        return self._client.ready

    @property
    def in_flight(self) -> bool:
        """Whether an unpack is being waited for."""
        return bool(self._unpacking or self._arrived)

    def open(
        self, sequence: Sequence, transfer_id: int, source: TransferAddress, deadline_s: float, heads: range
    ) -> IncomingTransfer:
        """Ask for these of the rank's heads of what the prefix cache does not have; an empty
        range only confirms the reservation."""
        end_token = sequence.prompt_tokens
        missing_tokens = end_token - sequence.cached_tokens
        incoming = IncomingTransfer(transfer_id, sequence, missing_tokens, heads)
        self._incoming[transfer_id] = incoming
        self._client.open_receive(
            transfer_id, source, sequence.cached_tokens, end_token, deadline_s, len(heads)
        )
        if missing_tokens == 0:
            self._finish(incoming)
        return incoming

    def unpack(self, event: Arrived) -> None:
        """The segments are taken into pages with the next `settle`. Those of a transfer that has ended here
        are only freed."""
        incoming = self._incoming.get(event.transfer_id)
        if incoming is None:
            self._client.freed([SlotUse(one.slot, one.generation) for one in event.segments])
            return
        if incoming.first_arrival_s is None:
            incoming.first_arrival_s = self._clock()
        self._arrived += [(incoming, segment) for segment in event.segments]

    def settle(self) -> Settled:
        """Queue what has arrived, free the slots whose unpacks are done, and judge what was in them."""
        freed: list[SlotUse] = []
        if self._arrived:
            self._queue_arrived(freed)
        settled = Settled()
        while self._unpacking and self._unpacking[0].move.is_done:
            done, now_s = self._unpacking.popleft(), self._clock()
            for run, (incoming, segment) in enumerate(done.pieces):
                freed.append(SlotUse(segment.slot, segment.generation))
                start_token, token_count = segment.start_token, segment.token_count
                self._spans.note(
                    incoming.transfer_id, "unpack", start_token, token_count, done.queued_s, now_s
                )
                if self._incoming.get(incoming.transfer_id) is not incoming:
                    continue  # it has ended meanwhile
                try:
                    done.move.judge(run, segment.checksum)
                except ChecksumMismatch as mismatch:
                    reason = f"tokens [{start_token}, {start_token + token_count}): {mismatch}"
                    settled.broken.append((incoming.transfer_id, reason))
                    continue
                incoming.missing_tokens -= token_count
                if incoming.missing_tokens == 0:
                    if incoming.first_arrival_s is not None:
                        incoming.transfer_s = now_s - incoming.first_arrival_s
                    self._finish(incoming)
                    settled.whole.append(incoming)
        if freed:
            self._client.freed(freed)
        return settled

    def close(self, transfer_id: int, abort_reason: str | None = None) -> bool:
        """Forget a transfer; with a reason, tell the transfer process to end it. False if none was open."""
        incoming = self._incoming.pop(transfer_id, None)
        if incoming is None:
            return False
        self._give_up([incoming])
        if abort_reason is not None:
            self._client.abort(transfer_id, abort_reason)
        return True

    def open_ids(self) -> list[int]:
        return list(self._incoming)

    def clear(self) -> None:
        """The transfer process was restarted: its slots are gone, and none is freed."""
        self._give_up(list(self._incoming.values()))
        self._incoming.clear()
        self._arrived.clear()
        self._unpacking.clear()

    def _queue_arrived(self, freed: list[SlotUse]) -> None:
        """One move for all whose pages nobody uses any more; the others stay. Slots of transfers that have
        ended meanwhile are only freed."""
        passed_step = self._moves.passed_step()
        ready: list[Piece] = []
        waiting: list[Piece] = []
        for piece in self._arrived:
            incoming, segment = piece
            if self._incoming.get(incoming.transfer_id) is not incoming:
                freed.append(SlotUse(segment.slot, segment.generation))
            elif incoming.sequence.free_after_step <= passed_step:
                ready.append(piece)
            else:
                waiting.append(piece)
        self._arrived = waiting
        if ready:
            self._queue(ready)

    def _queue(self, pieces: list[Piece]) -> None:
        with_checksums = any(segment.checksum is not None for _, segment in pieces)
        runs = [
            SlotRun(
                incoming.sequence.pages,
                segment.start_token,
                segment.token_count,
                segment.slot,
                incoming.heads,
            )
            for incoming, segment in pieces
        ]
        move = self._moves.unpack(runs, with_checksums)
        self._unpacking.append(Unpacking(pieces, move, self._clock()))

    def _give_up(self, ended: list[IncomingTransfer]) -> None:
        """Their pages may be given away now, and written by a step that must not overtake the unpacks."""
        running = [one.move for one in self._unpacking if any(piece[0] in ended for piece in one.pieces)]
        if running:
            self._moves.fence(running[-1])

    def _finish(self, incoming: IncomingTransfer) -> None:
        del self._incoming[incoming.transfer_id]
        self._client.commit(incoming.transfer_id)
        sequence, now_s = incoming.sequence, self._clock()
        moved_tokens = sequence.prompt_tokens - sequence.cached_tokens
        self._spans.note(incoming.transfer_id, "commit", sequence.cached_tokens, moved_tokens, now_s, now_s)
