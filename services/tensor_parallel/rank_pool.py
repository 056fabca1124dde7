"""The other ranks of a worker as its leading rank sees them: started, commanded, asked, watched, stopped.

A rank that dies leaves the others waiting in a sum: on a GPU for ever, in a call that no exception reaches.
So a thread watches the rank processes, and how long the leader has waited for something; when one has died,
or the time is up, it says so in one line and ends the process, and with it (rank_process.py) every rank.
Whoever started the worker starts it again.
"""

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from services.config import WorkerConfig
from services.tensor_parallel.link import RankLink, RankLost
from services.tensor_parallel.messages import (
    Answer,
    Copied,
    CopyKv,
    RankCommand,
    RankFailed,
    StartRank,
    StopRank,
    encode_config,
)

log = logging.getLogger(__name__)

STEP_TIMEOUT_S = 60.0
"""What one step, pack or unpack of all ranks may take."""
START_TIMEOUT_S = 1800.0
"""What loading the weights, or capturing the graphs, may take."""
VERDICT_S = 2.0
"""How long an error in a sum waits for the news that a rank has died, which explains it."""
LEAVE_S = 5.0
EXIT_CODE = 1
_WATCH_MS = 500


class RankError(Exception):
    """A rank failed, and with it the worker."""


class CopyAnswer:
    """A pack or unpack of another rank, asked like an event of a device, and like checksums on their way."""

    def __init__(self, ranks: "RankPool", rank: int) -> None:
        self._ranks, self._rank = ranks, rank
        self.sent_s = time.monotonic()
        self._is_done = False
        self._checksums: list[int] | None = None

    def done(self, checksums: list[int] | None) -> None:
        self._is_done, self._checksums = True, checksums

    def query(self) -> bool:
        """Raises `RankError` if the rank cannot answer any more."""
        if not self._is_done:
            self._ranks.take_copied(self._rank)
        return self._is_done

    def synchronize(self) -> None:
        while not self._is_done:
            self._ranks.take_copied(self._rank, STEP_TIMEOUT_S)

    def values(self) -> list[int] | None:
        return self._checksums


