"""The prefill side of transfers: which computed tokens are packed into which assigned slots.

Packing follows computation chunk by chunk, so that a prompt's head travels while its tail is computed.

1. `confirmed`, `granted`   the destination has reserved pages, and has room for so many segments
2. `assign`      slots to pack into; they belong to no transfer before they are packed
3. `pack`      slots go to tokens whose step is done, the oldest request's first, and are packed at once by
               one launch. Tokens that are still being computed take none, and nothing waits on the device
4. `deliver`   slots whose packs are done go to the transfer process
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from kvtransfer.client import TransferClient
from kvtransfer.messages import Segment, SendConfirmed, SendGranted, SlotUse
from kvtransfer.spans import Spans
from services.engine.kv.copies import Copy
from services.engine.kv.run_table import SlotRun
from services.scheduler.sequence import Chunk, Sequence
from services.transfer.copies import KvCopier

Piece = tuple["Outgoing", SlotUse, int, int]
"""A transfer, a slot assigned to us, and the first and the number of the tokens that go there."""


@dataclass(slots=True, eq=False)
class Packing:
    """Slots that are being packed by one move; `move`'s run number i is piece number i."""

    pieces: list[Piece]
    move: Copy
    queued_s: float


@dataclass(slots=True, eq=False)
class Outgoing:
    """One transfer. `next_token` is the first one not packed yet; `end_token`, `heads` (counted
    within the rank) and `segment_tokens`, the most that fit a slot, are set once confirmed. `grants` is how
    many more segments the destination has room for, `ready` whether the sequence has pages that nobody takes
    away. `last_move` is the latest that packs some of it."""

    transfer_id: int
    sequence: Sequence
    next_token: int = 0
    end_token: int = 0
    heads: range = range(0)
    segment_tokens: int = 0
    grants: int = 0
    ready: bool = False
    last_move: Copy | None = None

    def wanted_slots(self) -> int:
        """How many slots it could use at once, all its tokens being computed; as the transfer process counts
        them when it assigns."""
        if not self.ready or not self.segment_tokens:
            return 0
        return min(self.grants, -(-(self.end_token - self.next_token) // self.segment_tokens))


class KvPush:
    """Of one rank. A transfer here is a part of one, where a worker has several ranks."""

    def __init__(
        self, moves: KvCopier, client: TransferClient, clock: Callable[[], float], spans: Spans
    ) -> None:
        self._moves = moves
        self._client = client
        self._clock = clock
        self._spans = spans
        self._outgoing: dict[int, Outgoing] = {}
        self._of_request: dict[int, list[Outgoing]] = {}
        self._slots: deque[SlotUse] = deque()
        """Lent to us, and not being packed."""
        self._packing: deque[Packing] = deque()
        """In the order in which they end; also of transfers that have ended meanwhile."""

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
        outgoing = self._outgoing.get(transfer_id)
        if outgoing is not None:
            outgoing.ready = True
            self._client.send_ready(transfer_id)

    def granted(self, event: SendGranted) -> None:
        outgoing = self._outgoing.get(event.transfer_id)
        if outgoing is not None:
            outgoing.grants += event.segments

    def assign(self, slots: list[SlotUse]) -> None:
        self._slots.extend(slots)

    def computed(self, chunks: list[Chunk], start_s: float, end_s: float) -> None:
        """A step with these chunks ran from `start_s` to `end_s`."""
        for chunk in chunks:
            for outgoing in self._of_request.get(chunk.sequence.work.request_id, ()):
                self._spans.note(outgoing.transfer_id, "compute", chunk.start, chunk.count, start_s, end_s)

    def pack(self) -> int:
        """Queue packs for what is computed and has a slot; returns how many tokens. Slots that nobody could
        use go back."""
        slots = self._slots
        if not slots:
            return 0
        passed_step = self._moves.passed_step()
        pieces: list[Piece] = []
        wanted_slots = packed = 0
        granted = [one for one in self._outgoing.values() if one.grants]
        for outgoing in sorted(granted, key=lambda one: one.sequence.arrival):
            end_token = min(outgoing.sequence.tokens_done(passed_step), outgoing.end_token)
            start = first = outgoing.next_token
            while slots and outgoing.grants and start < end_token:
                count = min(end_token - start, outgoing.segment_tokens)
                pieces.append((outgoing, slots.popleft(), start, count))
                outgoing.grants -= 1
                start += count
            outgoing.next_token = start
            packed += start - first
            wanted_slots += outgoing.wanted_slots()
        if pieces:
            self._queue(pieces)
        if len(slots) > wanted_slots:
            self._client.freed([slots.pop() for _ in range(len(slots) - wanted_slots)])
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
                    self._slots.append(use)  # it has ended meanwhile; the slot is as good as new
                    continue
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
        self._slots.clear()
        for packing in self._packing:
            packing.pieces.clear()

    def _queue(self, pieces: list[Piece]) -> None:
        runs = [
            SlotRun(outgoing.sequence.pages, start, count, use.slot, outgoing.heads)
            for outgoing, use, start, count in pieces
        ]
        move = self._moves.pack(runs, self._client.checksum)
        for piece in pieces:
            piece[0].last_move = move
        self._packing.append(Packing(pieces, move, self._clock()))

    def _give_up(self, outgoing: Outgoing) -> None:
        """Its pages may be given away now, and written by a step that must not overtake the packs."""
        move = outgoing.last_move
        if move is not None and not move.is_done:
            self._moves.fence(move)
