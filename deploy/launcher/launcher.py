"""`baton serve`: everything on one host. Starts, watches, restarts and stops the other processes.

1. Sweep what dead launchers left; make the run directory.
2. Start the children in the order transfer processes, workers, router, each in a session of its own; forward
   their output line by line.
3. Poll the router's `/ready`; then show each worker's ledger, the URL and a request to try.
4. A child that ends is started again, after a back-off. A child that refuses its configuration ends it all.
5. Workers may be added and dismissed meanwhile (scaling.py).
6. SIGTERM or SIGINT: stop the router (it drains), the workers, the transfer processes; SIGKILL for what is
   still there after its grace. A second signal: SIGKILL at once.
7. Remove the run directory.

If this process itself is killed, step 6 and 7 are the children's own doing (child.py).
"""

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from deploy.launcher import run_directory
from deploy.launcher.children import ChildSpec
from deploy.launcher.output import LineAssembler, OutputPiece, ProgressThinner, Screen
from deploy.launcher.readiness import Welcome, is_ready
from deploy.launcher.supervision import CONFIGURATION_ERROR, GiveUp, RestartPolicy, shutdown_stages
from deploy.observe.ledgers import LedgersUnavailable, fetch_ledgers
from services.memory.render import table

_READ_BYTES = 64 * 1024
_POLL_S = 0.2
_MESSAGE_LINES = 40
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_ERROR_MARK = "baton: error: "


@dataclass(slots=True)
class Child:
    spec: ChildSpec
    index: int
    policy: RestartPolicy = field(default_factory=RestartPolicy)
    process: subprocess.Popen[bytes] | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    started_s: float = 0.0
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=_MESSAGE_LINES))
    deferred: list[OutputPiece] = field(default_factory=list)
    """The lines of an error that are not shown yet: the launcher's last line may say it."""
    on_trial: bool = False
    """It was added at run time and has never been ready: if it cannot live, only it is given up."""
    given_up: str = ""
    """Why, if it was."""
    dismissed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def message(self) -> str:
        """The error that the child printed before it ended; empty if there is none."""
        lines = list(self.last_lines)
        starts = [index for index, line in enumerate(lines) if line.startswith(_ERROR_MARK)]
        return "\n".join(lines[starts[-1] :]).removeprefix(_ERROR_MARK) if starts else ""


