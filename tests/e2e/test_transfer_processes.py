"""Two transfer processes over NIXL, as real processes: data, deaths, halts, restarts, leftovers."""

import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import kvtransfer.client
from kvtransfer.client import TransferClient
from kvtransfer.errors import AttachError
from kvtransfer.messages import VERSION, TransferAddress
from tests.e2e.transfer_pair import (
    GEOMETRY,
    SLOT_BYTES,
    SLOTS,
    TransferPair,
    Worker,
    content_of,
    drive,
)

TOKENS = 700
"""About twenty segments: several times what the slots hold."""


def start_pair() -> Iterator[TransferPair]:
    with tempfile.TemporaryDirectory(prefix="baton-") as directory:
        pair = TransferPair(Path(directory))
        try:
            pair.start("prefill")
            pair.start("decode")
            yield pair
        finally:
            pair.close()


def attach(pair: TransferPair) -> Iterator[tuple[Worker, Worker]]:
    prefill = Worker(pair.directory, "prefill", epoch=11)
    decode = Worker(pair.directory, "decode", epoch=12)
    yield prefill, decode
    prefill.client.close()
    decode.client.close()


@pytest.fixture
def pair() -> Iterator[TransferPair]:
    """Processes of the test's own, to be killed as it likes."""
    yield from start_pair()


@pytest.fixture
def workers(pair: TransferPair) -> Iterator[tuple[Worker, Worker]]:
    yield from attach(pair)


@pytest.fixture(scope="module")
def shared_pair() -> Iterator[TransferPair]:
    """Processes that outlive every test: each finds what the ones before have left. Transfer ids are never
    used twice, so each test has its own."""
    yield from start_pair()


@pytest.fixture
def shared_workers(shared_pair: TransferPair) -> Iterator[tuple[Worker, Worker]]:
    yield from attach(shared_pair)


def move(prefill: Worker, decode: Worker, transfer_id: int, tokens: int = TOKENS) -> None:
    content = content_of(tokens, transfer_id)
    decode.receive(transfer_id, prefill, tokens)
    prefill.send(transfer_id, content)
    drive([prefill, decode], lambda: transfer_id in prefill.committed, f"commit of {transfer_id}")
    assert decode.got[transfer_id] == content


def all_free(*workers: Worker) -> None:
    for worker in workers:
        worker.client.last_stats = None
    drive(list(workers), lambda: all(w.all_free() for w in workers), "every slot is free again")


def test_data_arrives_whole_and_nothing_is_left(pair: TransferPair, workers: tuple[Worker, Worker]) -> None:
    prefill, decode = workers
    for transfer_id in (1, 2, 3):
        move(prefill, decode, transfer_id)
    move(prefill, decode, 4, tokens=0 + 1)
    all_free(prefill, decode)
    stats = prefill.client.last_stats
    assert stats is not None and stats.moved_bytes == (3 * TOKENS + 1) * GEOMETRY.token_bytes
    assert stats.staging_resident_bytes == SLOTS * SLOT_BYTES
    assert stats.pid == pair.processes["prefill"].pid
    assert pair.terminate("prefill") == 0
    assert pair.terminate("decode") == 0
    assert list(pair.directory.iterdir()) == []


def test_many_transfers_both_ways_at_once(shared_workers: tuple[Worker, Worker]) -> None:
    prefill, decode = shared_workers
    contents = {transfer_id: content_of(300, transfer_id) for transfer_id in range(1, 13)}
    for transfer_id, content in contents.items():
        source, target = (prefill, decode) if transfer_id % 2 else (decode, prefill)
        target.receive(transfer_id, source, 300)
        source.send(transfer_id, content)
    drive([prefill, decode], lambda: len(prefill.committed | decode.committed) == 12, "all committed")
    got = prefill.got | decode.got
    assert {transfer_id: bytes(data) for transfer_id, data in got.items()} == contents
    all_free(prefill, decode)


def test_descriptors_do_not_leak(shared_pair: TransferPair, shared_workers: tuple[Worker, Worker]) -> None:
    prefill, decode = shared_workers
    process = psutil.Process(shared_pair.processes["prefill"].pid)
    move(prefill, decode, 100)
    before = process.num_fds()
    for transfer_id in range(101, 111):
        move(prefill, decode, transfer_id, tokens=5)
    assert process.num_fds() <= before


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_killed_peer_ends_the_transfer_and_frees_the_slots(
    pair: TransferPair, workers: tuple[Worker, Worker], victim: str
) -> None:
    prefill, decode = workers
    survivor, dead = (decode, prefill) if victim == "prefill" else (prefill, decode)
    decode.paused = True  # Grants are used up, and the transfer stands still half-way.
    decode.receive(1, prefill, TOKENS)
    prefill.send(1, content_of(TOKENS, 1))
    drive([prefill, decode], lambda: prefill.sent_tokens[1] > 0, "the first segments are packed")
    pair.kill(victim)
    drive([survivor], lambda: 1 in survivor.aborted, "the survivor hears of it")
    if survivor is prefill:
        all_free(prefill)
    decode.paused = False

    # Back at the same address: the worker notices, and transfers work again.
    pair.start(victim)
    drive([prefill, decode], lambda: bool(dead.lost) and dead.client.ready, "attached to the new life")
    if survivor is prefill:
        move(prefill, decode, 2)
    else:
        move(prefill, decode, 2, tokens=5)


