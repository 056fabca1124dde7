"""Files and folders: how large, what in them, and what in none."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.unit.rules.syntax import all_files, code_files, relative

MAX_LINES = 400
MAX_FILES = 20
NAMES_OF_EVERYTHING = {"utils", "common", "helpers", "misc"}
THIS_MACHINE = re.compile(r"(?<![\w.~-])/(?:root|home/\w+)/[\w.-]+|(?<![\w.}-])/tmp/[a-z][\w.-]*")
UNFINISHED = re.compile(r"\b(?:TODO|FIXME|XXX)\b|\bNotImplementedError\b")


def crowded(names: Iterable[str]) -> dict[str, int]:
    """Folders with too many Python files side by side; their empty `__init__.py` does not count."""
    counts = Counter(Path(name).parent.as_posix() for name in names if Path(name).name != "__init__.py")
    return {folder: count for folder, count in counts.items() if count > MAX_FILES}


def for_everything(names: Iterable[str]) -> list[str]:
    return [name for name in names if NAMES_OF_EVERYTHING & {*Path(name).parts, Path(name).stem}]


def found_in_lines(text: str) -> list[str]:
    """`line: match` of what is unfinished, and of paths that one machine has."""
    return [
        f"{number}: {match.group()}"
        for number, line in enumerate(text.splitlines(), 1)
        for rule in (THIS_MACHINE, UNFINISHED)
        if (match := rule.search(line))
    ]


def test_folders_are_small() -> None:
    assert crowded(relative(path) for path in code_files()) == {}


def test_files_are_short() -> None:
    lengths = {relative(path): len(path.read_text().splitlines()) for path in all_files()}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_init_files_are_empty() -> None:
    full = [relative(path) for path in all_files() if path.name == "__init__.py" and path.read_text().strip()]
    assert full == []


def test_no_folder_for_everything() -> None:
    assert for_everything(relative(path) for path in code_files()) == []


def test_nothing_unfinished_and_no_path_of_one_machine() -> None:
    paths = [path for path in all_files() if path != Path(__file__)]
    found = {relative(path): found_in_lines(path.read_text(encoding="utf-8")) for path in paths}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_a_crowded_folder_is_seen() -> None:
    names = [f"router/api/file{number}.py" for number in range(20)]
    assert crowded([*names, "router/api/__init__.py", "router/api/v1/file.py"]) == {}
    assert crowded([*names, "router/api/one_more.py"]) == {"router/api": 21}


@pytest.mark.parametrize("name", ["router/utils/text.py", "services/common.py"])
def test_a_folder_for_everything_is_seen(name: str) -> None:
    assert for_everything([name, "router/errors.py"]) == [name]


@pytest.mark.parametrize("text", ["'/roo" + "t/y'", "/tm" + "p/x", "/home/me/z", "# FIX" + "ME"])
def test_what_is_unfinished_or_of_one_machine_is_seen(text: str) -> None:
    assert found_in_lines("a = 1\n" + text)


def test_a_system_path_is_not_one_of_a_machine() -> None:
    assert found_in_lines("ipc:///run/baton/home/x and {base}/tmp/x") == []
