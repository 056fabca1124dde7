"""The host buffer: resident, private, sealed, without a name."""

import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtransfer.buffer.staging import HostStaging, StagingDoor, receive_staging
from kvtransfer.errors import TransferConfigError

SIZE = 1 << 20


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="baton-") as path:
        yield Path(path)


def ask(door: StagingDoor, path: Path, size: int) -> object:
    """Asks from another thread, and serves from this one."""
    answer: list[object] = []

    def guest() -> None:
        try:
            answer.append(receive_staging(path, size, timeout_s=5.0))
        except TransferConfigError as error:
            answer.append(error)

    thread = threading.Thread(target=guest)
    thread.start()
    while thread.is_alive():
        door.serve()
        thread.join(0.001)
    return answer[0]


def test_the_buffer_is_resident_and_shared(directory: Path) -> None:
    staging = HostStaging(SIZE)
    door = StagingDoor(directory / "door", staging.fd)
    assert staging.resident_bytes() == SIZE
    mapping = ask(door, directory / "door", SIZE)
    view = memoryview(mapping)  # type: ignore[arg-type]
    view[5:8] = b"abc"
    assert bytes(staging.view[5:8]) == b"abc"
    view.release()
    door.close()
    assert list(directory.iterdir()) == []
    staging.close()
    staging.close()


def test_a_buffer_of_another_size_is_refused(directory: Path) -> None:
    staging = HostStaging(SIZE)
    door = StagingDoor(directory / "door", staging.fd)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    assert "not of" in str(ask(door, directory / "door", SIZE * 2))
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    door.close()
    staging.close()


def test_nobody_there(directory: Path) -> None:
    with pytest.raises(TransferConfigError, match="door"):
        receive_staging(directory / "door", SIZE, timeout_s=0.2)


def test_another_user_gets_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = HostStaging(SIZE)
    door = StagingDoor(directory / "door", staging.fd)
    us = os.getuid()
    monkeypatch.setattr("kvtransfer.buffer.staging.os.getuid", lambda: us + 1)
    assert "no buffer" in str(ask(door, directory / "door", SIZE))
    monkeypatch.undo()
    door.close()
    staging.close()


def test_an_open_directory_is_refused(directory: Path) -> None:
    directory.chmod(0o770)
    staging = HostStaging(SIZE)
    with pytest.raises(TransferConfigError, match="mode 770"):
        StagingDoor(directory / "door", staging.fd)
    staging.close()


def test_a_guest_that_leaves_does_no_harm(directory: Path) -> None:
    staging = HostStaging(SIZE)
    door = StagingDoor(directory / "door", staging.fd)
    for _ in range(3):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as guest:
            guest.connect(str(directory / "door"))
    door.serve()
    assert ask(door, directory / "door", SIZE) is not None
    door.close()
    staging.close()