class RankPool:
    """Ranks 1 ... `config.tp` - 1, each a process with a link of its own."""

    def __init__(self, config: WorkerConfig, store: Path) -> None:
        """Starts them; returns at once. `config` is rank 0's."""
        self._name = config.name
        self._processes: list[subprocess.Popen[bytes]] = []
        self._links: list[RankLink[Answer, RankCommand]] = []
        self._copies: list[deque[CopyAnswer]] = [deque() for _ in range(1, config.tp)]
        self._wait: tuple[float, str] | None = None
        self._left = threading.Event()
        self._stopping = self._closed = False
        for rank in range(1, config.tp):
            ours, theirs = socket.socketpair()
            command = [
                sys.executable,
                "-m",
                "services.tensor_parallel.rank_process",
                str(theirs.fileno()),
                str(os.getpid()),
            ]
            with theirs:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
            link: RankLink[Answer, RankCommand] = RankLink(ours, Answer, RankCommand)
            self._processes.append(process)
            self._links.append(link)
            rank_config = replace(config, rank=rank, device_index=config.device_index + rank)
            link.send(StartRank(encode_config(rank_config), str(store)))
            log.info("rank %d of %s started (pid %d)", rank, config.name, process.pid)
        self._watcher = threading.Thread(target=self._watch, name="ranks-watch", daemon=True)
        self._watcher.start()

    @property
    def pids(self) -> list[int]:
        """Of ranks 1 and on."""
        return [process.pid for process in self._processes]

    # ------------------------------------------------------------ commands

    def send(self, command: RankCommand) -> None:
        """Raises `RankError`."""
        frame = self._links[0].encode(command)
        for rank, link in enumerate(self._links, 1):
            try:
                link.send_frame(frame)
            except RankLost as error:
                raise self._fault(rank, str(error)) from error

    def send_one(self, rank: int, command: RankCommand) -> None:
        """Only rank `rank`, at least 1. Raises `RankError`."""
        try:
            self._links[rank - 1].send(command)
        except RankLost as error:
            raise self._fault(rank, str(error)) from error

    def answers(self, timeout_s: float) -> list[Answer]:
        """What each rank answers to the command before, in the order of ranks. Raises `RankError`."""
        return [self.answer(rank, timeout_s) for rank in range(1, len(self._links) + 1)]

    def answer(self, rank: int, timeout_s: float) -> Answer:
        """Raises `RankError`."""
        try:
            answer = self._links[rank - 1].receive(timeout_s)
        except RankLost as error:
            raise self._fault(rank, str(error)) from error
        if isinstance(answer, RankFailed):
            raise RankError(f"rank {rank} of {self._name} failed: {answer.message}")
        return answer

    def copy_kv(self, rank: int, command: CopyKv) -> "CopyAnswer":
        """Have rank `rank`, at least 1, pack or unpack. Raises `RankError`."""
        self.send_one(rank, command)
        answer = CopyAnswer(self, rank)
        self._copies[rank - 1].append(answer)
        return answer

    def take_copied(self, rank: int, timeout_s: float = 0.0) -> None:
        """Note which packs and unpacks of a rank are done; waits for the first for `timeout_s`.

        Raises `RankError`.
        """
        link, waiting = self._links[rank - 1], self._copies[rank - 1]
        try:
            while waiting and (answer := link.poll(timeout_s)) is not None:
                if not isinstance(answer, Copied):
                    raise self._fault(rank, f"it answers a pack or unpack with {answer!r}")
                waiting.popleft().done(answer.checksums)
                timeout_s = 0.0
        except RankLost as error:
            raise self._fault(rank, str(error)) from error
        if waiting and time.monotonic() > waiting[0].sent_s + STEP_TIMEOUT_S:
            raise self._fault(rank, f"a pack or unpack is not done after {STEP_TIMEOUT_S:g} s")

    # ------------------------------------------------------------ watch

    @contextmanager
    def within(self, seconds: float, what: str) -> Iterator[None]:
        """The worker ends if the block takes longer. An error in it that a rank's death explains is not seen:
        the watcher has the last word."""
        before, self._wait = self._wait, (time.monotonic() + seconds, what)
        try:
            yield
        except RuntimeError:
            self._await_verdict()
            raise
        finally:
            self._wait = before

    def _await_verdict(self) -> None:
        """Returns if no rank has died; else the watcher ends this process meanwhile."""
        end_s = time.monotonic() + VERDICT_S
        while time.monotonic() < end_s and self._dead() is None:
            time.sleep(0.01)
        if self._dead() is not None:
            self._watcher.join()

    def _fault(self, rank: int, what: str) -> RankError:
        self._await_verdict()
        return RankError(f"rank {rank} of {self._name}: {what}")

    def _dead(self) -> tuple[int, int] | None:
        """`(rank, exit code)` of a rank that has ended."""
        for rank, process in enumerate(self._processes, 1):
            code = process.poll()
            if code is not None:
                return rank, code
        return None

    def _watch(self) -> None:
        poll = select.poll()
        descriptors = [os.pidfd_open(process.pid) for process in self._processes]
        for descriptor in descriptors:
            poll.register(descriptor, select.POLLIN)
        try:
            while not self._closed:
                ended = poll.poll(_WATCH_MS)
                if self._stopping:
                    self._left.wait(_WATCH_MS / 1000)
                elif ended:
                    rank, code = self._dead() or (0, 0)
                    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                    self._end(f"rank {rank} of {self._name} ended by {how}: the worker ends with it")
                wait = self._wait
                if wait is not None and time.monotonic() > wait[0]:
                    self._end(f"{wait[1]} of {self._name} is not over in time: a rank hangs, the worker ends")
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _end(self, why: str) -> None:
        log.critical("%s", why)
        sys.stderr.flush()
        os._exit(EXIT_CODE)

    # ------------------------------------------------------------ end

    def stop(self) -> None:
        """Send them the command to leave. Idempotent."""
        if self._stopping:
            return
        self._stopping = True
        for link in self._links:
            try:
                link.send(StopRank())
            except RankLost as error:
                log.info("a rank was gone already: %s", error)

    def close(self) -> None:
        """Stop them, and kill those that do not leave. Idempotent."""
        self.stop()
        if self._closed:
            return
        self._closed = True
        end_s = time.monotonic() + LEAVE_S
        for process, link in zip(self._processes, self._links, strict=True):
            try:
                process.wait(max(0.0, end_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            link.close()
        self._left.set()
        self._watcher.join()
