"""The time from the start of a worker process to its first answer.

Everything a user waits for is in it: the interpreter, imports, weights, the measured forward, the pool, the
graphs, and, with an empty kernel cache, compiling.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import zmq

from deploy.bench.errors import BenchError
from kvtransfer.net.channel import Codec, Link
from services.protocol.messages import VERSION, Refusal, Report, Request, RouterHello, WorkerHello

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
        _greet(f"ipc://{socket}")
        return time.monotonic() - started_s
    finally:
        _end(process)


def _greet(endpoint: str) -> None:
    link: Link[Report, Request] = Link(endpoint, Codec(Report), Codec(Request), on_drop=lambda reason: None)
    try:
        link.send([RouterHello(VERSION, 1)])
        if not link.socket.poll(int(TIMEOUT_S * 1000), zmq.POLLIN):
            raise BenchError("the worker listens but does not answer")
        match link.receive():
            case [WorkerHello(), *_]:
                return
            case [Refusal(message=message), *_]:
                raise BenchError(message)
            case _:
                raise BenchError("the worker answered without a hello")
    finally:
        link.close()


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
