"""The link between two ranks: whole messages from any pieces, and an end for everything else."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.config import WorkerConfig
from services.tensor_parallel.link import RankLink, RankLost
from services.tensor_parallel.messages import (
    Answer,
    Copied,
    CopyPages,
    Done,
    Grown,
    RankCommand,
    Step,
    StepRow,
    decode_config,
    encode_config,
)

Links = tuple[RankLink[Answer, RankCommand], RankLink[RankCommand, Answer], socket.socket]


@pytest.fixture
def links() -> Iterator[Links]:
    ours, theirs = socket.socketpair()
    yield RankLink(ours, Answer, RankCommand), RankLink(theirs, RankCommand, Answer), ours
    ours.close()
    theirs.close()


def test_messages_come_whole_and_in_order(links: Links) -> None:
    leader, rank, raw = links
    step = Step([Grown(3, 0, list(range(5000)))], [StepRow([1, 2], 0, 3, 1, [], -1)])
    frame = leader.encode(step)
    for at in range(0, len(frame), 1000):
        assert rank.poll() is None
        raw.sendall(frame[at : at + 1000])
    leader.send(CopyPages([(1, 2)]))
    assert [rank.receive(1.0), rank.receive(1.0)] == [step, CopyPages([(1, 2)])]
    rank.send(Done(5))
    rank.send(Copied(None))
    assert (leader.poll(1.0), leader.receive(1.0), leader.poll()) == (Done(5), Copied(None), None)


def test_silence_garbage_and_an_end_are_a_lost_rank(links: Links) -> None:
    leader, rank, raw = links
    with pytest.raises(RankLost, match=r"no word from it for 0\.01 s"):
        rank.receive(0.01)
    raw.sendall(b"\xff\xff\xff\xff")
    with pytest.raises(RankLost, match="is too long"):
        rank.poll(1.0)
    rank.close()
    with pytest.raises(RankLost):
        leader.receive(None)
    with pytest.raises(RankLost, match="takes no commands"):
        for _ in range(2):
            leader.send(CopyPages([]))


def test_an_answer_is_no_command(links: Links) -> None:
    _, rank, raw = links
    raw.sendall(rank.encode(Done(1)))
    with pytest.raises(RankLost, match="malformed frame"):
        rank.receive(1.0)


def test_a_configuration_arrives_as_it_left() -> None:
    config = WorkerConfig("w", "decode", Path("models/m"), "ipc:///x", ("ipc:///a", "ipc:///b"), tp=2, rank=1)
    assert decode_config(encode_config(config)) == config
