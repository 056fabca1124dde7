"""Commands to a launcher over its socket."""

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.errors import UserError
from deploy.launcher import run_directory
from deploy.launcher.control import control_server, request_scale
from deploy.launcher.scale_plan import Scale
from tests.patience import patient

DEADLINE_S = patient(30.0)


class Launcher:
    """Takes commands, and does what the test says."""

    def __init__(self, refuses: str = "") -> None:
        self.refuses = refuses
        self.commands: list[Scale] = []

    async def handle(self, wanted: Scale, say: Callable[[str], None]) -> None:
        self.commands.append(wanted)
        say("starting")
        if self.refuses:
            raise UserError(self.refuses)

    def serve(self, path: Path, client: Callable[[], object]) -> object:
        """What `client` comes to, called in a thread while we listen."""

        async def both() -> object:
            async with control_server(path, self.handle):
                return await asyncio.wait_for(asyncio.to_thread(client), DEADLINE_S)

        return asyncio.run(both())


def test_a_command_is_carried_out_and_answered(tmp_path: Path) -> None:
    launcher = Launcher()
    dead = tmp_path / "dead"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(dead))
    lines = launcher.serve(tmp_path / "c", lambda: list(request_scale([dead, tmp_path / "c"], Scale(2, 3))))
    assert lines == ["starting"]
    assert launcher.commands == [Scale(2, 3, None)]


def test_a_refusal_is_an_error_with_its_reason(tmp_path: Path) -> None:
    def ask() -> str:
        with pytest.raises(UserError) as caught:
            list(request_scale([tmp_path / "c"], Scale(2)))
        return str(caught.value)

    assert Launcher("no room on GPU 0").serve(tmp_path / "c", ask) == "no room on GPU 0"


@pytest.mark.parametrize(
    "raw",
    [
        b'{"prefill": 65}\n',
        b'{"prefill": -1}\n',
        b'{"prefll": 1}\n',
        b"[]\n",
        b"\xff\n",
        b"",
        b"1" * (1 << 17),
    ],
)
def test_what_is_not_a_command_is_refused(raw: bytes, tmp_path: Path) -> None:
    launcher = Launcher()

    def send() -> list[bytes]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(DEADLINE_S)
            connection.connect(str(tmp_path / "c"))
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(raw)
                connection.shutdown(socket.SHUT_WR)
            with connection.makefile("rb") as lines, contextlib.suppress(ConnectionResetError):
                return list(lines)
        return []

    answers = launcher.serve(tmp_path / "c", send)
    assert isinstance(answers, list)
    for answer in answers:
        assert json.loads(answer)["end"] == "refused"
    assert answers or len(raw) > 1 << 16
    assert launcher.commands == []


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no launcher listens"):
        list(request_scale([tmp_path / "c"], Scale(1)))


def test_a_launcher_is_found_by_its_port_or_its_directory(short_path: Path) -> None:
    directory = run_directory.create(short_path)
    assert run_directory.find_control_sockets(8123, short_path) == []
    path = run_directory.control_socket(directory, 8123)
    with socket.socket(socket.AF_UNIX) as control:
        control.bind(str(path))
        assert run_directory.find_control_sockets(8123, short_path) == [path]
        assert run_directory.find_control_sockets(8124, short_path) == []
        assert run_directory.control_sockets_in(directory) == [path]
        assert run_directory.control_sockets_in(short_path / "nowhere") == []


def test_the_last_child_after_the_launchers_death_leaves_no_directory(short_path: Path) -> None:
    directory = run_directory.create(short_path)
    run_directory.write_workers(directory, ["ipc:///a", "ipc:///b"])
    assert (directory / "workers").read_text() == "ipc:///a\nipc:///b\n"
    with socket.socket(socket.AF_UNIX) as control:
        control.bind(str(run_directory.control_socket(directory, 8123)))
    other = directory / "decode-0"
    other.touch()
    run_directory.leave(directory, launcher_lives=True)
    assert len(list(directory.iterdir())) == 3
    run_directory.leave(directory, launcher_lives=False)
    assert list(directory.iterdir()) == [other], "of a child that still runs"
    other.unlink()
    run_directory.leave(directory, launcher_lives=False)
    assert not directory.exists()
