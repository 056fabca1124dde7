"""The layers of kvtransfer: a folder or file imports its own layer and those below, never one above."""

import ast
from pathlib import Path

import kvtransfer

ROOT = Path(next(iter(kvtransfer.__path__)))
LAYERS = (
    ("errors", "config", "watched", "stop_signal"),
    ("messages", "spans"),
    ("protocol",),
    ("net",),
    ("buffer",),
    ("movers",),
    ("peers",),
    ("codecs", "stats", "open_transfers", "worker_port", "client", "process"),
)
"""Lowest first. `stats` and `codecs` are on top, since they collect from all the others."""
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
MAX_FILES = 20


def imported(path: Path) -> set[str]:
    """The parts of kvtransfer that a file imports: the folder's or the file's name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("kvtransfer.")}


def test_no_layer_imports_one_above() -> None:
    upward = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted(ROOT.rglob("*.py"))
        for name in sorted(imported(path))
        if path.name != "__init__.py"
        and LEVELS[name] > LEVELS[path.relative_to(ROOT).parts[0].removesuffix(".py")]
    ]
    assert upward == []


def test_no_folder_is_crowded() -> None:
    folders = {path.parent for path in ROOT.rglob("*.py")}
    assert {str(f): n for f in folders if (n := len(list(f.glob("*.py")))) >= MAX_FILES} == {}
