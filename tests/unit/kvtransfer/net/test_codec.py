"""Nothing but ProtocolError comes out of decoding, whatever goes in."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.codecs import PEER_MESSAGES, WORKER_COMMANDS
from kvtransfer.errors import ProtocolError, VersionMismatch
from kvtransfer.messages import Abort, Command, Commit, Filled, OpenSend, Segment, SendReady, SlotUse
from kvtransfer.net.codec import PROTOCOL_VERSION, Codec
from kvtransfer.protocol.peer_messages import Closed, Grant, PeerConnection, PeerMessage

VERSION = bytes((PROTOCOL_VERSION,))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("type"), inner),
    max_leaves=12,
)
MESSAGES: list[Command] = [
    OpenSend(5, 1.5),
    Filled(5, [Segment(0, 1, 0, 4, 16, None), Segment(1, 2, 4, 4, 16, 77)]),
    SendReady(5),
    Commit(2**63 - 1),
    Abort(1, "a reason"),
]


def test_round_trip() -> None:
    assert WORKER_COMMANDS.decode(WORKER_COMMANDS.encode(MESSAGES)) == MESSAGES


@given(st.binary(max_size=200))
def test_random_bytes(frame: bytes) -> None:
    for codec in (WORKER_COMMANDS, PEER_MESSAGES):
        for prefix in (b"", VERSION):
            try:
                codec.decode(prefix + frame)
            except ProtocolError:
                continue


@given(PLAIN)
def test_random_values(value: object) -> None:
    try:
        messages = WORKER_COMMANDS.decode(VERSION + msgspec.msgpack.encode([value]))
    except ProtocolError:
        return
    assert msgspec.to_builtins(messages) == [value]


@given(st.data())
def test_damaged_frames(data: st.DataObject) -> None:
    frame = bytearray(WORKER_COMMANDS.encode(MESSAGES))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        WORKER_COMMANDS.decode(bytes(frame[: data.draw(st.integers(0, len(frame)))]))
    except ProtocolError:
        return


@given(st.data())
def test_no_changed_frame_passes_its_seal(data: st.DataObject) -> None:
    messages: list[PeerMessage] = [PeerConnection(3), Grant(7, [SlotUse(0, 2)]), Closed(7)]
    frame = bytearray(PEER_MESSAGES.encode(messages))
    assert PEER_MESSAGES.decode(bytes(frame)) == messages
    for at in data.draw(st.sets(st.integers(0, len(frame) - 1), min_size=1, max_size=4)):
        frame[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ProtocolError):
        PEER_MESSAGES.decode(bytes(frame))
    with pytest.raises(ProtocolError):
        PEER_MESSAGES.decode(bytes(frame[: data.draw(st.integers(0, len(frame) - 1))]))


@pytest.mark.parametrize(
    "message",
    [
        {"type": "commit", "transfer_id": 0},
        {"type": "commit", "transfer_id": 2**63},
        {"type": "commit", "transfer_id": "1"},
        {"type": "commit", "transfer_id": 1, "extra": 1},
        {"type": "commit"},
        {"type": "no such thing"},
        {"type": "open_send", "transfer_id": 1, "deadline_s": float("nan")},
        {"type": "open_send", "transfer_id": 1, "deadline_s": -1.0},
        {"type": "abort", "transfer_id": 1, "reason": "x" * 1025},
        {"type": "freed", "slots": [[2**20, 1]]},
        {"type": "freed", "slots": [[0, 1]] * 4097},
    ],
)
def test_bounds_are_enforced(message: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        WORKER_COMMANDS.decode(VERSION + msgspec.msgpack.encode([message]))


def test_deep_nesting_and_false_lengths() -> None:
    for frame in (b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xa1\xff"):
        with pytest.raises(ProtocolError):
            WORKER_COMMANDS.decode(VERSION + frame)


def test_another_version_is_told_apart() -> None:
    frame = bytearray(WORKER_COMMANDS.encode(MESSAGES))
    frame[0] = PROTOCOL_VERSION + 1
    with pytest.raises(VersionMismatch):
        WORKER_COMMANDS.decode(bytes(frame))


def test_frame_size_limit_both_ways() -> None:
    codec: Codec[Command] = Codec(Command, max_frame_bytes=64)
    frame = WORKER_COMMANDS.encode(MESSAGES)
    with pytest.raises(ProtocolError, match="limit"):
        codec.decode(frame)
    with pytest.raises(ProtocolError, match="limit"):
        codec.encode(MESSAGES)


@given(st.lists(st.sampled_from(MESSAGES) | PLAIN, max_size=6))
def test_messages_that_are_none_cost_the_others_nothing(mixed: list[object]) -> None:
    good = [one for one in mixed if isinstance(one, msgspec.Struct)]
    values = [value for value in mixed if not isinstance(value, msgspec.Struct)]
    bad: list[object] = []
    frame = VERSION + msgspec.msgpack.encode(mixed)
    try:
        found = WORKER_COMMANDS.decode_each(frame, lambda content, why: bad.append(content))
    except ProtocolError:
        assert mixed and not good
        found = []
    assert found == good
    assert msgspec.msgpack.encode(bad) == msgspec.msgpack.encode(values)


def test_a_frame_that_is_none_is_refused_as_a_whole() -> None:
    for frame in (b"", b"\x00\x90", VERSION + b"\x93\x01", VERSION + b"\x81\x01\x02"):
        with pytest.raises(ProtocolError):
            WORKER_COMMANDS.decode_each(frame, lambda content, why: None)
