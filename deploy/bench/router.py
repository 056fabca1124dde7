"""What the router adds, without any model: `python -m deploy.bench.router`, in a checkout (it needs tests/).

Three processes: the router, scripted workers that answer at once (tests/fake_worker.py), and this one as
the client. Two figures come out:

- time to first token at 200 streamed requests a second (Poisson), from the client's write to its first frame:
  loopback HTTP, the router, two ZMQ hops and the fake worker's turn-around are all in it. The same load of
  `GET /version` stands beside it: what HTTP and the machine's scheduling cost without any of ours;
- the streaming ceiling: many streams fed one token each a step, faster and faster, until the client no longer
  gets them in time. Tokens a second by the clock, and by the router process's CPU time.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from router.config import RouterConfig
from router.process import run
from services.messages import Generate, Report, Request, Tokens
from tests.fake_worker import FakeWorker, Script

DEMO_MODEL = Path(__file__).parents[1] / "demo" / "model"
PROMPT = "The baton is handed from the first runner to the second without slowing down. " * 12
TOKEN = 65
"""What every fake worker answers: a byte of every vocabulary here."""
START_TIMEOUT_S = 30.0


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE of this package's own sources, for where the demo model is not built yet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sources = [path.read_text() for path in sorted(Path(__file__).parents[2].glob("router/*.py"))]
    trainer = trainers.BpeTrainer(
        vocab_size=2048, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([*sources, PROMPT], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))


class SteppingWorker(FakeWorker):
    """A unified worker whose decode steps are called from outside: one token for every live choice."""

    live: dict[int, tuple[bytes, int]]

    def _answer(self, peer: bytes, message: Request) -> None:
        if isinstance(message, Generate):
            self._works[message.work.request_id] = (peer, message.work)
            self.prefill(message.work)
            self.live[message.work.request_id] = (peer, message.work.sampling.max_tokens - 1)
        else:
            super()._answer(peer, message)

    def step(self) -> None:
        frames: dict[bytes, list[Report]] = {}
        for request_id, (peer, left) in list(self.live.items()):
            finish = "length" if left == 1 else None
            frames.setdefault(peer, []).append(Tokens(request_id, 0, [TOKEN], None, finish))  # type: ignore[arg-type]
            if left == 1:
                del self.live[request_id]
            else:
                self.live[request_id] = (peer, left - 1)
        for peer, reports in frames.items():
            self._send(peer, reports)


def _router(config: RouterConfig) -> None:
    run(config)


def _workers(directory: str, kind: str, control: Connection) -> None:
    script = Script(answers=[[TOKEN] * 4])
    if kind == "pair":
        with (
            FakeWorker(f"ipc://{directory}/p", "prefill", script, max_model_len=1 << 16, vocab_size=1 << 20),
            FakeWorker(f"ipc://{directory}/d", "decode", script, max_model_len=1 << 16, vocab_size=1 << 20),
        ):
            control.recv()
        return
    script.answers = [[TOKEN] * (1 << 14)]
    worker = SteppingWorker(
        f"ipc://{directory}/u",
        "unified",
        script,
        max_model_len=1 << 20,
        max_sequence_tokens=1 << 20,
        vocab_size=1 << 20,
    )
    worker.live = {}
    with worker:
        while (interval_s := control.recv()) is not None:
            next_s = time.perf_counter()
            while not control.poll(max(0.0, next_s - time.perf_counter())):
                worker.act(worker.step)
                next_s += interval_s


@dataclass
class Setup:
    port: int
    router: psutil.Process
    control: Connection

    def cpu_s(self) -> float:
        """The router process's CPU time so far."""
        times = self.router.cpu_times()
        return times.user + times.system


@contextlib.contextmanager
def processes(kind: str) -> Iterator[Setup]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o700)
        model_dir = DEMO_MODEL
        if not (DEMO_MODEL / "tokenizer.json").exists():
            write_tokenizer(directory)
            model_dir = directory
        ours, theirs = context.Pipe()
        names = ("p", "d") if kind == "pair" else ("u",)
        endpoints = tuple(f"ipc://{directory}/{one}" for one in names)
        port = _free_port()
        config = RouterConfig(workers=endpoints, model_dir=model_dir, served_model_name="bench", port=port)
        workers = context.Process(target=_workers, args=(str(directory), kind, theirs), daemon=True)
        router = context.Process(target=_router, args=(config,), daemon=True)
        workers.start()
        router.start()
        assert router.pid is not None
        try:
            asyncio.run(_until_ready(port))
            yield Setup(port, psutil.Process(router.pid), ours)
        finally:
            ours.send(None)
            router.terminate()
            router.join(10)
            workers.join(10)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _until_ready(port: int) -> None:
    end_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end_s:
        with contextlib.suppress(OSError):  # not listening yet
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            line = await reader.readline()
            writer.close()
            if b" 200 " in line:
                return
        await asyncio.sleep(0.05)
    raise SystemExit("the router did not become ready")


