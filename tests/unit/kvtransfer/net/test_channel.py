"""Sockets: who may connect where, what is dropped, what is left behind."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from kvtransfer.codecs import WORKER_COMMANDS, WORKER_EVENTS
from kvtransfer.errors import TransferConfigError
from kvtransfer.messages import AttachRefused, Command, Commit, Event, NotAttached
from kvtransfer.net import codec
from kvtransfer.net.channel import ChannelKeys, Link, Server, write_new_keys
from tests.patience import patient

WAIT_MS = int(patient(20_000))


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="baton-") as path:  # Mode 0700, and short.
        yield Path(path)


def new_server(endpoint: str, drops: list[str], keys: ChannelKeys | None = None) -> Server[Command, Event]:
    return Server(endpoint, WORKER_COMMANDS, WORKER_EVENTS, keys=keys, on_drop=drops.append)


def new_link(endpoint: str, drops: list[str], keys: ChannelKeys | None = None) -> Link[Event, Command]:
    return Link(endpoint, WORKER_EVENTS, WORKER_COMMANDS, keys=keys, on_drop=drops.append)


def exchange(server: Server[Command, Event], link: Link[Event, Command]) -> None:
    assert link.send([Commit(1), Commit(2)])
    assert server.socket.poll(WAIT_MS)
    [(peer, messages)] = server.receive()
    assert messages == [Commit(1), Commit(2)]
    assert server.receive() == []
    assert server.send(peer, [NotAttached(3)])
    assert link.socket.poll(WAIT_MS)
    assert link.receive() == [NotAttached(3)]
    assert link.receive() == []


def test_both_ways_over_ipc_and_nothing_left(directory: Path) -> None:
    drops: list[str] = []
    for _ in range(2):  # The second finds the path free again.
        server = new_server(f"ipc://{directory}/s", drops)
        link = new_link(server.endpoint, drops)
        exchange(server, link)
        link.close()
        server.close()
        server.close()
        assert list(directory.iterdir()) == []
    assert drops == []


def test_a_stale_path_is_taken_over_a_live_one_is_not(directory: Path) -> None:
    endpoint = f"ipc://{directory}/s"
    first = new_server(endpoint, [])
    with pytest.raises(TransferConfigError, match="another process is listening"):
        new_server(endpoint, [])
    link = new_link(endpoint, [])
    exchange(first, link)
    link.close()
    first.close()


def test_sending_to_nobody_is_no_error(directory: Path) -> None:
    server = new_server(f"ipc://{directory}/s", [])
    assert not server.send(b"nobody", [NotAttached(1)])
    server.close()


def test_malformed_frames_are_dropped_and_reported(directory: Path) -> None:
    drops: list[str] = []
    server = new_server(f"ipc://{directory}/s", drops)
    with zmq.Context() as context, context.socket(zmq.DEALER) as raw:
        raw.connect(server.endpoint)
        for parts in ([b""], [b"\xff123"], [b"\x01garbage"], [b"\x01\x90", b"more"], [b"\x01\x90"]):
            raw.send_multipart(parts)
        arrived = []
        while len(drops) + len(arrived) < 5:
            assert server.socket.poll(WAIT_MS)
            arrived.extend(server.receive())
        raw.setsockopt(zmq.LINGER, 0)
    assert [messages for _, messages in arrived] == [[]]
    assert drops == ["malformed_frame", "other_version", "malformed_frame", "malformed_frame"]
    server.close()


def test_another_protocol_version_is_named_to_both(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drops: list[str] = []
    seen: list[str] = []

    def refusal(why: str) -> Event:
        seen.append(why)
        return AttachRefused(why)

    server: Server[Command, Event] = Server(
        f"ipc://{directory}/s", WORKER_COMMANDS, WORKER_EVENTS, on_drop=drops.append, refusal=refusal
    )
    link = new_link(server.endpoint, drops)
    with monkeypatch.context() as newer:
        newer.setattr(codec, "PROTOCOL_VERSION", 7)
        link.send([Commit(1)])
    assert server.socket.poll(WAIT_MS)
    assert server.receive() == []
    with monkeypatch.context() as newer:
        newer.setattr(codec, "PROTOCOL_VERSION", 7)
        assert link.socket.poll(WAIT_MS)
        assert link.receive() == []
    assert seen == ["protocol version 7, this side speaks 1"]
    assert link.mismatch == "protocol version 1, this side speaks 7"
    assert drops == ["other_version", "other_version"]
    link.close()
    server.close()


def test_one_receive_is_bounded(directory: Path) -> None:
    server = new_server(f"ipc://{directory}/s", [])
    link = new_link(server.endpoint, [])
    for number in range(1, 601):
        assert link.send([Commit(number)])
    sizes, got = [], []
    while len(got) < 600:
        assert server.socket.poll(WAIT_MS)
        batch = server.receive()
        sizes.append(len(batch))
        got.extend(message for _, messages in batch for message in messages)
    assert max(sizes) <= 256
    assert got == [Commit(number) for number in range(1, 601)]
    link.close()
    server.close()


def test_open_directories_and_odd_endpoints_are_refused(directory: Path) -> None:
    directory.chmod(0o755)
    with pytest.raises(TransferConfigError, match="mode 755"):
        new_server(f"ipc://{directory}/s", [])
    with pytest.raises(TransferConfigError, match="mode 755"):
        new_link(f"ipc://{directory}/s", [])
    directory.chmod(0o700)
    for endpoint in ("ipc://relative", "udp://x", "inproc://x", "nonsense", f"ipc://{directory}/{'x' * 108}"):
        with pytest.raises(TransferConfigError):
            new_server(endpoint, [])
    with pytest.raises(TransferConfigError, match="cannot be used"):
        new_server(f"ipc://{directory}/missing/s", [])


def test_tcp_needs_keys(directory: Path) -> None:
    with pytest.raises(TransferConfigError, match="CURVE"):
        new_server("tcp://127.0.0.1:0", [])
    with pytest.raises(TransferConfigError, match="CURVE"):
        new_link("tcp://127.0.0.1:1", [])


def test_tcp_with_one_pair_for_all(directory: Path) -> None:
    write_new_keys(directory / "keys")
    keys = ChannelKeys.load(directory / "keys")
    server = new_server("tcp://127.0.0.1:0", [], keys)
    assert server.endpoint.endswith("#baton") and ":0#" not in server.endpoint
    link = new_link(server.endpoint, [], keys)
    exchange(server, link)
    link.close()
    server.close()


def test_tcp_refuses_who_is_not_allowed(directory: Path) -> None:
    ours = write_new_keys(directory / "ours", "one")
    write_new_keys(directory / "theirs", "two")
    server = new_server("tcp://127.0.0.1:0", [], ChannelKeys.load(directory / "ours"))
    with pytest.raises(TransferConfigError, match="no key named 'one'"):
        new_link(server.endpoint, [], ChannelKeys.load(directory / "theirs"))
    shutil.copy(ours, directory / "theirs" / "allowed")
    stranger = new_link(server.endpoint, [], ChannelKeys.load(directory / "theirs"))
    friend = new_link(server.endpoint, [], ChannelKeys.load(directory / "ours"))
    stranger.send([Commit(7)])
    exchange(server, friend)  # By then the stranger, which was first, would have been received.
    assert not server.socket.poll(200)
    stranger.close()
    friend.close()
    server.close()


def test_keys_are_private_and_never_replaced(directory: Path) -> None:
    key_dir = directory / "keys"
    write_new_keys(key_dir)
    assert (key_dir / "baton.key_secret").stat().st_mode & 0o077 == 0
    with pytest.raises(TransferConfigError, match="already"):
        write_new_keys(key_dir)
    with pytest.raises(TransferConfigError, match="key name"):
        write_new_keys(directory / "other", "../evil")
    key_dir.chmod(0o750)
    with pytest.raises(TransferConfigError, match="mode 750"):
        ChannelKeys.load(key_dir)
