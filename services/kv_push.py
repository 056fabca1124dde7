"""The prefill side of transfers: which computed tokens are packed into which lent slots.

Packing follows computation chunk by chunk, so that a prompt's head travels while its tail is computed.
A slot is only lent against a grant of the receiver, so what is packed can always be moved.
"""

from collections import deque
from dataclasses import dataclass, field

from kvtransfer.client import TransferClient
from kvtransfer.messages import Segment, SendConfirmed, SendSlots, SlotUse
from services.engine.engine import Engine
from services.scheduler.sequence import Sequence
from services.staging import Staging


@dataclass(slots=True)
class Outgoing:
    """One transfer. `next_token` is the first one not packed yet; `end_token` is set once confirmed."""

    transfer_id: int
    sequence: Sequence
    next_token: int = 0
    end_token: int = 0
    slots: deque[SlotUse] = field(default_factory=deque)


class KvPush:
    def __init__(self, engine: Engine, client: TransferClient, staging: Staging) -> None:
        self._engine = engine
        self._client = client
        self._staging = staging
        self._outgoing: dict[int, Outgoing] = {}

    def __len__(self) -> int:
        return len(self._outgoing)

    def open(self, sequence: Sequence, transfer_id: int, deadline_s: float) -> None:
        self._outgoing[transfer_id] = Outgoing(transfer_id, sequence)
        self._client.open_send(transfer_id, deadline_s)

    def confirmed(self, event: SendConfirmed) -> bool:
        """The destination's pages are reserved; False for a transfer that has ended here."""
        outgoing = self._outgoing.get(event.transfer_id)
        if outgoing is None or event.end_token != outgoing.sequence.prompt_tokens:
            return False
        outgoing.next_token, outgoing.end_token = event.start_token, event.end_token
        return True

    def lend(self, event: SendSlots) -> None:
        """Slots for a transfer that has ended are returned by its abort, not one by one."""
        outgoing = self._outgoing.get(event.transfer_id)
        if outgoing is not None:
            outgoing.slots.extend(event.slots)

    def pack(self) -> int:
        """Pack whatever is computed and has a slot; returns how many tokens were packed."""
        packed = 0
        for outgoing in self._outgoing.values():
            segments = self._pack_one(outgoing)
            if segments:
                self._client.filled(outgoing.transfer_id, segments)
                packed += sum(segment.token_count for segment in segments)
        return packed

    def close(self, transfer_id: int, abort_reason: str | None = None) -> None:
        """Forget a transfer; with a reason, tell the transfer process to end it. Idempotent."""
        if self._outgoing.pop(transfer_id, None) is not None and abort_reason is not None:
            self._client.abort(transfer_id, abort_reason)

    def clear(self) -> None:
        """The transfer process was restarted: nothing of the former life can be packed into."""
        self._outgoing.clear()

    def _pack_one(self, outgoing: Outgoing) -> list[Segment]:
        segments: list[Segment] = []
        sequence = outgoing.sequence
        ready = min(sequence.computed_tokens, outgoing.end_token)
        while outgoing.slots and outgoing.next_token < ready:
            count = min(ready - outgoing.next_token, self._client.tokens_per_slot)
            use = outgoing.slots.popleft()
            byte_count, checksum = self._engine.pack(
                sequence.pages,
                outgoing.next_token,
                count,
                self._staging.slot(use.slot),
                self._client.checksum,
            )
            segments.append(
                Segment(use.slot, use.generation, outgoing.next_token, count, byte_count, checksum)
            )
            outgoing.next_token += count
        if segments:
            self._engine.synchronize()  # the transfer process reads the slots as soon as it hears of them
        return segments
