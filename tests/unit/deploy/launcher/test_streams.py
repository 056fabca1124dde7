"""A shell may close any of the standard streams; every command does what it does all the same."""

import subprocess
import sys

import pytest

from tests.patience import patient

BATON = f"{sys.executable} -m deploy.cli"
NUMBERS = """
import os, sys
from deploy.launcher.streams import open_standard_streams
open_standard_streams()
print("printed"); print("said", file=sys.stderr); sys.stdin.read()
sys.stdout.flush(); sys.stderr.flush()
opened = os.open("/dev/null", os.O_RDONLY)
os._exit(0 if opened > 2 and all(os.get_inheritable(number) for number in (0, 1, 2)) else 1)
"""


def shell(command: str) -> subprocess.CompletedProcess[str]:
    limit_s = patient(60)
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=limit_s, check=False)


@pytest.mark.parametrize(
    "closed", ["<&-", ">&-", "2>&-", "<&- >&-", ">&- 2>&-", "<&- >&- 2>&-", "< /dev/null"]
)
def test_no_later_descriptor_takes_the_number_of_a_closed_one(closed: str) -> None:
    done = shell(f"{sys.executable} -c '{NUMBERS}' {closed}" if "<" in closed else
                 f"{sys.executable} -c '{NUMBERS}' {closed} < /dev/null")  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        "" if " >&-" in " " + closed else "printed\n",
        "" if "2>&-" in closed else "said\n",
    )


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("version >&-", 0),
        ("serve /nowhere >&- 2>&- <&-", 2),
        ("plan --help 2>&- >&-", 0),
        ("version > /dev/full", 2),
    ],
)
def test_commands_do_without_them(command: str, code: int) -> None:
    done = shell(f"{BATON} {command}")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert ("cannot be written" in done.stderr) == ("/dev/full" in command)
