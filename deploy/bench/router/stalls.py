"""How long the router lets others wait while one client does its worst: `python -m
deploy.bench.router.stalls`.

A neighbour asks `GET /version` again and again on a connection of its own, a millisecond after each answer.
Meanwhile a client sends the largest bodies that are allowed, one after the other on one connection, or heads
without an end on four. The longest answer in each of these times is what the event loop stood still for,
and the machine's own delays: the first line is the same without any such client. On a busy machine they are
most of it; so the time that the router's thread had the processor while the neighbour waited is shown too, by
the kernel's statistics (`schedstat`): the event loop cannot have stood still at its own work for longer.

The router and the processes that prepare bodies for it have one core, all else has another.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deploy.bench.router.http_client import GET_VERSION, HttpBenchError, Stamps
from deploy.bench.router.router_process import Cluster, Cores, cluster

BODY_BYTES = 8 << 20
"""The router's default limit."""
MESSAGES, PARTS_EACH = 4096, 2
PROMPT_TOKENS = 1_000_000
HEADS = 4
HEAD_BYTES = 16 << 20
"""Sent of one endless head before its client gives up, or is cut off."""
SEED = 1
PAUSE_S = 0.001
REST_S = 0.0005
TIMEOUT_S = 300.0
LIMIT_S = 900.0


def _post(path: str, fields: dict[str, Any]) -> bytes:
    body = json.dumps(fields).encode()
    return _head(path, f"content-length: {len(body)}") + body


def _head(path: str, *lines: str) -> bytes:
    return "\r\n".join((f"POST {path} HTTP/1.1", "host: x", *lines, "", "")).encode()


def chat_body() -> bytes:
    """As many messages and parts as are allowed, and as many bytes, but for some of JSON."""
    text = "A word and more. " * 100
    size = BODY_BYTES // (MESSAGES * PARTS_EACH) - 64
    part = {"type": "text", "text": text[:size]}
    message = {"role": "user", "content": [part] * PARTS_EACH}
    return _post("/v1/chat/completions", {"messages": [message] * MESSAGES, "max_tokens": 2, "seed": SEED})


def tokens_body() -> bytes:
    """A prompt of so many token ids, which is accepted."""
    return _post("/v1/completions", {"prompt": [65] * PROMPT_TOKENS, "max_tokens": 2, "seed": SEED})


def tokenize_body() -> bytes:
    text = "A word and more. " * (BODY_BYTES // 17 - 8)
    return _post("/tokenize", {"prompt": text, "return_token_strs": True})


def chunks_body() -> bytes:
    """A body in chunks of one byte."""
    text = json.dumps({"prompt": "x" * 500_000}).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in text)
    return _head("/tokenize", "transfer-encoding: chunked") + chunks + b"0\r\n\r\n"


BODIES = {"chat": chat_body, "tokens": tokens_body, "tokenize": tokenize_body, "chunks": chunks_body}
TITLES = {
    "quiet": "nobody else",
    "chat": f"chat, {MESSAGES * PARTS_EACH} text parts, {BODY_BYTES >> 20} MiB",
    "tokens": f"completion, {PROMPT_TOKENS} token ids",
    "tokenize": f"/tokenize, {BODY_BYTES >> 20} MiB, with token_strs",
    "chunks": "/tokenize, 500 kB in chunks of one byte",
    "heads": f"{HEADS} heads without an end",
}


def send_bodies(name: str, port: int, count: int) -> Counter[str]:
    """How often each status was the answer."""
    raw = BODIES[name]()
    statuses: Counter[str] = Counter()
    with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as connection:
        for _ in range(count):
            connection.sendall(raw)
            statuses[_answer(connection)] += 1
    return statuses


def _answer(connection: socket.socket) -> str:
    data = b""
    while b"\r\n\r\n" not in data:
        data += _received(connection)
    head, _, rest = data.partition(b"\r\n\r\n")
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    left = int(length.partition(b":")[2]) - len(rest)
    while left > 0:
        left -= len(_received(connection))
    return head.split()[1].decode()


def _received(connection: socket.socket) -> bytes:
    data = connection.recv(1 << 18)
    if not data:
        raise HttpBenchError("the router closed a connection with a request on it")
    return data


