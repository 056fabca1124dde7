"""The run directory: private, swept when its launcher is gone, and not a moment before."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from deploy.launcher import run_directory


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_private_and_short(tmp_path: Path) -> None:
    directory = run_directory.create(tmp_path)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert f"-{os.getpid()}-" in directory.name
    run_directory.remove(directory)
    run_directory.remove(directory)
    assert not directory.exists()


def test_a_base_too_long_for_sockets_is_not_used(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    directory = run_directory.create(deep)
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(str(directory / "unified-63-transfer"))
    finally:
        run_directory.remove(directory)
    assert deep not in directory.parents


def test_sweeps_the_dead_and_spares_the_living(short_path: Path) -> None:
    tmp_path = short_path
    ours = run_directory.create(tmp_path)
    dead = tmp_path / f"baton-{dead_pid()}-12345"
    dead.mkdir()
    (dead / "socket").touch()
    reborn = tmp_path / f"baton-{os.getpid()}-1"  # our number, another life
    reborn.mkdir()
    other = tmp_path / "baton-notes-2026"
    other.mkdir()
    link = tmp_path / "baton-1-1"
    link.symlink_to(other)
    assert set(run_directory.sweep(tmp_path)) == {dead, reborn}
    assert {path.name for path in tmp_path.iterdir()} == {ours.name, other.name, link.name}


def test_spares_processes_that_are_still_draining(tmp_path: Path) -> None:
    dead = tmp_path / f"baton-{dead_pid()}-12345"
    dead.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(dead / "decode-0"))
        listener.listen()
        assert run_directory.sweep(tmp_path) == []
    assert run_directory.sweep(tmp_path) == [dead]
