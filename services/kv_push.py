"""The prefill side of transfers: which computed tokens are packed into which lent slots.

Packing follows computation chunk by chunk, so that a prompt's head travels while its tail is computed.
A slot is only lent against a grant of the receiver, so what is packed can always be moved.

1. `launched`  a chunk is on its way: its tokens may be packed behind it
2. `pack`      packs are queued for all runs of such tokens that have slots, together for all transfers whose
               tokens are computed, and for each step that is still running; nobody waits for them
3. `deliver`   slots whose packs are done go to the transfer process
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from kvtransfer.client import TransferClient
from kvtransfer.messages import Segment, SendConfirmed, SendSlots, SlotUse
from kvtransfer.spans import Spans
from services.engine.marks import Mark, Marks
from services.engine.moves import Move
from services.engine.run_table import SlotRun
from services.kv_moves import KvMoves
from services.scheduler.sequence import Chunk, Sequence

Piece = tuple["Outgoing", SlotUse, int, int]
"""A transfer, a slot lent for it, and the first and the number of the tokens that go there."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Slots that are being packed by one move; `move`'s run number i is piece number i."""

    pieces: list[Piece]
    move: Move
    queued_s: float


@dataclass(slots=True, eq=False)
class Outgoing:
    """One transfer. `next_token` is the first one not packed yet; `end_token`, `heads` (counted
    within the rank) and `segment_tokens`, the most that fit a slot, are set once confirmed. `last_move` is
    the latest that packs some of it.

    `marks` are `(end token, mark)` of the steps that compute the sequence in `pages`.
    """

    transfer_id: int
    sequence: Sequence
    next_token: int = 0
    end_token: int = 0
    heads: range = range(0)
    segment_tokens: int = 0
    slots: deque[SlotUse] = field(default_factory=deque)
    last_move: Move | None = None
    pages: list[int] = field(default_factory=list)
    marks: deque[tuple[int, Mark | None]] = field(default_factory=deque)

    def launched(self, end_token: int, mark: Mark | None) -> None:
        if self.pages is not self.sequence.pages:  # computed anew, after its pages were taken away
            self.pages = self.sequence.pages
            self.marks.clear()
        self.marks.append((end_token, mark))

    def mark_of(self, end_token: int) -> Mark | None:
        """Of the step that computed the tokens before `end_token`; None if it is not known here, as for
        pages that were found: another sequence's steps computed them."""
        if self.pages is not self.sequence.pages:
            return None
        while self.marks and self.marks[0][0] < end_token:
            self.marks.popleft()
        return self.marks[0][1] if self.marks else None


