"""The queue of a source's messages that wait for data which the source announced before them. Pure."""

from collections import deque

from kvtransfer.protocol.peer_messages import PeerMessage


class DeferredMessages:
    """Messages of one source, each deferred until every batch that the source announced before it has landed.

    `announced` and `landed` count batches of that source and only grow.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, PeerMessage]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def defer(self, message: PeerMessage, announced: int, landed: int) -> bool:
        """False: nothing is outstanding, the message counts now. True: it is queued, behind what is queued
        already."""
        if not self._waiting and landed >= announced:
            return False
        self._waiting.append((announced, message))
        return True

    def take_due(self, landed: int) -> list[PeerMessage]:
        """The messages that count now, oldest first."""
        free: list[PeerMessage] = []
        while self._waiting and self._waiting[0][0] <= landed:
            free.append(self._waiting.popleft()[1])
        return free

    def clear(self) -> None:
        self._waiting.clear()
