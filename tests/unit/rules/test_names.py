"""Class names: one meaning each, and the field's words instead of those of our own that they replaced."""

from collections import defaultdict
from collections.abc import Iterable

from tests.unit.rules.syntax import Module, code_files, module, parse

FORMER_NAMES = {
    "Flight": "Attempt, or InFlightStep",
    "Journey": "RoutedRequest",
    "Leg": "Branch",
    "Order": "PromptRequest, or RankCommand",
    "Seat": "WorkerLoad",
    "Seats": "LoadTracker",
    "Roster": "Membership",
    "Standing": "MemberState",
    "Fleet": "WorkerPool, or ChildSpecs",
    "WaitingRoom": "RetryQueue",
    "Sheet": "ResponseBuilder",
    "Heading": "header",
    "Preface": "echo",
    "WordEncoder": "AsciiBpeEncoder",
    "Work": "SequenceRequest",
    "Live": "RunningRequest",
    "Reserve": "ReserveKv",
    "Join": "StartDecode",
    "PushAgain": "RepushKv",
    "Holding": "KvLeaseExpiring",
    "Undelivered": "KvTransferFailed",
    "UnixWire": "Connection",
    "Parts": "WorkerContext",
    "Part": "HeadSlice",
    "PushParts": "a sender of head slices",
    "PullParts": "a receiver of head slices",
    "Mark": "Event",
    "Move": "Copy",
    "Moves": "CopyStream",
    "KvMoves": "KvCopier",
    "Account": "stats",
}
"""Former class names, and what is said instead."""


def defined_in(examples: Iterable[Module]) -> dict[str, list[str]]:
    places: dict[str, list[str]] = defaultdict(list)
    for example in examples:
        for line, name in example.classes():
            places[name].append(f"{example.name}:{line}")
    return places


def ambiguous(examples: Iterable[Module]) -> dict[str, list[str]]:
    """The names, private ones too, of classes that are defined in several files."""
    return {
        name: places
        for name, places in defined_in(examples).items()
        if len({place.split(":")[0] for place in places}) > 1
    }


def former(examples: Iterable[Module]) -> list[str]:
    return [
        f"{place}: {name}: say {FORMER_NAMES[name.lstrip('_')]}"
        for name, places in defined_in(examples).items()
        if name.lstrip("_") in FORMER_NAMES
        for place in places
    ]


def test_a_class_name_is_defined_in_one_file() -> None:
    assert ambiguous(module(path) for path in code_files()) == {}


def test_no_former_name_comes_back() -> None:
    assert former(module(path) for path in code_files()) == []


def test_a_second_file_with_a_name_is_seen() -> None:
    one = parse("class _Limits: ...\nclass Other: ...", "router/a.py")
    other = parse("def f():\n    class _Limits: ...", "kvtransfer/b.py")
    assert ambiguous([one, other]) == {"_Limits": ["router/a.py:1", "kvtransfer/b.py:2"]}


def test_a_name_twice_in_one_file_passes() -> None:
    assert ambiguous([parse("if a:\n    class A: ...\nelse:\n    class A: ...")]) == {}


def test_a_former_name_is_seen() -> None:
    assert former([parse("class _Journey: ...\nclass JourneyEnd: ...")]) == [
        "router/example.py:1: _Journey: say RoutedRequest"
    ]
