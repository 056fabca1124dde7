"""A monitor of one connection. A process that dies closes its sockets, long before silence would show it."""

import zmq
import zmq.utils.monitor

_READABLE, _NOBLOCK = int(zmq.POLLIN), int(zmq.NOBLOCK)


class ConnectionWatch:
    """Watches one connecting socket, which ZMQ connects again by itself. To be closed before the socket
    is."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self._socket = socket
        self._monitor: zmq.Socket[bytes] = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)

    def was_cut(self) -> bool:
        """Whether the connection was cut since the last call. Never waits."""
        cut = False
        while not self._monitor.closed and int(self._monitor.getsockopt(zmq.EVENTS)) & _READABLE:
            zmq.utils.monitor.recv_monitor_message(self._monitor, _NOBLOCK)
            cut = True
        return cut

    def close(self) -> None:
        """Idempotent."""
        if not self._monitor.closed:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