def test_slots_granted_to_a_killed_sender_become_free(
    pair: TransferPair, workers: tuple[Worker, Worker]
) -> None:
    prefill, decode = workers
    prefill.paused = True  # Holds the lent slots, so that the grants stay open.
    decode.receive(1, prefill, TOKENS)
    prefill.send(1, content_of(TOKENS, 1))
    stats = decode.client
    drive(
        [prefill, decode],
        lambda: stats.last_stats is not None and stats.last_stats.counts.granted > 0,
        "slots are granted",
    )
    pair.kill("prefill")
    drive([decode], lambda: 1 in decode.aborted, "the transfer ends")
    all_free(decode)


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_stopped_peer_ends_the_transfer_and_recovers(
    pair: TransferPair, workers: tuple[Worker, Worker], victim: str
) -> None:
    prefill, decode = workers
    move(prefill, decode, 1)
    prefill.paused = True
    decode.receive(2, prefill, TOKENS)
    prefill.send(2, content_of(TOKENS, 2))
    stats = decode.client
    drive(
        [prefill, decode],
        lambda: stats.last_stats is not None and stats.last_stats.counts.granted > 0,
        "slots are granted",
    )
    pair.signal(victim, signal.SIGSTOP)
    survivor = decode if victim == "prefill" else prefill
    drive([survivor], lambda: 2 in survivor.aborted, "silence is noticed")
    if survivor is decode:
        decode.client.last_stats = None
        drive([decode], lambda: decode.client.last_stats is not None, "statistics")
        # A stopped sender may yet write: its grants must not be given to another.
        assert decode.client.last_stats is not None
        assert decode.client.last_stats.counts.quarantined > 0
    pair.signal(victim, signal.SIGCONT)
    drive([prefill, decode], lambda: 2 in prefill.aborted and 2 in decode.aborted, "both have heard")
    prefill.paused = False
    all_free(prefill, decode)
    move(prefill, decode, 3)


def test_deadline_ends_a_transfer_nobody_sends(shared_workers: tuple[Worker, Worker]) -> None:
    prefill, decode = shared_workers
    decode.receive(200, prefill, TOKENS, deadline_s=0.3)
    drive([prefill, decode], lambda: 200 in decode.aborted, "the deadline")
    assert decode.aborted[200] == "deadline"
    all_free(prefill, decode)


def test_wrong_life_and_dead_address_are_refused(
    shared_workers: tuple[Worker, Worker], shared_pair: TransferPair
) -> None:
    prefill, decode = shared_workers
    address = prefill.client.address
    dead = TransferAddress(f"ipc://{shared_pair.directory}/nobody", 5)
    decode.got.clear()
    decode.client.open_receive(300, TransferAddress(address.endpoint, address.epoch + 1), 0, 5, 30.0)
    decode.client.open_receive(301, dead, 0, 5, 30.0)
    decode.client.flush()
    drive([prefill, decode], lambda: {300, 301} <= decode.aborted.keys(), "both are refused")
    all_free(prefill, decode)


def test_a_new_worker_takes_over_from_a_dead_one_only(
    shared_pair: TransferPair, shared_workers: tuple[Worker, Worker]
) -> None:
    prefill, decode = shared_workers
    endpoint = f"ipc://{shared_pair.directory}/prefill.worker"
    with pytest.raises(AttachError, match="another worker"):
        TransferClient(endpoint, 99, GEOMETRY, timeout_s=0.5)
    prefill.paused = True
    decode.receive(400, prefill, TOKENS)
    prefill.send(400, content_of(TOKENS, 400))
    stats = prefill.client
    drive(
        [prefill, decode],
        lambda: stats.last_stats is not None and stats.last_stats.counts.granted > 0,
        "slots are lent",
    )
    prefill.client.close()
    heir = Worker(shared_pair.directory, "prefill", epoch=100)
    try:
        drive([heir, decode], lambda: 400 in decode.aborted, "the destination hears of the death")
        all_free(heir, decode)
        move(heir, decode, 401)
    finally:
        heir.client.close()


def test_the_staging_buffer_cannot_be_resized_by_the_worker(shared_pair: TransferPair) -> None:
    worker = Worker(shared_pair.directory, "prefill", epoch=1)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as guest:
            guest.connect(f"{shared_pair.directory}/prefill.staging")
            _, fds, _, _ = socket.recv_fds(guest, 16, 1)
        assert os.fstat(fds[0]).st_size == SLOTS * SLOT_BYTES
        with pytest.raises(PermissionError):
            os.ftruncate(fds[0], 1)
        os.close(fds[0])
    finally:
        worker.client.close()


def test_a_worker_of_another_version_is_refused(
    shared_pair: TransferPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvtransfer.client, "VERSION", "0.0.9")
    endpoint = f"ipc://{shared_pair.directory}/prefill.worker"
    with pytest.raises(AttachError, match=rf"this transfer process is version {VERSION}, the worker 0\.0\.9"):
        TransferClient(endpoint, 200, GEOMETRY, timeout_s=0.5)
