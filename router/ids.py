"""Random ids: unguessable numbers and names for requests and answers.

The bytes come from the kernel's generator, many at a time: a system call for each id would cost a request
more than its validation does. No byte is used twice.
"""

import os

POOL_BYTES = 4096
NUMBER_BYTES = 8
NAME_BYTES = 12


class _Pool:
    def __init__(self) -> None:
        self._bytes, self._at = b"", 0

    def take(self, count: int) -> bytes:
        start = self._at
        if start + count > len(self._bytes):
            self._bytes, start = os.urandom(POOL_BYTES), 0
        self._at = start + count
        return self._bytes[start : self._at]


_pool = _Pool()


def draw_number() -> int:
    """62 random bits, never 0: no two routers need to agree on their ids."""
    return int.from_bytes(_pool.take(NUMBER_BYTES), "little") >> 2 or 1


def draw_name() -> str:
    """24 hexadecimal digits."""
    return _pool.take(NAME_BYTES).hex()
