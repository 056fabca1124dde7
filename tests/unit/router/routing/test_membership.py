"""Who belongs to the cluster while lists change."""

import random

from router.routing.membership import Membership, MemberState


def test_a_worker_counts_from_the_first_list_that_names_it() -> None:
    membership = Membership(["a"])
    assert membership.update(["a", "b", "c", "b"]) == ["b", "c"]
    assert membership.update(["a", "b", "c"]) == []
    assert [membership.state(one) for one in "abcd"] == [*[MemberState.MEMBER] * 3, None]


def test_it_leaves_with_the_second_list_in_a_row_without_it() -> None:
    membership = Membership(["a", "b"])
    membership.update(["a"])
    assert membership.state("b") is MemberState.MISSED
    assert membership.leaving == frozenset()
    membership.update(["a", "b"])  # the file was being written
    membership.update(["a"])
    assert membership.leaving == frozenset()
    membership.update(["a"])
    assert membership.leaving == {"b"}


def test_it_is_forgotten_once_nothing_runs_there() -> None:
    membership = Membership(["a", "b"])
    for _ in range(2):
        membership.update([])
    assert membership.release(["b"]) == ["a"]
    assert membership.state("a") is None
    assert membership.leaving == {"b"}
    assert membership.update(["a"]) == ["a"], "it is new again"
    assert membership.release([]) == ["b"]


def test_one_that_is_listed_again_stays() -> None:
    membership = Membership(["a"])
    for _ in range(3):
        membership.update([])
    assert membership.update(["a"]) == [], "its client is still there"
    assert membership.leaving == frozenset()
    assert membership.release([]) == []


def test_nobody_leaves_while_listed_or_busy_whatever_comes() -> None:
    rng = random.Random(1)
    names = [f"w{number}" for number in range(6)]
    for _ in range(200):
        membership, there, absent = Membership(), set[str](), dict.fromkeys(names, 0)
        for _ in range(30):
            listed = rng.sample(names, rng.randrange(7))
            new = membership.update(listed)
            assert set(new) == set(listed) - there
            there |= set(new)
            for name in names:
                absent[name] = 0 if name in listed else absent[name] + 1
            assert membership.leaving == {name for name in there if absent[name] >= 2}
            busy = rng.sample(names, rng.randrange(7))
            gone = set(membership.release(busy))
            assert gone == {name for name in there if absent[name] >= 2} - set(busy)
            there -= gone