class Launcher:
    """One run of `baton serve`. `run` returns the exit code: 0 after a signal, 1 after giving up, 2 if a
    child refused its configuration."""

    def __init__(
        self,
        specs: list[ChildSpec],
        run_dir: Path,
        drain_timeout_s: float,
        welcome: Welcome,
        screen: Screen,
        program: tuple[str, ...] = (sys.executable, "-m", "deploy"),
    ) -> None:
        self._children = [Child(spec, index) for index, spec in enumerate(specs)]
        self._added = len(specs)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._run_dir = run_dir
        self._drain_timeout_s = drain_timeout_s
        self._welcome = welcome
        self._screen = screen
        self._program = program
        self._stopping = asyncio.Event()
        self._signals = 0
        self._failure: str | None = None
        self._failure_code = 1

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        for child in self._children:
            self._watch(child)
        greeting = asyncio.create_task(self._greet())
        try:
            await self._stopping.wait()
            await self._stop_all()
        finally:
            greeting.cancel()
            self._kill_all()
            await asyncio.gather(greeting, *self._tasks.values(), return_exceptions=True)
            for number in _STOP_SIGNALS:
                loop.remove_signal_handler(number)
            run_directory.remove(self._run_dir)
        if self._failure is not None:
            print(f"{_ERROR_MARK}{self._failure}", file=sys.stderr)
            return self._failure_code
        self._screen.say("stopped")
        return 0

    def stop(self) -> None:
        """Does what a first signal does: every child drains and ends, and `run` returns."""
        self._stopping.set()

    @property
    def stopping(self) -> asyncio.Event:
        return self._stopping

    # ------------------------------------------------------------ more and fewer of them

    def add(self, specs: list[ChildSpec]) -> list[Child]:
        """Starts more children, on trial, while `run` runs."""
        children = [Child(spec, self._added + number, on_trial=True) for number, spec in enumerate(specs)]
        self._added += len(specs)
        self._children += children
        for child in children:
            self._watch(child)
        return children

    async def dismiss(self, names: list[str], grace_s: float) -> None:
        """Ends children for good: SIGTERM together, and SIGKILL for who is still there after `grace_s`."""
        members = [child for child in self._children if child.spec.name in names]
        for child in members:
            child.dismissed.set()
            child.on_trial = True  # what becomes of it now concerns nobody else
        await self._end(members, grace_s)
        tasks = [self._tasks.pop(child.spec.name) for child in members]
        await asyncio.gather(*tasks, return_exceptions=True)
        self._children = [child for child in self._children if child not in members]

    # ------------------------------------------------------------ one child

    def _watch(self, child: Child) -> None:
        self._tasks[child.spec.name] = asyncio.create_task(self._supervise(child))

    async def _supervise(self, child: Child) -> None:
        try:
            while not self._stopping.is_set():
                code = await self._run_once(child)
                if self._stopping.is_set() or child.dismissed.is_set():
                    self._show_deferred(child)
                    return
                uptime_s = time.monotonic() - child.started_s
                decision = child.policy.on_exit(code, uptime_s, random.random())
                if isinstance(decision, GiveUp):
                    reason = f"{child.spec.name} {decision.reason}: {child.message() or _ending(code)}"
                    if child.on_trial:
                        child.given_up = reason
                    else:
                        self._give_up(reason, code if code == CONFIGURATION_ERROR else 1)
                    self._show_deferred(child)
                    return
                self._show_deferred(child)
                self._screen.say(
                    f"{child.spec.name} {_ending(code)}; starts again in {decision.delay_s:.1f} s"
                )
                if await self._pause(child, decision.delay_s):
                    return
        except Exception as error:
            self._give_up(f"{child.spec.name} cannot be supervised: {error!r}")

    async def _pause(self, child: Child, delay_s: float) -> bool:
        """Waits out a back-off. True: the child is not needed any more."""
        waits = [asyncio.create_task(one.wait()) for one in (self._stopping, child.dismissed)]
        try:
            done, _ = await asyncio.wait(waits, timeout=delay_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return bool(done)

    async def _run_once(self, child: Child) -> int:
        """One incarnation of a child, from start to exit code. Its output is forwarded to the last byte."""
        process = self._start(child)
        forward = asyncio.create_task(self._forward(child, process))
        code = await _exit_code(process)
        child.ended.set()
        _signal_group(process.pid, signal.SIGKILL)  # whatever it started itself
        await forward
        return code

    def _start(self, child: Child) -> subprocess.Popen[bytes]:
        child.last_lines.clear()
        child.deferred.clear()
        child.ended.clear()
        child.started_s = time.monotonic()
        child.process = subprocess.Popen(
            [*self._program, *child.spec.arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment(child.spec),
            start_new_session=True,
        )
        self._screen.say(f"{child.spec.name} started (pid {child.process.pid})")
        return child.process

    async def _forward(self, child: Child, process: subprocess.Popen[bytes]) -> None:
        if process.stdout is None:
            raise RuntimeError("a child was started without a pipe")
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), process.stdout
        )
        assembler, thinner = LineAssembler(), ProgressThinner()
        try:
            while data := await reader.read(_READ_BYTES):
                for piece in assembler.feed(data):
                    self._show(child, thinner, piece)
            for piece in assembler.end():
                self._show(child, thinner, piece)
        finally:
            transport.close()

    def _show(self, child: Child, thinner: ProgressThinner, piece: OutputPiece) -> None:
        if not piece.passing:
            child.last_lines.append(piece.text)
        if child.deferred or (not piece.passing and piece.text.startswith(_ERROR_MARK)):
            child.deferred.append(piece)
            if len(child.deferred) > _MESSAGE_LINES:
                self._show_deferred(child)
            return
        if self._screen.is_terminal or thinner.keep(piece):
            self._screen.child_line(child.spec.name, child.index, piece)

    def _show_deferred(self, child: Child) -> None:
        """The lines of the error that a child ended with, unless the launcher itself ends with that error."""
        said = child.message()
        if not said or said not in (self._failure or ""):
            for piece in child.deferred:
                self._screen.child_line(child.spec.name, child.index, piece)
        child.deferred.clear()

    # ------------------------------------------------------------ ready

    async def _greet(self) -> None:
        started_s = time.monotonic()
        while not await asyncio.to_thread(is_ready, self._welcome):  # noqa: ASYNC110  (another process)
            await asyncio.sleep(_POLL_S)
        ready_s = time.monotonic() - started_s
        try:
            ledgers = await asyncio.to_thread(fetch_ledgers, self._welcome.url, self._welcome.api_key)
        except LedgersUnavailable as error:
            self._screen.say(f"no ledgers: {error}")
            ledgers = []
        for worker in ledgers:
            self._screen.say(f"\nmemory of {worker.name}: {table(worker.ledger)}")
        self._screen.say(f"\nready in {ready_s:.1f} s\n{self._welcome.text()}")

    # ------------------------------------------------------------ stopping

    def _on_signal(self) -> None:
        self._signals += 1
        if self._signals == 1:
            self._screen.say("stopping; once more to stop at once")
            self._stopping.set()
        else:
            self._kill_all()

    def _give_up(self, reason: str, code: int = 1) -> None:
        if self._failure is None:
            self._failure, self._failure_code = reason, code
        self._stopping.set()

    async def _stop_all(self) -> None:
        drain_s = 0.0 if self._failure is not None else self._drain_timeout_s
        for stage in shutdown_stages(drain_s):
            members = [child for child in self._children if child.spec.kind is stage.kind]
            await self._end(members, stage.grace_s)

    async def _end(self, members: list[Child], grace_s: float) -> None:
        for child in members:
            _signal(child, signal.SIGTERM)
        deadline_s = time.monotonic() + grace_s
        for child in members:
            await _ended(child, deadline_s)
            if child.alive:
                self._screen.say(f"{child.spec.name} did not end in {grace_s:.1f} s: killed")
                _signal(child, signal.SIGKILL)

    def _kill_all(self) -> None:
        for child in self._children:
            _signal(child, signal.SIGKILL)


async def _exit_code(process: subprocess.Popen[bytes]) -> int:
    """Waits for the process itself. asyncio's own would also wait for its output to be closed, which
    whatever it leaves behind could hold open for ever."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    watched = os.pidfd_open(process.pid)
    loop.add_reader(watched, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(watched)
        os.close(watched)
    return process.wait()


async def _ended(child: Child, deadline_s: float) -> None:
    if child.alive:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(child.ended.wait(), max(0.0, deadline_s - time.monotonic()))


def _signal(child: Child, number: signal.Signals) -> None:
    """Sends SIGKILL to all that the child started, SIGTERM to the child alone, which then ends its own."""
    if child.process is None or not child.alive:
        return
    if number is signal.SIGKILL:
        _signal_group(child.process.pid, number)
    else:
        with contextlib.suppress(ProcessLookupError):
            child.process.send_signal(number)


def _signal_group(leader_pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader_pid, number)


def _environment(spec: ChildSpec) -> dict[str, str]:
    """A child's environment is ours without BATON_*: its arguments say everything that was settled here."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
    return {**kept, "PYTHONUNBUFFERED": "1", **dict(spec.secrets)}


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"
