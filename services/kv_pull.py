"""The decode side of transfers: arrived segments are unpacked into reserved pages, then committed.

Nothing is decoded from KV that is not known to be whole: the transfer process has checked epoch, slot
generation, range and length of each segment and that none overlaps another; here the tokens are counted
and, where checksums are on, each segment's content is checked.
"""

from collections.abc import Callable
from dataclasses import dataclass

from kvtransfer.client import TransferClient
from kvtransfer.messages import Arrived, SlotUse, TransferAddress
from services.engine.engine import Engine
from services.scheduler.sequence import Sequence
from services.staging import Staging


@dataclass(slots=True)
class Incoming:
    transfer_id: int
    sequence: Sequence
    missing_tokens: int
    first_arrival_s: float | None = None
    transfer_s: float = 0.0


class KvPull:
    def __init__(
        self, engine: Engine, client: TransferClient, staging: Staging, clock: Callable[[], float]
    ) -> None:
        self._engine = engine
        self._client = client
        self._staging = staging
        self._clock = clock
        self._incoming: dict[int, Incoming] = {}

    def __len__(self) -> int:
        return len(self._incoming)

    @property
    def ready(self) -> bool:
        """Whether anything can be asked for; not while the transfer process is being restarted."""
        return self._client.ready

    def open(
        self, sequence: Sequence, transfer_id: int, source: TransferAddress, deadline_s: float
    ) -> Incoming:
        """Ask for what the prefix cache does not have; an empty range only confirms the reservation."""
        end_token = sequence.prompt_tokens
        incoming = Incoming(transfer_id, sequence, end_token - sequence.cached_tokens)
        self._incoming[transfer_id] = incoming
        self._client.open_receive(transfer_id, source, sequence.cached_tokens, end_token, deadline_s)
        if incoming.missing_tokens == 0:
            self._finish(incoming)
        return incoming

    def unpack(self, event: Arrived) -> Incoming | None:
        """Take the segments into pages and free their slots; returns the transfer if it is whole now.

        Segments of a transfer that has ended here are only freed. Raises ChecksumMismatch, after the
        slots were freed; the transfer is then still open, for the caller to end.
        """
        incoming = self._incoming.get(event.transfer_id)
        try:
            if incoming is None:
                return None
            if incoming.first_arrival_s is None:
                incoming.first_arrival_s = self._clock()
            for segment in event.segments:
                self._engine.unpack(
                    incoming.sequence.pages,
                    segment.start_token,
                    segment.token_count,
                    self._staging.slot(segment.slot)[: segment.byte_count],
                    segment.checksum,
                )
                incoming.missing_tokens -= segment.token_count
        finally:
            self._engine.synchronize()  # a freed slot is written again at once
            self._client.freed([SlotUse(one.slot, one.generation) for one in event.segments])
        if incoming.missing_tokens > 0:
            return None
        incoming.transfer_s = self._clock() - incoming.first_arrival_s
        self._finish(incoming)
        return incoming

    def close(self, transfer_id: int, abort_reason: str | None = None) -> bool:
        """Forget a transfer; with a reason, tell the transfer process to end it. False if none was open."""
        was_open = self._incoming.pop(transfer_id, None) is not None
        if was_open and abort_reason is not None:
            self._client.abort(transfer_id, abort_reason)
        return was_open

    def open_ids(self) -> list[int]:
        return list(self._incoming)

    def clear(self) -> None:
        self._incoming.clear()

    def _finish(self, incoming: Incoming) -> None:
        del self._incoming[incoming.transfer_id]
        self._client.commit(incoming.transfer_id)