def _request(prompt: str, max_tokens: int) -> bytes:
    body = json.dumps(
        {"prompt": prompt, "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    ).encode()
    return b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


class _Client(asyncio.Protocol):
    """One keep-alive connection: notes when the first frame came, counts frames, and sees the end."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.frames = 0
        self.first_s: float | None = None
        self.begun = asyncio.Event()
        self.done: asyncio.Future[None] | None = None
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        found = data.count(b"data: {")
        if self.first_s is None and (found or b'{"version"' in data):
            self.first_s = time.perf_counter()
            self.begun.set()
        self.frames += found
        window = self._tail + data
        self._tail = window[-8:]
        if window.endswith((b"\r\n0\r\n\r\n", b'"}')) and self.done is not None and not self.done.done():
            self.done.set_result(None)

    async def ask(self, raw: bytes) -> float:
        """Seconds to the first frame; returns when the answer has ended."""
        assert self.transport is not None
        self.first_s, self._tail = None, b""
        self.done = asyncio.get_running_loop().create_future()
        started_s = time.perf_counter()
        self.transport.write(raw)
        await self.done
        if self.first_s is None:
            raise SystemExit("an answer without a token")
        return self.first_s - started_s


async def _connect(port: int) -> _Client:
    _, client = await asyncio.get_running_loop().create_connection(_Client, "127.0.0.1", port)
    return client


@dataclass
class Latency:
    """Sorted seconds to the first frame, and the router's CPU seconds for one request."""

    times_s: list[float]
    cpu_s: float

    def cells(self) -> list[str]:
        times = self.times_s
        picked = [statistics.median(times), times[int(len(times) * 0.9)], times[int(len(times) * 0.99)]]
        return [str(len(times)), *[f"{value * 1000:.2f}" for value in (*picked, self.cpu_s)]]


async def _latency(setup: Setup, raw: bytes, rate: float, duration_s: float) -> Latency:
    idle = [await _connect(setup.port) for _ in range(32)]
    times: list[float] = []

    async def one() -> None:
        client = idle.pop() if idle else await _connect(setup.port)
        times.append(await client.ask(raw))
        idle.append(client)

    for _ in range(100):
        await one()
    times.clear()
    arrivals = random.Random(1)
    before_s = setup.cpu_s()
    next_s = time.perf_counter()
    end_s = next_s + duration_s
    tasks: set[asyncio.Task[None]] = set()
    while next_s < end_s:
        next_s += arrivals.expovariate(rate)
        await asyncio.sleep(max(0.0, next_s - time.perf_counter()))
        task = asyncio.create_task(one())
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    return Latency(sorted(times), (setup.cpu_s() - before_s) / len(times))


@dataclass
class Streamed:
    offered: float
    by_clock: float
    by_cpu: float
    cpu_share: float


async def _streams(setup: Setup, streams: int, interval_s: float, tokens: int) -> Streamed:
    clients = [await _connect(setup.port) for _ in range(streams)]
    raw = _request("Go", tokens)
    asked = [asyncio.create_task(client.ask(raw)) for client in clients]
    await asyncio.gather(*[client.begun.wait() for client in clients])
    before_s = setup.cpu_s()
    started_s = time.perf_counter()
    setup.control.send(interval_s)
    await asyncio.gather(*asked)
    took_s = time.perf_counter() - started_s
    setup.control.send(interval_s)
    cpu_s = setup.cpu_s() - before_s
    got = sum(client.frames for client in clients) - streams
    for client in clients:
        assert client.transport is not None
        client.transport.close()
    return Streamed(streams / interval_s, got / took_s, got / cpu_s, cpu_s / took_s)


def main() -> None:
    parser = argparse.ArgumentParser(description="The router's added latency and streaming ceiling")
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--streams", type=int, default=256)
    given = parser.parse_args()
    console = Console()

    table = Table(title=f"{given.rate:g} requests/s, one core, times in ms")
    for column in ("", "requests", "p50", "p90", "p99", "router CPU each"):
        table.add_column(column, justify="right" if column else "left")
    with processes("pair") as setup:
        for name, raw in (
            ("GET /version", b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"),
            ("first token, prefill and decode", _request(PROMPT, 2)),
        ):
            latency = asyncio.run(_latency(setup, raw, given.rate, given.seconds))
            table.add_row(name, *latency.cells())
    console.print(table)

    table = Table(title=f"streaming, {given.streams} streams, one SSE frame for each token")
    for column in ("offered tok/s", "by the clock", "per CPU second", "router CPU", "aim"):
        table.add_column(column, justify="right")
    for offered in (10_000, 25_000, 50_000, 100_000):
        with processes("stepping") as setup:
            interval_s = given.streams / offered
            tokens = max(50, int(3.0 * offered / given.streams))
            one = asyncio.run(_streams(setup, given.streams, interval_s, tokens))
        table.add_row(
            f"{one.offered:.0f}", f"{one.by_clock:.0f}", f"{one.by_cpu:.0f}", f"{one.cpu_share:.0%}", "50000"
        )
    console.print(table)


if __name__ == "__main__":
    main()
