"""The benchmark's side of HTTP and its event loop: plain sockets, so that its own time hardly counts.

One process plays clients and workers in one thread, and does not sleep while times are taken: a process that
has to be woken first would add the kernel's wake-up to every figure.
"""

import json
import random
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

RECEIVE_BYTES = 1 << 16
FRAME = b"data: {"
ENDS = (b"\r\n0\r\n\r\n", b'"}')
"""Of a stream's chunks, and of the small JSON object that `GET /version` answers."""


class HttpBenchError(RuntimeError):
    """The router or the machine did something that leaves no figure to report."""


class HttpLoop:
    """Calls handlers of readable sockets and one timed function."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}

    def add(self, one: socket.socket, handler: Callable[[], None]) -> None:
        one.setblocking(False)
        self._handlers[one.fileno()] = handler
        self._poll.register(one.fileno(), select.EPOLLIN)

    def remove(self, one: socket.socket) -> None:
        self._poll.unregister(one.fileno())
        del self._handlers[one.fileno()]

    def run(
        self,
        done: Callable[[], bool],
        limit_s: float,
        at: Callable[[float], float] | None = None,
        rest_s: float = 0.0,
    ) -> None:
        """Runs until `done`. `at(now_s)` is called when its time has come and returns the next (monotonic).

        It sleeps `rest_s` between two looks: not at all where times are taken, a little where only the sum
        counts, since looking for every single frame costs more than reading it.
        Raises HttpBenchError after `limit_s`."""
        start_s = next_s = time.monotonic()
        handlers, poll = self._handlers, self._poll
        while not done():
            now_s = time.monotonic()
            if at is not None and now_s >= next_s:
                next_s = at(now_s)
            for descriptor, _ in poll.poll(0):
                handler = handlers.get(descriptor)
                if handler is not None:
                    handler()
            if rest_s:
                time.sleep(rest_s)
            if now_s - start_s > limit_s:
                raise HttpBenchError(f"not done after {limit_s:.0f} s")


@dataclass(slots=True)
class Stamps:
    """One request's way, in nanoseconds of CLOCK_MONOTONIC, which all processes of a host share.

    written: the client's write begins. prefill: the prefill worker has the frame with `Prefill`.
    answered: it begins to write the first token. first: the client has the first frame.
    """

    written_ns: int = 0
    prefill_ns: int = 0
    answered_ns: int = 0
    first_ns: int = 0


class KeepAliveConnection:
    """One keep-alive connection with at most one request on it."""

    def __init__(self, loop: HttpLoop, port: int) -> None:
        self._loop = loop
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.frames = 0
        self.busy = self.closed = False
        self.stamps = Stamps()
        self._tail = b""
        self._on_end: Callable[[KeepAliveConnection], None] = lambda connection: None
        loop.add(self.socket, self._on_readable)

    def ask(self, raw: bytes, stamps: Stamps, on_end: "Callable[[KeepAliveConnection], None]") -> None:
        """`on_end` is called when the answer has ended."""
        self.busy, self.stamps, self._on_end, self._tail = True, stamps, on_end, b""
        stamps.written_ns = time.monotonic_ns()
        if self.socket.send(raw) != len(raw):
            raise HttpBenchError("a request did not fit the socket's buffer")

    def close(self) -> None:
        self.closed = True
        self._loop.remove(self.socket)
        self.socket.close()

    def _on_readable(self) -> None:
        data = self.socket.recv(RECEIVE_BYTES)
        if not data and self.busy:
            raise HttpBenchError("the router closed a connection with a request on it")
        if not data:
            self.close()  # idle for too long
            return
        frames = data.count(FRAME)
        if not self.stamps.first_ns and (frames or b'{"version"' in data):
            self.stamps.first_ns = time.monotonic_ns()
        self.frames += frames
        window = data if len(data) >= 8 else self._tail + data
        self._tail = window[-8:]
        if self.busy and window.endswith(ENDS):
            self.busy = False
            if not self.stamps.first_ns:
                raise HttpBenchError(f"an answer without a token: {window[-200:]!r}")
            self._on_end(self)


GET_VERSION = b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"


def completion(prompt: str, max_tokens: int, seed: int) -> bytes:
    """A streamed request. The seed travels to the workers: by it a request is known on both sides."""
    fields = {"prompt": prompt, "max_tokens": max_tokens, "stream": True, "ignore_eos": True, "seed": seed}
    body = json.dumps(fields).encode()
    return b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


class PromptBodies:
    """Prompts of one length, no two alike: words of the docs in random order."""

    def __init__(self, characters: int, seed: int) -> None:
        root = Path(__file__).parents[3]
        texts = [path.read_text(encoding="utf-8") for path in sorted(root.glob("docs/*.md"))]
        self._words = [word for word in " ".join(texts).split() if word.isascii()]
        self._characters, self._random = characters, random.Random(seed)

    def sample(self) -> str:
        words: list[str] = []
        left = self._characters
        while left > 0:
            words.append(self._random.choice(self._words))
            left -= len(words[-1]) + 1
        return " ".join(words)[: self._characters]