class KvPush:
    """Of one rank. A transfer here is a part of one, where a worker has several ranks."""

    def __init__(
        self, moves: KvMoves, client: TransferClient, clock: Callable[[], float], spans: Spans
    ) -> None:
        self._moves = moves
        self._client = client
        self._clock = clock
        self._spans = spans
        self._outgoing: dict[int, Outgoing] = {}
        self._of_request: dict[int, list[Outgoing]] = {}
        self._packing: deque[Packing] = deque()
        """In the order in which they end; also of transfers that have ended meanwhile."""
        self._given_up: list[Move] = []
        """Those that ran when a transfer of theirs ended, whose slots go back once they are done."""
        client.packs_idle = self._given_up_are_done

    def __len__(self) -> int:
        return len(self._outgoing)

    @property
    def in_flight(self) -> bool:
        """Whether a pack is being waited for."""
        return bool(self._packing)

    def open(self, sequence: Sequence, transfer_id: int, deadline_s: float) -> None:
        outgoing = Outgoing(transfer_id, sequence)
        self._outgoing[transfer_id] = outgoing
        self._of_request.setdefault(sequence.work.request_id, []).append(outgoing)
        self._client.open_send(transfer_id, deadline_s)

    def confirmed(self, event: SendConfirmed, heads: range) -> bool:
        """The destination's pages are reserved; False for a transfer that has ended here."""
        outgoing = self._outgoing.get(event.transfer_id)
        if outgoing is None or event.end_token != outgoing.sequence.prompt_tokens:
            return False
        outgoing.next_token, outgoing.end_token = event.start_token, event.end_token
        outgoing.heads, outgoing.segment_tokens = heads, event.segment_tokens
        return True

    def ready(self, transfer_id: int) -> None:
        """The sequence has its pages, and nothing takes them away from a confirmed one."""
        if transfer_id in self._outgoing:
            self._client.send_ready(transfer_id)

    def lend(self, event: SendSlots) -> None:
        """Slots for a transfer that has ended are returned by its abort, not one by one."""
        outgoing = self._outgoing.get(event.transfer_id)
        if outgoing is not None:
            outgoing.slots.extend(event.slots)

    def launched(self, chunks: list[Chunk], mark: Mark | None) -> None:
        """A step with these chunks is queued; `mark` passes when it is done."""
        for chunk in chunks:
            for outgoing in self._of_request.get(chunk.sequence.work.request_id, ()):
                if outgoing.sequence is chunk.sequence:
                    outgoing.launched(chunk.start + chunk.count, mark)

    def computed(self, chunks: list[Chunk], start_s: float, end_s: float) -> None:
        """A step with these chunks ran from `start_s` to `end_s`."""
        for chunk in chunks:
            for outgoing in self._of_request.get(chunk.sequence.work.request_id, ()):
                self._spans.note(outgoing.transfer_id, "compute", chunk.start, chunk.count, start_s, end_s)

    def pack(self) -> int:
        """Queue packs for whatever is computed, or being so, and has a slot; returns how many tokens."""
        ready: list[Piece] = []
        running: dict[Mark | None, list[Piece]] = {}
        passed: dict[Mark | None, bool] = {}
        packed = 0
        for outgoing in self._outgoing.values():
            end_token = min(outgoing.sequence.computed_tokens, outgoing.end_token)
            slots, most, start = outgoing.slots, outgoing.segment_tokens, outgoing.next_token
            first = start
            while slots and start < end_token:
                count = min(end_token - start, most)
                mark = outgoing.mark_of(start + count)
                if mark not in passed:
                    passed[mark] = self._moves.passed(mark)
                pieces = ready if passed[mark] else running.setdefault(mark, [])
                pieces.append((outgoing, slots.popleft(), start, count))
                start += count
            outgoing.next_token = start
            packed += start - first
        if ready:
            self._queue(ready, ())
        everything = running.pop(None, None)  # comes last: what is queued behind it waits as well
        for mark, pieces in running.items():
            if mark is not None:
                self._queue(pieces, (mark,))
        if everything is not None:
            self._queue(everything, None)
        return packed

    def deliver(self) -> int:
        """Hand over the slots whose packs are done; returns how many."""
        filled: dict[int, list[Segment]] = {}
        delivered = 0
        while self._packing and self._packing[0].move.is_done:
            done, now_s = self._packing.popleft(), self._clock()
            move, byte_counts = done.move, done.move.byte_counts
            for run, (outgoing, use, start, count) in enumerate(done.pieces):
                transfer_id = outgoing.transfer_id
                if self._outgoing.get(transfer_id) is not outgoing:
                    continue  # it has ended meanwhile
                segment = Segment(
                    use.slot, use.generation, start, count, byte_counts[run], move.checksum(run)
                )
                filled.setdefault(transfer_id, []).append(segment)
                self._spans.note(transfer_id, "pack", start, count, done.queued_s, now_s)
                delivered += 1
        for transfer_id, segments in filled.items():
            self._client.filled(transfer_id, segments)
        return delivered

    def close(self, transfer_id: int, abort_reason: str | None = None) -> None:
        """Forget a transfer; with a reason, tell the transfer process to end it. Idempotent."""
        outgoing = self._outgoing.pop(transfer_id, None)
        if outgoing is None:
            return
        request_id = outgoing.sequence.work.request_id
        left = [one for one in self._of_request[request_id] if one is not outgoing]
        if left:
            self._of_request[request_id] = left
        else:
            del self._of_request[request_id]
        self._give_up(outgoing)
        if abort_reason is not None:
            self._client.abort(transfer_id, abort_reason)

    def clear(self) -> None:
        """The transfer process was restarted: nothing of the former life can be packed into."""
        for outgoing in self._outgoing.values():
            self._give_up(outgoing)
        self._outgoing.clear()
        self._of_request.clear()

    def _queue(self, pieces: list[Piece], after: Marks | None) -> None:
        runs = [
            SlotRun(outgoing.sequence.pages, start, count, use.slot, outgoing.heads)
            for outgoing, use, start, count in pieces
        ]
        move = self._moves.pack(runs, self._client.checksum, after)
        for piece in pieces:
            piece[0].last_move = move
        self._packing.append(Packing(pieces, move, self._clock()))

    def _give_up(self, outgoing: Outgoing) -> None:
        """Its pages may be given away now, and written by a step that must not overtake the packs."""
        move = outgoing.last_move
        if move is not None and not move.is_done:
            self._moves.hold_steps(move)
            self._given_up.append(move)

    def _given_up_are_done(self) -> bool:
        self._given_up = [move for move in self._given_up if not move.is_done]
        return not self._given_up
