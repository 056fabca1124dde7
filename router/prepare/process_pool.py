"""The pool of processes that prepare large bodies beside the event loop (process.py).

The pool starts a process when a body needs one, and keeps it. A process prepares one body at a time; further
bodies wait in order, as many bytes as there is room for. If a process dies, the pool gives its body to
another one, once: preparing leaves no trace. A body that takes too long, or that ends two processes, fails by
itself.
"""

import array
import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from router.errors import ApiError, invalid
from router.prepare.process import (
    CPU_LIMIT_S,
    LENGTH,
    TOKEN_BYTES,
    Generation,
    Page,
    PreparationRefused,
    PrepareJob,
    Setup,
    decode_answer,
    framed,
)
from router.prepare.request import PreparedRequest, PrepareInput, Prompt
from router.text.conversion import Converted

logger = logging.getLogger(__name__)

PROCESSES = 2
TRIES = 2
"""Of one body, where a process dies with it."""
MAX_WAITING_BYTES = 256 << 20
ABANDONED_S = 5.0
"""How long a process may still work on a body that nobody waits for."""
PIECE_BYTES = 256 << 10
"""What the loop takes at a time of a long answer: less than a millisecond's work."""


class _Ended(Exception):
    """A process died with a body."""


@dataclass(slots=True, eq=False)
class _Process:
    """One process of the pool, with the socket to it."""

    process: subprocess.Popen[bytes]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    is_sound: bool = True
    """Between two bodies, and alive as far as anybody knows."""

    async def prepare(self, ask: PrepareInput, raw: bytes | bytearray) -> PreparedRequest | list[bytes]:
        """Raises ApiError, _Ended. Never cancelled: what is asked is answered, or the process has ended."""
        self.is_sound = False
        try:
            self.writer.write(framed(PrepareJob(ask, len(raw))))
            self.writer.write(raw)
            answer = decode_answer(await self._take(LENGTH.unpack(await self._take(LENGTH.size))[0]))
            made: PreparedRequest | list[bytes] = []
            if isinstance(answer, Generation):
                made = PreparedRequest(answer.options, await self._prompts(answer))
            elif isinstance(answer, Page):
                made = [piece async for piece in self._pieces(answer.size_bytes)]
        except (OSError, asyncio.IncompleteReadError):
            await self._reap()
            raise _Ended from None
        self.is_sound = True
        if isinstance(answer, PreparationRefused):
            raise ApiError(
                answer.status,
                answer.message,
                param=answer.param,
                code=answer.code,
                retry_after_s=answer.retry_after_s,
            )
        return made

    async def _reap(self) -> None:
        """Raises ApiError where the body is to blame."""
        self.process.kill()
        code = await asyncio.get_running_loop().run_in_executor(None, self.process.wait)
        logger.error("the process that prepared a body ended: pid %d, code %d", self.process.pid, code)
        if code == -signal.SIGXCPU:
            raise invalid(f"This request's text took more than {CPU_LIMIT_S} s of computing to be prepared.")

    async def _take(self, size_bytes: int) -> bytes:
        return await self.reader.readexactly(size_bytes)

    async def _pieces(self, size_bytes: int) -> AsyncIterator[bytes]:
        while size_bytes:
            piece = await self._take(min(size_bytes, PIECE_BYTES))
            size_bytes -= len(piece)
            yield piece
            await asyncio.sleep(0)

    async def _prompts(self, answer: Generation) -> list[Prompt]:
        prompts: list[Prompt] = []
        for text, count, of_ids in zip(answer.texts, answer.tokens, answer.of_ids, strict=True):
            tokens: list[int] = []
            async for piece in self._pieces(count * TOKEN_BYTES):
                numbers = array.array("i")
                numbers.frombytes(piece)
                tokens += numbers
            prompts.append(Prompt(tokens, text, of_ids))
        return prompts

    def kill(self) -> None:
        self.is_sound = False
        self.writer.close()
        self.process.kill()


