"""A cable between two network namespaces: `python -m tests.e2e.wire FIRST SECOND DEVICE SEED`.

Carries Ethernet frames between the two TAP devices of that name, and does to them what it is told by lines
on its standard input: `delay SECONDS`, `loss SHARE`, `cut`, `join`, `count`. Each line is answered with the
number of bytes carried so far. Ends, and the cable with it, when its input does. The kernel's own netem would
do for slowness and losses, but not every kernel has it.
"""

import ctypes
import fcntl
import heapq
import itertools
import os
import select
import struct
import sys
import time
from pathlib import Path
from random import Random

CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_TAP_WITHOUT_HEADER = 0x0002 | 0x1000
_LARGEST_FRAME_BYTES = 1 << 16
NAMESPACES = Path("/run/netns")


def enter(namespace: Path) -> None:
    """The calling thread, and what it starts from now on, has that namespace's network. Raises OSError."""
    descriptor = os.open(namespace, os.O_RDONLY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(descriptor, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
    finally:
        os.close(descriptor)


def open_tap(namespace: str, device: str) -> int:
    enter(NAMESPACES / namespace)
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _TAP_WITHOUT_HEADER))
    return tap


class Wire:
    """Times by `time.monotonic`. What is on its way when the cable is cut is lost."""

    def __init__(self, ends: tuple[int, int], random: Random) -> None:
        self._other = {ends[0]: ends[1], ends[1]: ends[0]}
        self._random = random
        self._order = itertools.count()
        self._under_way: list[tuple[float, int, int, bytes]] = []
        self.delay_s, self.loss, self.cut = 0.0, 0.0, False
        self.carried_bytes = 0

    def obey(self, line: str) -> None:
        """Raises ValueError for anything else than those five."""
        match line.split():
            case ["delay", value]:
                self.delay_s = float(value)
            case ["loss", value]:
                self.loss = float(value)
            case ["cut"]:
                self.cut = True
                self._under_way.clear()
            case ["join"]:
                self.cut = False
            case ["count"]:
                pass
            case _:
                raise ValueError(line)

    def take(self, end: int, now_s: float) -> None:
        """All frames that wait at one end."""
        while True:
            try:
                frame = os.read(end, _LARGEST_FRAME_BYTES)
            except OSError:  # none left, or the device is down
                return
            if not self.cut and self._random.random() >= self.loss:
                heapq.heappush(
                    self._under_way, (now_s + self.delay_s, next(self._order), self._other[end], frame)
                )

    def deliver(self, now_s: float) -> float | None:
        """Frames that have arrived. Returns when the next one will."""
        while self._under_way and self._under_way[0][0] <= now_s:
            _, _, end, frame = heapq.heappop(self._under_way)
            try:
                self.carried_bytes += os.write(end, frame)
            except OSError:  # the device is down, or its queue is full: lost, as on a cable
                continue
        return self._under_way[0][0] if self._under_way else None


def main(first: str, second: str, device: str, seed: str) -> None:
    ends = open_tap(first, device), open_tap(second, device)
    wire = Wire(ends, Random(seed))
    print(wire.carried_bytes, flush=True)
    poll = select.poll()
    for descriptor in (*ends, sys.stdin.fileno()):
        poll.register(descriptor, select.POLLIN)
    next_s: float | None = None
    while True:
        wait_ms = None if next_s is None else max(0.0, next_s - time.monotonic()) * 1000
        ready = [descriptor for descriptor, _ in poll.poll(wait_ms)]
        if sys.stdin.fileno() in ready:
            line = sys.stdin.readline()
            if not line:
                return
            wire.obey(line)
            print(wire.carried_bytes, flush=True)
        for end in ends:
            wire.take(end, time.monotonic())
        next_s = wire.deliver(time.monotonic())


if __name__ == "__main__":
    main(*sys.argv[1:])
