"""Lists of workers: what is read from a file and from names, and what of it is believed."""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest

from router.isolation import Borders
from router.routing.discovery import (
    MAX_FILE_BYTES,
    MAX_WORKERS,
    Discovery,
    WorkerName,
    WorkersFile,
    listed_endpoints,
)
from tests.patience import patient

TEXT = """
# prefill workers
ipc:///run/baton/p0
  tcp://10.0.0.2:7000#gpu2

p1
ipc://run/p2
http://10.0.0.2:7000
tcp://10.0.0.2:7000 # first
"""


def test_a_file_names_one_worker_a_line() -> None:
    endpoints, bad = listed_endpoints(TEXT)
    assert endpoints == ["ipc:///run/baton/p0", "tcp://10.0.0.2:7000#gpu2"]
    assert bad == ["p1", "ipc://run/p2", "http://10.0.0.2:7000", "tcp://10.0.0.2:7000 # first"]
    assert listed_endpoints("ipc:///\x00\nipc:///" + "x" * 600)[0] == []


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    caplog.clear()
    return found


def test_what_is_wrong_with_a_file_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "workers"
    file = WorkersFile(path)
    assert [file.look(), file.look()] == [[], []]
    (missing,) = warnings(caplog)
    assert "cannot be read" in missing
    path.write_text("ipc:///a/b\nnonsense\n")
    assert [file.look(), file.look()] == [["ipc:///a/b"]] * 2
    (bad,) = warnings(caplog)
    assert "'nonsense'" in bad
    path.write_text("ipc:///a/b\n")
    file.look()
    assert warnings(caplog) == []
    path.write_text("nonsense\n")
    file.look()
    assert len(warnings(caplog)) == 1, "it was gone, and is new again"


def test_a_file_names_so_many_workers_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "workers"
    path.write_text("".join(f"ipc:///run/{number}\n" for number in range(MAX_WORKERS + 1)))
    assert WorkersFile(path).look()[-1] == f"ipc:///run/{MAX_WORKERS - 1}"
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("content", [None, b"\xff\xfe\n", b"#" * (MAX_FILE_BYTES + 1)])
def test_a_file_that_cannot_be_read_keeps_what_it_said(
    content: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "workers"
    path.write_text("ipc:///a/b\n")
    file = WorkersFile(path)
    file.look()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    assert file.look() == ["ipc:///a/b"]
    assert len(warnings(caplog)) == 1


class Answers:
    """Stands for a name server."""

    def __init__(self, *answers: Sequence[str] | Exception) -> None:
        self._answers = list(answers)
        self.asked: list[tuple[str, int]] = []

    async def __call__(self, name: str, port: int) -> Sequence[str]:
        self.asked.append((name, port))
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_name_stands_for_its_addresses_and_keeps_them_while_it_is_not_resolved(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failure = OSError("no such name")
    answers = Answers(["10.0.0.1", "10.0.0.2"], failure, TimeoutError(), UnicodeError(), ["10.0.0.2"])
    name = WorkerName("tcp+dns://prefill.baton.svc:7000#baton", answers)
    both = ["tcp://10.0.0.1:7000#baton", "tcp://10.0.0.2:7000#baton"]
    seen = []
    for _ in range(5):
        asyncio.run(name.refresh())
        seen.append(name.endpoints)
    assert seen == [both, both, both, both, both[1:]]
    assert set(answers.asked) == {("prefill.baton.svc", 7000)}
    assert len(warnings(caplog)) == 1


def test_file_and_names_are_one_list(tmp_path: Path) -> None:
    path = tmp_path / "workers"
    path.write_text("ipc:///a/b\n")

    async def watch() -> list[str]:
        found: asyncio.Queue[list[str]] = asyncio.Queue()
        names = [WorkerName("tcp+dns://a:1", Answers(["10.0.0.1"])), WorkerName("tcp+dns://b:2", Answers([]))]
        discovery = Discovery(WorkersFile(path), names, found.put_nowait, Borders())
        discovery.start()
        try:
            latest: list[str] = []
            while len(latest) < 2:  # names are resolved beside the looks at the file
                latest = await asyncio.wait_for(found.get(), patient(20))
            return latest
        finally:
            discovery.close()

    assert asyncio.run(watch()) == ["ipc:///a/b", "tcp://10.0.0.1:1"]
