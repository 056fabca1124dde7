"""Files that documents, comments, recipes and settings of the build name are there."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.rules.syntax import PACKAGES, ROOT, code_files, relative

DOCUMENTS = (
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "deploy").rglob("*.md")),
    ROOT / "README.md",
)
RECIPES = (
    ROOT / "Makefile",
    ROOT / "pyproject.toml",
    ROOT / ".ci/run",
    *sorted((ROOT / "docker").iterdir()),
    *sorted((ROOT / "deploy").glob("*.yaml")),
)
HISTORY = "docs/decisions.md"
"""It may name files that are gone; its links must work."""

LINK = re.compile(r"\]\((?!\w+://)([^)#\s]*)(?:#([^)\s]+))?\)")
FILE = re.compile(r"(?<![\w./{}*$-])((?:[\w-]+/)*[\w-]+\.(?:py|md))\b(?![/*])")
FOLDER = re.compile(rf"(?<![\w./{{}}-])((?:{'|'.join(PACKAGES)}|tests|docs|docker)/[\w./-]*\w)")
MODULE = re.compile(rf"(?<![\w./-])((?:{'|'.join(PACKAGES)}|tests)(?:\.[a-z_]\w*)+)")


def names_of_files() -> set[str]:
    """All files, and the folders that hold one; what the interpreter leaves behind makes no folder."""
    folders = (*PACKAGES, "tests", "docs", "docker")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files = [Path(relative(path)) for path in paths if path.parent.name != "__pycache__"]
    parents = {parent.as_posix() for path in files for parent in path.parents}
    return {path.as_posix() for path in files} | parents | {path.name for path in ROOT.iterdir()}


def lost_files(text: str) -> list[str]:
    """`line: name` of files, also by the end of their path, and of folders that are not there."""
    found = [
        f"{number}: {match[1]}"
        for number, line in enumerate(text.splitlines(), 1)
        for pattern, known in ((FILE, ENDS), (FOLDER, EXISTING))
        for match in pattern.finditer(line)
        if match[1] not in known and f"{match[1]}.py" not in known
    ]
    return list(dict.fromkeys(found))


def ends_of(name: str) -> Iterator[str]:
    """The name, and what follows each of its slashes."""
    while name:
        yield name
        name = name.partition("/")[2]


EXISTING = names_of_files()
ENDS = {end for name in EXISTING for end in ends_of(name)}


def lost_modules(text: str) -> list[str]:
    """`line: name` of dotted names whose modules are not there; a module is followed by anything in it."""
    return [
        f"{number}: {match[1]}"
        for number, line in enumerate(text.splitlines(), 1)
        for match in MODULE.finditer(line)
        if not is_module(match[1])
    ]


def is_module(name: str) -> bool:
    """The first part of the name that is no folder must be a file."""
    parts = name.split(".")
    path = ROOT / parts[0]
    for part in parts[1:]:
        if not (path / part).is_dir():
            return (path / f"{part}.py").is_file()
        path /= part
    return True


def lost_links(document: Path, text: str) -> list[str]:
    """Relative links to a file, or to a heading of one, that is not there."""
    found = []
    for match in LINK.finditer(text):
        target = document.parent / match[1]
        is_there = not match[1] or target.exists()
        if is_there and match[2]:
            is_there = match[2] in anchors(target.read_text(encoding="utf-8") if match[1] else text)
        if not is_there:
            found.append(match[0].removeprefix("]"))
    return found


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_links_of_documents_lead_somewhere(path: Path) -> None:
    assert lost_links(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if relative(p) != HISTORY], ids=relative)
def test_documents_name_files_that_are_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert lost_files(text) + lost_modules(text) == []


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_recipes_name_files_that_are_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert lost_files(text) + lost_modules(text) == []


@pytest.mark.parametrize("path", code_files(), ids=relative)
def test_code_names_files_that_are_there(path: Path) -> None:
    assert lost_files(path.read_text(encoding="utf-8")) == []


def test_images_copy_what_is_there() -> None:
    for path in sorted((ROOT / "docker").iterdir()):
        copied = re.findall(r"^COPY (?!--)(.+) \S+$", path.read_text(), re.MULTILINE)
        assert copied
        assert [name for line in copied for name in line.split() if not (ROOT / name).exists()] == []


def test_the_package_has_its_data() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    data = tool["setuptools"]["package-data"]
    patterns = [f"{package}/{pattern}" for package, some in data.items() for pattern in some]
    assert [pattern for pattern in patterns if not list(ROOT.glob(pattern))] == []
    files = {path for pattern in patterns for path in ROOT.glob(pattern)}
    needed = {path for package in PACKAGES for path in (ROOT / package).rglob("*") if is_data(path)}
    assert {relative(path) for path in needed - files} == set()


def is_data(path: Path) -> bool:
    return path.is_file() and path.suffix not in (".py", ".pyc")


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("see `policy.py` and `routing/policy.py`, in router/routing/", []),
        ("see `router/routing/nothing.py`", ["1: router/routing/nothing.py"]),
        ("\n`nothing.py`", ["2: nothing.py"]),
        ("services/nothing/ has it", ["1: services/nothing"]),
        ("router/*.py and {folder}/x.py", []),
    ],
)
def test_a_lost_file_is_seen(text: str, lost: list[str]) -> None:
    assert lost_files(text) == lost


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("python -m deploy.bench.router.router; router.errors.Refusal", []),
        ("python -m deploy.bench.nothing", ["1: deploy.bench.nothing"]),
        ("from router.static import x", ["1: router.static"]),
    ],
)
def test_a_lost_module_is_seen(text: str, lost: list[str]) -> None:
    assert lost_modules(text) == lost


def test_a_lost_link_is_seen() -> None:
    text = "# What\n[a](README.md) [b](https://x.y/z) [c](nothing.md) [d](#what) [e](#who) [f](README.md#who)"
    assert lost_links(ROOT / "x.md", text) == ["(nothing.md)", "(#who)", "(README.md#who)"]
