"""A router's connection to a worker: what it refuses to start with, and whom it refuses."""

import asyncio
import socket
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from services.protocol.client import ClientConfigError, ClientState, WorkerClient, load_keys
from services.protocol.framing import LENGTH_BYTES, with_length
from tests.fake_worker import FakeWorker, Script
from tests.patience import patient
from tests.unit.services.protocol.test_connection import until

DEADLINE_S = patient(30.0)


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="baton-") as path:  # Mode 0700, and short.
        yield Path(path)


def new_client(endpoint: str, moved: asyncio.Event | None = None) -> WorkerClient:
    def on_state(client: WorkerClient, old: ClientState, new: ClientState) -> None:
        if moved is not None and new is not ClientState.CONNECTING:
            moved.set()

    return WorkerClient(endpoint, router_epoch=1, on_reports=lambda *_: None, on_state=on_state)


async def start(endpoint: str) -> None:
    client = new_client(endpoint)
    try:
        client.start()
    finally:
        client.close()


def test_tcp_without_keys_and_open_directories_are_refused(directory: Path) -> None:
    with pytest.raises(ClientConfigError, match="tcp:// needs CURVE keys and an allow-list"):
        asyncio.run(start("tcp://127.0.0.1:7000"))
    directory.chmod(0o755)
    with pytest.raises(ClientConfigError, match="has mode 755, must have 700"):
        asyncio.run(start(f"ipc://{directory}/w"))
    with pytest.raises(ClientConfigError, match="must have 700"):
        load_keys(directory)
    directory.chmod(0o700)
    with pytest.raises(ClientConfigError, match=r"must hold exactly one \*\.key_secret file"):
        load_keys(directory)


def test_a_worker_of_another_protocol_is_refused_with_both_versions(directory: Path) -> None:
    async def meet() -> str:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{directory}/w")
            listener.listen()
            moved = asyncio.Event()
            client = new_client(f"ipc://{directory}/w", moved)
            client.start()
            try:
                peer, _ = await asyncio.to_thread(listener.accept)
                with peer:
                    assert (await asyncio.to_thread(peer.recv, 5))[LENGTH_BYTES] == 1
                    peer.sendall(with_length(b"\x09\x90"))
                    await asyncio.wait_for(moved.wait(), DEADLINE_S)
                assert client.state is ClientState.REFUSED
                return client.message
            finally:
                client.close()

    assert asyncio.run(meet()) == "the worker speaks protocol version 9, this side speaks 1"


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_a_router_that_was_stopped_itself_reads_before_it_calls_a_worker_silent(
    directory: Path, run: Callable[[Coroutine[Any, Any, None]], None]
) -> None:
    async def scenario() -> None:
        with FakeWorker(f"ipc://{directory}/w", "unified", Script()) as worker:
            client = new_client(worker.endpoint)
            client.start()

            def look_late() -> None:
                """As after a stop of this process, longer than any silence that is allowed."""
                assert client._timer is not None
                client._timer.cancel()
                client._heard_at_s -= 100.0
                client._tick()
                assert client.state is ClientState.READY, "not before a second look"

            await until(lambda: client.status is not None)
            worker.mute = True
            said = threading.Event()

            def say() -> None:
                worker._server.send(worker._peer, [worker.status(None)])
                said.set()

            worker.act(say)
            assert said.wait(DEADLINE_S)
            look_late()
            await until(lambda: not client._is_second_look)
            assert client.state is ClientState.READY
            look_late()
            await until(lambda: client.state is ClientState.LOST)
            assert client.message.startswith("silent for 100")
            client.close()

    run(scenario())
