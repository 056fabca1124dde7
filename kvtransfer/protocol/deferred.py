"""Messages of a source that have to wait for data that it announced before them. Pure."""

from collections import deque

from kvtransfer.protocol.peer_messages import PeerMessage


class DeferredMessages:
    """What a source says is believed only when every batch that it announced before has landed.

    `announced` and `landed` count batches of that source and only grow.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, PeerMessage]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def defer(self, message: PeerMessage, announced: int, landed: int) -> bool:
        """False: it may be believed now. True: it is kept, behind what is kept already."""
        if not self._waiting and landed >= announced:
            return False
        self._waiting.append((announced, message))
        return True

    def release(self, landed: int) -> list[PeerMessage]:
        """What may be believed now, oldest first."""
        free: list[PeerMessage] = []
        while self._waiting and self._waiting[0][0] <= landed:
            free.append(self._waiting.popleft()[1])
        return free

    def clear(self) -> None:
        self._waiting.clear()
