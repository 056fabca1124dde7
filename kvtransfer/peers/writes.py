"""The writes in flight: started and polled here, and never waited for without a limit."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from kvtransfer.errors import MoverBroken, MoverError
from kvtransfer.movers.base import Handle, Mover, PieceOfWrite, Progress, two_sided
from kvtransfer.protocol.outbox import Destination, Write
from kvtransfer.protocol.sender import Sender

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Posted:
    write: Write
    agent: str
    handle: Handle
    posted_at_s: float
    given_up: bool = False


class Writes:
    """Posts writes to the mover, polls them, and reports each end to the sender, exactly once.

    It calls `disconnect(destination, reason)` for a peer that a write could not be finished to in
    `write_timeout_s`, after it has released the handles.
    """

    def __init__(
        self,
        mover: Mover,
        sender: Sender,
        slot_bytes: int,
        write_timeout_s: float,
        disconnect: Callable[[Destination, str, float], None],
    ) -> None:
        self._mover, self._sender, self._disconnect = mover, sender, disconnect
        self._slot_bytes, self._write_timeout_s = slot_bytes, write_timeout_s
        self._posted: dict[int, _Posted] = {}
        self.last_progress_s = 0.0
        self.moved_bytes = 0
        self.moved_segments = 0
        self.move_seconds = 0.0

    def __len__(self) -> int:
        return len(self._posted)

    def post(
        self, write: Write, agent: str | None, now_s: float, remote_slot_bytes: int | None = None
    ) -> None:
        """Starts a write to the peer's `agent`; None: the peer is not connected any more. Its slots are of
        `remote_slot_bytes`, or of the size of ours."""
        if agent is None:
            self._sender.write_failed(write.write_id, "the destination is not connected", now_s)
            return
        size, remote = self._slot_bytes, remote_slot_bytes or self._slot_bytes
        pieces = [
            PieceOfWrite(p.local_slot * size, p.remote_slot * remote, p.byte_count) for p in write.pieces
        ]
        try:
            handle = self._mover.post(agent, pieces)
        except MoverError as error:
            log.warning("transfer %d: %s", write.transfer_id, error)
            self._sender.write_failed(write.write_id, f"mover: {error}"[:1000], now_s)
            return
        self._posted[write.write_id] = _Posted(write, agent, handle, now_s)
        self.last_progress_s = now_s

    def poll(self, now_s: float) -> None:
        """Looks at every write once."""
        for write_id in list(self._posted):
            posted = self._posted.get(write_id)
            if posted is None:
                continue  # Given up together with another write to its peer.
            progress = self._mover.poll(posted.handle)
            if progress is Progress.PENDING:
                if now_s - posted.posted_at_s >= self._write_timeout_s:
                    self._give_up(posted.write.destination, now_s)
                continue
            self._forget(posted)
            self.last_progress_s = now_s
            if progress is Progress.DONE:
                self.moved_bytes += posted.write.byte_count
                self.moved_segments += len(posted.write.pieces)
                self.move_seconds += now_s - posted.posted_at_s
                self._sender.write_done(posted.write.write_id, now_s)
            else:
                self._sender.write_failed(posted.write.write_id, "mover: the write failed", now_s)

    def _give_up(self, destination: Destination, now_s: float) -> None:
        """Only the end of the connection surely stops data: release first, then disconnect, then report."""
        stuck = [p for p in self._posted.values() if p.write.destination == destination]
        reason = f"a write took over {self._write_timeout_s} s"
        if two_sided(self._mover) is not None:
            # Losing the peer stops it, which takes a while: the writes end as any that fails.
            if any(posted.given_up for posted in stuck):
                raise MoverBroken(f"writes to {stuck[0].agent} cannot be stopped")
            for posted in stuck:
                self._posted[posted.write.write_id] = replace(posted, posted_at_s=now_s, given_up=True)
            self._disconnect(destination, reason, now_s)
            return
        for posted in stuck:
            self._forget(posted)
        self._mover.remove_peer(stuck[0].agent)
        for posted in stuck:
            self._sender.write_failed(posted.write.write_id, reason, now_s)
        self._disconnect(destination, reason, now_s)

    def _forget(self, posted: _Posted) -> None:
        del self._posted[posted.write.write_id]
        self._mover.release(posted.handle)
