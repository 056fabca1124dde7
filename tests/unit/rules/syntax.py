"""The syntax trees that the rules are checked over."""

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
PACKAGES = ("router", "services", "kvtransfer", "deploy")


@dataclass(frozen=True)
class Module:
    """`name` is the path from the root, like `router/errors.py`."""

    name: str
    tree: ast.Module

    def imports(self) -> Iterator[tuple[int, str]]:
        """`(line, dotted name)` of everything imported, wherever in the file it stands."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield node.lineno, alias.name
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parents = self.name.split("/")[: -node.level]
                    base = ".".join([*parents, base]).rstrip(".")
                for alias in node.names:
                    yield node.lineno, f"{base}.{alias.name}"

    def classes(self) -> Iterator[tuple[int, str]]:
        """`(line, name)` of every class, wherever in the file it stands."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ClassDef):
                yield node.lineno, node.name


def parse(source: str, name: str = "router/example.py") -> Module:
    return Module(name, ast.parse(source))


def code_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def all_files() -> list[Path]:
    return [*code_files(), *sorted((ROOT / "tests").rglob("*.py"))]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def module(path: Path) -> Module:
    return parse(path.read_text(encoding="utf-8"), relative(path))
