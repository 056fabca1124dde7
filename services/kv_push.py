"""The prefill side of transfers: which computed tokens are packed into which lent slots.

Packing follows computation chunk by chunk, so that a prompt's head travels while its tail is computed.
A slot is only lent against a grant of the receiver, so what is packed can always be moved.

1. `launched`  a chunk is on its way: its tokens may be packed behind it
2. `pack`      a pack is queued for every run of such tokens that has a slot; nobody waits for it
3. `deliver`   slots whose packs are done go to the transfer process
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from kvtransfer.client import TransferClient
from kvtransfer.messages import Segment, SendConfirmed, SendSlots, SlotUse
from kvtransfer.spans import Spans
from services.engine.moves import Mark, Move
from services.kv_moves import KvMoves
from services.scheduler.sequence import Chunk, Sequence


@dataclass(frozen=True, slots=True)
class Packing:
    """A slot that is being packed."""

    use: SlotUse
    start_token: int
    token_count: int
    move: Move
    queued_s: float


@dataclass(slots=True, eq=False)
class Outgoing:
    """One transfer. `next_token` is the first one not packed yet; `end_token`, `heads` (counted
    within the rank) and `segment_tokens`, the most that fit a slot, are set once confirmed.

    `marks` are `(end token, mark)` of the steps that compute the sequence in `pages`.
    """

    transfer_id: int
    sequence: Sequence
    next_token: int = 0
    end_token: int = 0
    heads: range = range(0)
    segment_tokens: int = 0
    slots: deque[SlotUse] = field(default_factory=deque)
    packing: deque[Packing] = field(default_factory=deque)
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
        self._given_up: deque[Packing] = deque()
        """Packs that ran when their transfers ended: their slots go back once they are done."""
        client.packs_idle = self._given_up_are_done

    def __len__(self) -> int:
        return len(self._outgoing)

    @property
    def in_flight(self) -> bool:
        """Whether a pack is being waited for."""
        return not self._given_up_are_done() or any(one.packing for one in self._outgoing.values())

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
        return sum(self._pack_one(one) for one in self._outgoing.values() if one.slots)

    def deliver(self) -> int:
        """Hand over the slots whose packs are done; returns how many."""
        delivered = 0
        for outgoing in self._outgoing.values():
            segments = []
            while outgoing.packing and outgoing.packing[0].move.is_done:
                packed = outgoing.packing.popleft()
                segments.append(_segment(packed))
                self._spans.note(
                    outgoing.transfer_id,
                    "pack",
                    packed.start_token,
                    packed.token_count,
                    packed.queued_s,
                    self._clock(),
                )
            if segments:
                self._client.filled(outgoing.transfer_id, segments)
                delivered += len(segments)
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

    def _pack_one(self, outgoing: Outgoing) -> int:
        sequence, packed = outgoing.sequence, 0
        ready = min(sequence.computed_tokens, outgoing.end_token)
        while outgoing.slots and outgoing.next_token < ready:
            start, count = outgoing.next_token, min(ready - outgoing.next_token, outgoing.segment_tokens)
            use = outgoing.slots.popleft()
            move = self._moves.pack(
                sequence.pages,
                start,
                count,
                use.slot,
                self._client.checksum,
                outgoing.mark_of(start + count),
                outgoing.heads,
            )
            outgoing.packing.append(Packing(use, start, count, move, self._clock()))
            outgoing.next_token += count
            packed += count
        return packed

    def _give_up(self, outgoing: Outgoing) -> None:
        """Its pages may be given away now, and written by a step that must not overtake the packs."""
        if outgoing.packing:
            self._moves.hold_steps(outgoing.packing[-1].move)
            self._given_up.extend(outgoing.packing)
            outgoing.packing.clear()

    def _given_up_are_done(self) -> bool:
        while self._given_up and self._given_up[0].move.is_done:
            self._given_up.popleft()
        return not self._given_up


def _segment(packed: Packing) -> Segment:
    use, move = packed.use, packed.move
    return Segment(
        use.slot, use.generation, packed.start_token, packed.token_count, move.byte_count, move.checksum()
    )
