"""Which memory a table gets, on plain memory and with launches that end when the test says so; pinned and
beside a device in tests/gpu/test_moves.py."""

from array import array
from typing import Any

import pytest
import torch
from torch import Tensor

from services.engine.kv import pinned_ring as table_ring
from services.engine.kv.pinned_ring import FIRST_WORDS, TableRing

FIRST_TABLES = 8


class Launch:
    is_done = False

    def query(self) -> bool:
        return self.is_done


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> TableRing:
    def plain(self: TableRing, tables: int, words: int) -> Any:
        hosts = torch.zeros(tables, words, dtype=torch.int32)
        return [table_ring._Entry(host.numpy(), host, host.clone()) for host in hosts]

    monkeypatch.setattr(TableRing, "_new", plain)
    return TableRing(torch.device("cuda"), FIRST_TABLES)


def send(ring: TableRing, *numbers: int) -> tuple[Tensor, Launch]:
    sent, launch = ring.send(array("i", numbers)), Launch()
    ring.used(launch)  # type: ignore[arg-type]
    return sent, launch


def test_a_table_stays_until_its_launch_is_done(ring: TableRing) -> None:
    flights = [send(ring, number, -number) for number in range(3 * FIRST_TABLES)]
    assert [sent[:2].tolist() for sent, _ in flights] == [[number, -number] for number in range(len(flights))]
    assert len(ring) == len(flights), "there is more when all of it is read"
    for _, launch in flights:
        launch.is_done = True
    places = {sent.data_ptr() for sent, _ in flights}
    again = [send(ring, 7)[0] for _ in flights]
    assert {sent.data_ptr() for sent in again} == places and len(ring) == len(flights)


def test_only_the_oldest_is_asked(ring: TableRing) -> None:
    first, *others = [send(ring, number) for number in range(FIRST_TABLES)]
    for _, launch in others:
        launch.is_done = True
    assert send(ring, 9)[0].data_ptr() not in {sent.data_ptr() for sent, _ in (first, *others)}
    first[1].is_done = True
    assert send(ring, 9)[0].data_ptr() == first[0].data_ptr()


def test_a_longer_table_takes_the_place_of_the_one_whose_turn_it_is(ring: TableRing) -> None:
    sent, launch = send(ring, *range(FIRST_WORDS + 1))
    assert sent.tolist() == [*range(FIRST_WORDS + 1), *[0] * (FIRST_WORDS - 1)]
    assert len(ring) == FIRST_TABLES
    launch.is_done = True
    lengths = []
    for _ in range(FIRST_TABLES):
        sent, launch = send(ring, 1)
        launch.is_done = True
        lengths.append(len(sent))
    assert lengths == [FIRST_WORDS] * (FIRST_TABLES - 1) + [2 * FIRST_WORDS]


def test_a_launch_that_failed_leaves_no_table_behind(ring: TableRing) -> None:
    for _ in range(2 * FIRST_TABLES):
        ring.send(array("i", [1]))
    send(ring, 2)
    assert len(ring) <= FIRST_TABLES
    assert ring.send(array("i", [3]))[:1].tolist() == [3]


def test_on_a_cpu_the_table_is_its_words() -> None:
    ring, words = TableRing(torch.device("cpu"), FIRST_TABLES), array("i", [4, 5])
    sent = ring.send(words)
    ring.used(None)
    words[0] = 6
    assert sent.tolist() == [6, 5] and len(ring) == 0
