"""Who belongs to the cluster while lists change."""

import random

from router.routing.membership import Roster, Standing


def test_a_worker_counts_from_the_first_list_that_names_it() -> None:
    roster = Roster(["a"])
    assert roster.look(["a", "b", "c", "b"]) == ["b", "c"]
    assert roster.look(["a", "b", "c"]) == []
    assert [roster.standing(one) for one in "abcd"] == [*[Standing.MEMBER] * 3, None]


def test_it_leaves_with_the_second_list_in_a_row_without_it() -> None:
    roster = Roster(["a", "b"])
    roster.look(["a"])
    assert roster.standing("b") is Standing.MISSED
    assert roster.leaving == frozenset()
    roster.look(["a", "b"])  # the file was being written
    roster.look(["a"])
    assert roster.leaving == frozenset()
    roster.look(["a"])
    assert roster.leaving == {"b"}


def test_it_is_forgotten_once_nothing_runs_there() -> None:
    roster = Roster(["a", "b"])
    for _ in range(2):
        roster.look([])
    assert roster.release(["b"]) == ["a"]
    assert roster.standing("a") is None
    assert roster.leaving == {"b"}
    assert roster.look(["a"]) == ["a"], "it is new again"
    assert roster.release([]) == ["b"]


def test_one_that_is_listed_again_stays() -> None:
    roster = Roster(["a"])
    for _ in range(3):
        roster.look([])
    assert roster.look(["a"]) == [], "its client is still there"
    assert roster.leaving == frozenset()
    assert roster.release([]) == []


def test_nobody_leaves_while_listed_or_busy_whatever_comes() -> None:
    rng = random.Random(1)
    names = [f"w{number}" for number in range(6)]
    for _ in range(200):
        roster, there, absent = Roster(), set[str](), dict.fromkeys(names, 0)
        for _ in range(30):
            listed = rng.sample(names, rng.randrange(7))
            new = roster.look(listed)
            assert set(new) == set(listed) - there
            there |= set(new)
            for name in names:
                absent[name] = 0 if name in listed else absent[name] + 1
            assert roster.leaving == {name for name in there if absent[name] >= 2}
            busy = rng.sample(names, rng.randrange(7))
            gone = set(roster.release(busy))
            assert gone == {name for name in there if absent[name] >= 2} - set(busy)
            there -= gone
