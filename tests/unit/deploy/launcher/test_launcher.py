"""The launcher over small stand-ins for its children: start, ready, restart, refuse, stop, kill."""

import asyncio
import io
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from deploy.launcher.children import ChildSpec
from deploy.launcher.launcher import Launcher
from deploy.launcher.output import Screen
from deploy.launcher.readiness import Welcome
from deploy.launcher.supervision import ChildKind
from tests.conftest import MARK
from tests.patience import patient
from tests.ports import free_port
from tests.unit.deploy import fake_child

PROGRAM = (sys.executable, fake_child.__file__)
DEADLINE_S = patient(60.0)


class System:
    """One launcher with children of a given behaviour, and what it printed."""

    def __init__(self, tmp_path: Path, drain_timeout_s: float = 30.0) -> None:
        self.run_dir = tmp_path / "run"
        self.run_dir.mkdir()
        self.log = tmp_path / "ended"
        self.port = free_port()
        self.stream = io.StringIO()
        self.drain_timeout_s = drain_timeout_s
        self.specs: list[ChildSpec] = []

    def add(self, name: str, kind: ChildKind, *arguments: str) -> None:
        self.specs.append(ChildSpec(name, kind, arguments))

    def add_router(self) -> None:
        self.add("router", ChildKind.ROUTER, "router", str(self.port), "router", str(self.log))

    def add_steady(self, name: str, kind: ChildKind) -> None:
        self.add(name, kind, "steady", name, str(self.log))

    @property
    def text(self) -> str:
        return self.stream.getvalue()

    def ended(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []

    def run(self, *waits: tuple[str, int]) -> int:
        """Runs to the end; when a text has been printed, sends us a signal. The exit code."""
        return asyncio.run(asyncio.wait_for(self._run(waits), DEADLINE_S))

    async def _run(self, waits: tuple[tuple[str, int], ...]) -> int:
        welcome = Welcome("127.0.0.1", self.port, "fake")
        launcher = Launcher(
            self.specs, self.run_dir, self.drain_timeout_s, welcome, Screen(self.stream), PROGRAM
        )
        running = asyncio.create_task(launcher.run())
        for text, number in waits:
            while text not in self.text and not running.done():  # noqa: ASYNC110  (a printed line)
                await asyncio.sleep(0.02)
            if not running.done():
                os.kill(os.getpid(), number)
        return await running


def descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def test_starts_welcomes_and_stops_in_order(tmp_path: Path) -> None:
    system = System(tmp_path)
    system.add_steady("transfer-0", ChildKind.TRANSFER)
    system.add_steady("worker-0", ChildKind.WORKER)
    system.add_steady("worker-1", ChildKind.WORKER)
    system.add_router()
    before = descendants()
    assert system.run(("ready in", signal.SIGTERM)) == 0
    text = system.text
    assert "[worker-0] worker-0 is up" in text
    assert "memory of fake-0: cpu: 1000 B" in text
    assert "10 B" in text, "the difference between planned and measured"
    assert f"try: curl http://127.0.0.1:{system.port}/v1/chat/completions" in text
    ended = system.ended()
    assert ended[0] == "router"
    assert set(ended[1:3]) == {"worker-0", "worker-1"}
    assert ended[3] == "transfer-0"
    assert descendants() == before
    assert not system.run_dir.exists()


def test_a_child_that_dies_is_started_again(tmp_path: Path) -> None:
    system = System(tmp_path)
    system.add(
        "worker-0", ChildKind.WORKER, "crash-once", str(tmp_path / "crashed"), "worker-0", str(system.log)
    )
    assert system.run(("worker-0 is up", signal.SIGINT)) == 0
    assert "worker-0 ended with code 1; starts again in 0." in system.text
    assert system.text.count("worker-0 started (pid") == 2
    assert system.ended() == ["worker-0"]


def test_a_killed_child_is_named_by_its_signal(tmp_path: Path) -> None:
    system = System(tmp_path)
    system.add_steady("worker-0", ChildKind.WORKER)

    async def kill_then_stop() -> int:
        running = asyncio.create_task(system._run((("worker-0 started (pid 0)", signal.SIGTERM),)))
        while "worker-0 is up" not in system.text:  # noqa: ASYNC110  (a printed line)
            await asyncio.sleep(0.02)
        (victim,) = [p for p in descendants() if "steady" in p.cmdline()]
        victim.kill()
        while system.text.count("worker-0 is up") < 2:  # noqa: ASYNC110  (a printed line)
            await asyncio.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)
        return await running

    assert asyncio.run(asyncio.wait_for(kill_then_stop(), DEADLINE_S)) == 0
    assert "worker-0 was killed by SIGKILL; starts again" in system.text


