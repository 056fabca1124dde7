"""The probe of whether a process still listens at an endpoint, without waiting.

A dead process's listening socket is gone at once, a stopped one's still accepts: so a refused connection
proves the death of that incarnation, which mere silence never does.
"""

import errno
import socket

PROOF = frozenset({errno.ECONNREFUSED, errno.ENOENT})


class IncarnationProbe:
    """One connection attempt at a time to an `ipc://` or `tcp://` endpoint."""

    def __init__(self, endpoint: str) -> None:
        scheme, _, rest = endpoint.partition("#")[0].partition("://")
        self._pending: socket.socket | None = None
        self._family = socket.AF_UNIX if scheme == "ipc" else socket.AF_INET
        self._target: str | tuple[str, int] | None = rest
        if scheme == "tcp":
            host, _, port = rest.rpartition(":")
            self._target = (host, int(port)) if port.isdigit() and _is_ipv4(host) else None

    def proves_death(self) -> bool:
        """True: no process listens there. False: one does, or it is not known (yet): ask again later."""
        if self._target is None:
            return False
        if self._pending is not None:
            error = self._pending.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            self.close()
            return error in PROOF
        self._pending = socket.socket(self._family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        error = self._pending.connect_ex(self._target)
        if error != errno.EINPROGRESS:
            self.close()
        return error in PROOF

    def close(self) -> None:
        if self._pending is not None:
            self._pending.close()
            self._pending = None


def _is_ipv4(host: str) -> bool:
    """Names are left out: looking one up could block."""
    try:
        socket.inet_aton(host)
    except OSError:
        return False
    return True
