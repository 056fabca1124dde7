"""What is banned everywhere: what runs foreign bytes as code, and errors that nobody hears of."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.rules.syntax import Module, code_files, module, parse, relative

UNSAFE_MODULES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve")
UNSAFE_CALLS = ("eval", "exec", "compile", "__import__")
UNSAFE_ATTRIBUTES = (
    ("torch", "load"),
    ("torch", "save"),
    ("multiprocessing", "Queue"),
    ("multiprocessing", "Pipe"),
    ("multiprocessing", "Manager"),
    ("mp", "Queue"),
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
)
UNSAFE_METHODS = (
    "recv_pyobj",
    "send_pyobj",
    "broadcast_object_list",
    "all_gather_object",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
)
PICKLING_CHANNELS = ("multiprocessing.queues", "multiprocessing.managers", "multiprocessing.connection")
BENCHMARKS = "deploy/bench/"
"""They may use a pipe to a process that they started themselves, which nobody else can reach."""


def unsafe_uses(example: Module) -> list[str]:
    found = [
        f"{example.name}:{line} imports {name}"
        for line, name in example.imports()
        if name.split(".")[0] in UNSAFE_MODULES
        or (name.startswith(PICKLING_CHANNELS) and not example.name.startswith(BENCHMARKS))
        or any(name == f"{owner}.{attribute}" for owner, attribute in UNSAFE_ATTRIBUTES)
    ]
    for node in ast.walk(example.tree):
        if not isinstance(node, ast.Call):
            continue
        match node.func:
            case ast.Name(id=name) if name in UNSAFE_CALLS:
                found.append(f"{example.name}:{node.lineno} calls {name}")
            case ast.Attribute(value=ast.Name(id=owner), attr=attribute) if (
                owner,
                attribute,
            ) in UNSAFE_ATTRIBUTES:
                found.append(f"{example.name}:{node.lineno} calls {owner}.{attribute}")
            case ast.Attribute(attr=attribute) if attribute in UNSAFE_METHODS:
                found.append(f"{example.name}:{node.lineno} calls {attribute}")
    return found


def swallowed_errors(example: Module) -> list[str]:
    return [
        f"{example.name}:{node.lineno}: except: pass"
        for node in ast.walk(example.tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (len(node.body) == 1 and isinstance(node.body[0], ast.Pass)))
    ]


@pytest.mark.parametrize("path", code_files(), ids=relative)
def test_nothing_unsafe_and_nothing_swallowed(path: Path) -> None:
    assert unsafe_uses(module(path)) == []
    assert swallowed_errors(module(path)) == []


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("import pickle", unsafe_uses),
        ("from torch import load", unsafe_uses),
        ("import torch\ntorch.load('x')", unsafe_uses),
        ("eval('1')", unsafe_uses),
        ("socket.recv_pyobj()", unsafe_uses),
        ("from multiprocessing import Queue", unsafe_uses),
        ("try:\n    f()\nexcept ValueError:\n    pass", swallowed_errors),
        ("try:\n    f()\nexcept:\n    g()", swallowed_errors),
    ],
)
def test_the_rules_see_what_they_forbid(source: str, rule: Callable[[Module], list[str]]) -> None:
    assert rule(parse(source))


def test_the_rules_let_the_rest_pass() -> None:
    example = parse("import re\nre.compile('a')\ntry:\n    f()\nexcept ValueError:\n    g()")
    assert unsafe_uses(example) == swallowed_errors(example) == []