@dataclass(slots=True, eq=False)
class ProcessPool:
    """Up to `PROCESSES` processes, each with the tokenizer and the template of `model_dir`."""

    model_dir: Path
    model: str
    converted: Converted | None
    retry_after_s: int = 1
    _capacity: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(PROCESSES))
    _idle: list[_Process] = field(default_factory=list)
    _all: set[_Process] = field(default_factory=set)
    _bytes: int = 0

    async def prepare(self, ask: PrepareInput, raw: bytes | bytearray) -> PreparedRequest | list[bytes]:
        """As `prepare.prepare`; a whole answer comes in pieces. May be cancelled.
        Raises ApiError, with 429 where too much waits."""
        if self._bytes and self._bytes + len(raw) > MAX_WAITING_BYTES:
            raise ApiError(
                429,
                f"The server is overloaded: {self._bytes} bytes of request bodies wait to be read.",
                code="overloaded",
                retry_after_s=self.retry_after_s,
            )
        self._bytes += len(raw)
        try:
            for _ in range(TRIES):
                with contextlib.suppress(_Ended):
                    return await self._run(await self._acquire(), ask, raw)
        finally:
            self._bytes -= len(raw)
        raise ApiError(
            500, "The processes that prepared this request ended.", code="internal_error", committed=True
        )

    async def _acquire(self) -> _Process:
        """A process that nobody else uses, until `_release`."""
        await self._capacity.acquire()
        try:
            return await self._process()
        except BaseException:
            self._capacity.release()
            raise

    async def _run(
        self, process: _Process, ask: PrepareInput, raw: bytes | bytearray
    ) -> PreparedRequest | list[bytes]:
        loop = asyncio.get_running_loop()
        work = loop.create_task(process.prepare(ask, raw))
        work.add_done_callback(partial(self._release, process))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            abandoned = loop.call_later(ABANDONED_S, self._give_up, process, work)
            work.add_done_callback(lambda _: abandoned.cancel())
            raise

    @staticmethod
    def _give_up(process: _Process, work: "asyncio.Task[PreparedRequest | list[bytes]]") -> None:
        if not work.done():
            logger.warning("nobody waits for what pid %d prepares: it is killed", process.process.pid)
            process.kill()

    def _release(self, process: _Process, work: "asyncio.Task[PreparedRequest | list[bytes]]") -> None:
        if not work.cancelled():
            work.exception()  # nobody may be left to ask for it
        if process.is_sound:
            self._idle.append(process)
        else:
            self._discard(process)
        self._capacity.release()

    def _discard(self, process: _Process) -> None:
        process.kill()
        self._all.discard(process)
        # It was killed; but what it had of memory is given back first.
        asyncio.get_running_loop().run_in_executor(None, process.process.wait)

    async def _process(self) -> _Process:
        while self._idle:
            process = self._idle.pop()
            if process.process.poll() is None and not process.reader.at_eof():
                return process
            self._discard(process)
        started, ours = self._start()
        try:
            reader, writer = await asyncio.open_unix_connection(sock=ours, limit=PIECE_BYTES)
        except BaseException:
            started.kill()
            started.wait()
            ours.close()
            raise
        process = _Process(started, reader, writer)
        self._all.add(process)
        writer.write(framed(Setup(self.model, self.converted)))
        return process

    def _start(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        # Not in a thread: the process ends with the one that started it.
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = [str(self.model_dir.resolve()), str(os.getpid()), str(theirs.fileno())]
            started = subprocess.Popen(
                [sys.executable, "-m", "router.prepare.process", *arguments],
                # Python puts the working directory before all packages.
                cwd=Path(__file__).parents[2],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )
        return started, ours

    def close(self) -> None:
        """Kills the processes, and waits for their ends."""
        for process in self._all:
            process.kill()
        for process in self._all:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.process.wait(1.0)
        self._all.clear()
