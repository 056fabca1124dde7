"""SIGTERM and SIGINT as a file descriptor that a `zmq.Poller` wakes up for."""

import signal
import socket
from types import FrameType


class StopSignal:
    """Whether a stop signal was `received`. Main thread only. SIGINT counts too: a terminal sends it to the
    whole process group, and the shutdown is the same."""

    def __init__(self) -> None:
        self.received = False
        self._in, self._out = socket.socketpair()
        self._in.setblocking(False)
        self._out.setblocking(False)
        signal.set_wakeup_fd(self._in.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def fileno(self) -> int:
        return self._out.fileno()

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        self._in.close()
        self._out.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = True
