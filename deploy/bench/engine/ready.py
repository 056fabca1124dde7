"""The time from the start of a worker process to its first answer.

Everything a user waits for is in it: the interpreter, imports, weights, the measured forward, the pool, the
graphs, and, with an empty kernel cache, compiling.
"""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from deploy.bench.errors import BenchError
from services.protocol.client import ClientState, WorkerClient

TIMEOUT_S = 300.0
END_TIMEOUT_S = 30.0
LOOK_INTERVAL_S = 0.005


def seconds_to_ready(worker_flags: Sequence[str], directory: Path) -> float:
    """Start `baton worker` with these flags and wait for its hello; then end it. Its socket and its log lie
    in `directory`. Raises BenchError with the last line of the log."""
    socket, log = directory / "ready.sock", directory / "ready.log"
    command = [
        *(sys.executable, "-m", "deploy", "worker", *worker_flags),
        *("--listen", f"ipc://{socket}", "--parent-pid", str(os.getpid())),
    ]
    with log.open("wb") as output:
        started_s = time.monotonic()
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        while not socket.exists():
            if process.poll() is not None:
                raise BenchError(f"the worker ended with code {process.returncode}: {_last_line(log)}")
            if time.monotonic() - started_s > TIMEOUT_S:
                raise BenchError(f"the worker is not ready after {TIMEOUT_S:g} s: {_last_line(log)}")
            time.sleep(LOOK_INTERVAL_S)
        asyncio.run(_greet(f"ipc://{socket}"))
        return time.monotonic() - started_s
    finally:
        _end(process)


async def _greet(endpoint: str) -> None:
    """Returns when the worker has said hello."""
    answered = asyncio.Event()

    def on_state(client: WorkerClient, old: ClientState, new: ClientState) -> None:
        if new in (ClientState.READY, ClientState.REFUSED):
            answered.set()

    client = WorkerClient(endpoint, router_epoch=1, on_reports=lambda *_: None, on_state=on_state)
    client.start()
    try:
        await asyncio.wait_for(answered.wait(), TIMEOUT_S)
        if client.state is ClientState.REFUSED:
            raise BenchError(client.message)
    except TimeoutError as error:
        raise BenchError("the worker listens but does not answer") from error
    finally:
        client.close()


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
