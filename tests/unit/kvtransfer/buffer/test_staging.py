"""The host buffer: resident, private, sealed, without a name."""

import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtransfer.buffer.staging import HostStaging, StagingSocketServer, receive_staging
from kvtransfer.errors import TransferConfigError

SIZE = 1 << 20


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="baton-") as path:
        yield Path(path)


def ask(server: StagingSocketServer, path: Path, size: int) -> object:
    """Asks from another thread, and serves from this one."""
    answer: list[object] = []

    def client() -> None:
        try:
            answer.append(receive_staging(path, size, timeout_s=5.0))
        except TransferConfigError as error:
            answer.append(error)

    thread = threading.Thread(target=client)
    thread.start()
    while thread.is_alive():
        server.serve()
        thread.join(0.001)
    return answer[0]


def test_the_buffer_is_resident_and_shared(directory: Path) -> None:
    staging = HostStaging(SIZE)
    server = StagingSocketServer(directory / "staging", staging.fd)
    assert staging.resident_bytes() == SIZE
    mapping = ask(server, directory / "staging", SIZE)
    view = memoryview(mapping)  # type: ignore[arg-type]
    view[5:8] = b"abc"
    assert bytes(staging.view[5:8]) == b"abc"
    view.release()
    server.close()
    assert list(directory.iterdir()) == []
    staging.close()
    staging.close()


def test_a_buffer_of_another_size_is_refused(directory: Path) -> None:
    staging = HostStaging(SIZE)
    server = StagingSocketServer(directory / "staging", staging.fd)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    assert "not of" in str(ask(server, directory / "staging", SIZE * 2))
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    server.close()
    staging.close()


def test_nobody_there(directory: Path) -> None:
    with pytest.raises(TransferConfigError, match="staging"):
        receive_staging(directory / "staging", SIZE, timeout_s=0.2)


def test_another_user_gets_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = HostStaging(SIZE)
    server = StagingSocketServer(directory / "staging", staging.fd)
    us = os.getuid()
    monkeypatch.setattr("kvtransfer.buffer.staging.os.getuid", lambda: us + 1)
    assert "no buffer" in str(ask(server, directory / "staging", SIZE))
    monkeypatch.undo()
    server.close()
    staging.close()


def test_an_open_directory_is_refused(directory: Path) -> None:
    directory.chmod(0o770)
    staging = HostStaging(SIZE)
    with pytest.raises(TransferConfigError, match="mode 770"):
        StagingSocketServer(directory / "staging", staging.fd)
    staging.close()


def test_a_guest_that_leaves_does_no_harm(directory: Path) -> None:
    staging = HostStaging(SIZE)
    server = StagingSocketServer(directory / "staging", staging.fd)
    for _ in range(3):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(str(directory / "staging"))
    server.serve()
    assert ask(server, directory / "staging", SIZE) is not None
    server.close()
    staging.close()
