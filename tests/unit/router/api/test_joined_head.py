"""A response's head leaves with what follows it, and alone where nothing does."""

import asyncio
from typing import Any

import pytest

from router.api.http_connection import JoinedHead

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Recorded(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: Any) -> None:
        assert not self.closed
        self.writes.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


@pytest.mark.parametrize(
    ("writes", "seen"),
    [
        ([HEAD, b"body", b"more"], [HEAD + b"body", b"more"]),
        ([HEAD], [HEAD]),
        ([HEAD, b"", HEAD, b"next"], [HEAD, HEAD + b"next"]),
        ([CONTINUE, HEAD, b"body"], [CONTINUE, HEAD + b"body"]),
    ],
)
def test_a_head_leaves_with_what_follows(writes: list[bytes], seen: list[bytes]) -> None:
    async def run() -> None:
        recorded = Recorded()
        joined = JoinedHead(recorded, asyncio.get_running_loop())
        for data in writes:
            joined.write(data)
        await asyncio.sleep(0)
        assert recorded.writes == seen

    asyncio.run(run())


def test_what_is_kept_leaves_before_the_end() -> None:
    async def run() -> None:
        recorded = Recorded()
        joined = JoinedHead(recorded, asyncio.get_running_loop())
        joined.write(HEAD)
        joined.close()
        assert recorded.writes == [HEAD]
        assert recorded.closed
        await asyncio.sleep(0)
        assert recorded.writes == [HEAD]

    asyncio.run(run())