def test_a_refused_configuration_ends_all_with_its_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system = System(tmp_path)
    system.add_steady("transfer-0", ChildKind.TRANSFER)
    system.add("worker-0", ChildKind.WORKER, "refuse")
    before = descendants()
    assert system.run() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "baton: error: worker-0 refused its configuration: --port: no such port"
    assert "no such port" not in system.text, "the same error was said twice"
    assert descendants() == before
    assert not system.run_dir.exists()


def test_a_child_that_will_not_end_is_killed(tmp_path: Path) -> None:
    system = System(tmp_path, drain_timeout_s=0.0)
    system.add("worker-0", ChildKind.WORKER, "stubborn")
    before = descendants()
    assert system.run(("will not go", signal.SIGTERM)) == 0
    assert "worker-0 did not end in 2.0 s: killed" in system.text
    assert descendants() == before


def test_a_second_signal_kills_at_once(tmp_path: Path) -> None:
    system = System(tmp_path, drain_timeout_s=3600.0)
    system.add("worker-0", ChildKind.WORKER, "stubborn")
    assert system.run(("will not go", signal.SIGINT), ("stopping", signal.SIGINT)) == 0
    assert "did not end" not in system.text


def test_what_a_child_leaves_behind_is_killed_with_it(tmp_path: Path) -> None:
    system = System(tmp_path)
    system.add("worker-0", ChildKind.WORKER, "leave-a-child")
    assert system.run(("starts again in", signal.SIGTERM)) == 0
    left = [p for p in psutil.process_iter() if "threading.Event().wait()" in _command(p)]
    assert left == []


def _command(process: psutil.Process) -> str:
    try:
        mark = process.environ().get(MARK)
        return " ".join(process.cmdline()) if mark == str(os.getpid()) else ""
    except psutil.Error:
        return ""


def test_children_get_no_settings_of_ours_but_their_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deploy.launcher.launcher import _environment

    monkeypatch.setenv("BATON_PORT", "1")
    monkeypatch.setenv("OTHER", "2")
    environment = _environment(ChildSpec("router", ChildKind.ROUTER, (), (("BATON_API_KEY", "k"),)))
    assert environment["BATON_API_KEY"] == "k"
    assert environment["OTHER"] == "2"
    assert "BATON_PORT" not in environment
    assert "k" not in repr(ChildSpec("router", ChildKind.ROUTER, (), (("BATON_API_KEY", "k"),))).split("'")


def test_children_are_added_and_dismissed_meanwhile(tmp_path: Path) -> None:
    system = System(tmp_path)
    system.add_steady("worker-0", ChildKind.WORKER)
    more = ("more-a", "more-b")
    steady = [ChildSpec(name, ChildKind.WORKER, ("steady", name, str(system.log))) for name in more]
    refusing = [ChildSpec("bad", ChildKind.WORKER, ("refuse",))]
    failing = [ChildSpec("poor", ChildKind.WORKER, ("crash-once", str(tmp_path / "no" / "where"), "x", "x"))]
    before = descendants()

    async def change() -> int:
        launcher = Launcher(
            system.specs,
            system.run_dir,
            30.0,
            Welcome("127.0.0.1", system.port, "fake"),
            Screen(system.stream),
            PROGRAM,
        )
        running = asyncio.create_task(launcher.run())
        await shows("worker-0 is up")
        launcher.add(steady)
        await shows("more-a is up")
        await shows("more-b is up")
        await launcher.dismiss(["more-a"], 10.0)
        assert system.ended() == ["more-a"]
        (bad,) = launcher.add(refusing)
        while not bad.given_up:  # noqa: ASYNC110  (a process's end)
            await asyncio.sleep(0.02)
        assert bad.given_up == "bad refused its configuration: --port: no such port"
        await launcher.dismiss(["bad"], 10.0)
        launcher.add(failing)
        await shows("poor ended with code 1; starts again")
        await launcher.dismiss(["poor"], 10.0)  # in its back-off
        assert not launcher.stopping.is_set(), "nothing of it concerns the others"
        launcher.stop()
        return await running

    async def shows(text: str) -> None:
        while text not in system.text:  # noqa: ASYNC110  (a printed line)
            await asyncio.sleep(0.02)

    assert asyncio.run(asyncio.wait_for(change(), DEADLINE_S)) == 0
    assert sorted(system.ended()) == ["more-a", "more-b", "worker-0"]
    assert system.text.count("more-a started") == 1, "a dismissed one is not started again"
    assert "more-a ended" not in system.text, "its end was wanted"
    assert descendants() == before
