"""TCP ports for servers that a test starts."""

import itertools
import os
import socket

FIRST, PER_PROCESS = 20_000, 1_000
"""Below the ports that Linux gives to outgoing connections, of which one could take the port meanwhile."""
_offsets = itertools.count(os.getpid())


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens. Each of the processes that run tests side by side takes
    from a range of its own, so that no two get the same between this and the server's start."""
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = FIRST + process * PER_PROCESS
    for offset in itertools.islice(_offsets, PER_PROCESS):
        port = first + offset % PER_PROCESS
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no free port from {first} on")