def send_heads(port: int, count: int) -> Counter[str]:
    """So many times, each of HEADS connections in turn sends a piece of a header that does not end."""
    statuses: Counter[str] = Counter()
    for _ in range(count):
        connections = [socket.create_connection(("127.0.0.1", port), TIMEOUT_S) for _ in range(HEADS)]
        for connection in connections:
            connection.sendall(b"GET /version HTTP/1.1\r\nhost: x\r\nx-a: ")
        piece, left = b"y" * (64 << 10), list(connections)
        for _ in range(HEAD_BYTES // len(piece)):
            for connection in list(left):
                try:
                    connection.sendall(piece)
                except OSError:
                    left.remove(connection)
        for connection in connections:
            with connection, contextlib.suppress(OSError):
                statuses[connection.recv(64).split()[1].decode()] += 1
    return statuses


def _attack(name: str, port: int, count: int, results: Connection) -> None:
    results.send(send_heads(port, count) if name == "heads" else send_bodies(name, port, count))


def _neighbour(port: int, router_pid: int, results: Connection) -> None:
    """Asks until its pipe says to end, and notes when each question was asked, how long its answer took, and
    how much of this the router's main thread ran."""
    schedstat = Path(f"/proc/{router_pid}/task/{router_pid}/schedstat")

    def ran_s() -> float:
        return int(schedstat.read_bytes().split()[0]) / 1e9

    times: list[NeighbourWait] = []
    with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as connection:
        while not results.poll():
            before_s, asked_s = ran_s(), time.monotonic()
            connection.sendall(GET_VERSION)
            data = b""
            while not data.endswith(b'"}'):
                data += _received(connection)
            times.append(NeighbourWait(asked_s, time.monotonic() - asked_s, ran_s() - before_s))
            time.sleep(PAUSE_S)
    results.send(times)


@dataclass(frozen=True, slots=True)
class NeighbourWait:
    asked_s: float
    took_s: float
    router_s: float


@dataclass(frozen=True, slots=True)
class Window:
    name: str
    start_s: float
    end_s: float
    statuses: Counter[str]


def measure(one: Cluster, count: int, names: list[str], quiet_s: float) -> dict[str, dict[str, Any]]:
    """By name: quantiles of the neighbour's times in ms, and the statuses of the client's answers."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    neighbour = context.Process(target=_neighbour, args=(one.port, one.router_pid, theirs), daemon=True)
    neighbour.start()
    windows: list[Window] = []
    one.loop.run(_after(2.0), LIMIT_S, rest_s=REST_S)  # it has begun
    start_s = time.monotonic()
    one.loop.run(_after(quiet_s), LIMIT_S, rest_s=REST_S)
    windows.append(Window("quiet", start_s, time.monotonic(), Counter()))
    for name in names:
        results, sent = context.Pipe()
        attack = context.Process(target=_attack, args=(name, one.port, count, sent), daemon=True)
        start_s = time.monotonic()
        attack.start()
        one.loop.run(lambda process=attack: not process.is_alive(), LIMIT_S, rest_s=REST_S)  # type: ignore[misc]
        if not results.poll():
            raise HttpBenchError(f"{TITLES[name]}: the client came to no end")
        windows.append(Window(name, start_s, time.monotonic(), results.recv()))
    ours.send(None)
    one.loop.run(ours.poll, LIMIT_S, rest_s=REST_S)
    times: list[NeighbourWait] = ours.recv()
    return {window.name: _figures(window, times) for window in windows}


def _after(seconds: float) -> Callable[[], bool]:
    end_s = time.monotonic() + seconds
    return lambda: time.monotonic() >= end_s


def _figures(window: Window, times: list[NeighbourWait]) -> dict[str, Any]:
    waits = [one for one in times if window.start_s <= one.asked_s < window.end_s]
    took = sorted(one.took_s * 1e3 for one in waits)
    return {
        "seconds": window.end_s - window.start_s,
        "statuses": dict(window.statuses),
        "answers": len(took),
        "p50_ms": took[len(took) // 2],
        "p99_ms": took[int(len(took) * 0.99)],
        "longest_ms": took[-1],
        "router_ms": max(one.router_s for one in waits) * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The router's longest stall while one client does its worst")
    parser.add_argument("--count", type=int, default=2, help="bodies of each kind, and rounds of heads")
    parser.add_argument("--quiet-s", type=float, default=5.0, help="seconds without such a client")
    parser.add_argument("--only", choices=(*BODIES, "heads"))
    given = parser.parse_args()
    cores = Cores.pick()
    os.sched_setaffinity(0, {cores.bench})
    names = [given.only] if given.only else [*BODIES, "heads"]
    with cluster("pair", cores) as one:
        one.stamps[SEED] = Stamps()
        figures = measure(one, given.count, names, given.quiet_s)
    table = Table(title="a neighbour's GET /version, times in ms; the aim is 20 at most")
    for column in ("meanwhile", "answered", "seconds", "p50", "p99", "longest", "router ran"):
        table.add_column(column, justify="right" if column != "meanwhile" else "left")
    for name, row in figures.items():
        statuses = ", ".join(f"{count} × {status}" for status, count in sorted(row["statuses"].items()))
        cells = [f"{row[key]:.1f}" for key in ("seconds", "p50_ms", "p99_ms", "longest_ms", "router_ms")]
        table.add_row(TITLES[name], statuses, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
