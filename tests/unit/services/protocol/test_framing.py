"""Frames of a byte stream, however it is cut."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.errors import ProtocolError
from services.protocol.framing import FrameSplitter, FrameTooLong, with_length

LIMIT_BYTES = 1 << 20
FRAMES = [b"a", b"b" * 255, b"c" * 256, b"", b"d" * 70_000]


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    ends = [*sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise([0, *ends])]


def split(parts: list[bytes], limit_bytes: int = LIMIT_BYTES) -> list[bytes]:
    splitter = FrameSplitter(limit_bytes)
    return [frame for part in parts for frame in splitter.feed(part)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 64, 1000, 1 << 20])
def test_frames_do_not_depend_on_how_the_bytes_come(size: int) -> None:
    stream = b"".join(map(with_length, FRAMES))
    assert split([stream[at : at + size] for at in range(0, len(stream), size)]) == FRAMES


@given(st.lists(st.binary(max_size=300), max_size=8), st.lists(st.integers(0, 2500), max_size=12))
def test_any_frames_survive_any_cuts(frames: list[bytes], cuts: list[int]) -> None:
    assert split(pieces(b"".join(map(with_length, frames)), cuts)) == frames


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=6))
def test_any_bytes_mean_the_same_however_they_are_cut_or_are_refused(data: bytes, cuts: list[int]) -> None:
    def outcome(parts: list[bytes]) -> tuple[list[bytes], bool]:
        splitter, frames = FrameSplitter(64), list[bytes]()
        try:
            for part in parts:
                frames.extend(splitter.feed(part))
        except FrameTooLong:
            return frames, True
        return frames, False

    whole, refused = outcome([data])
    cut_up, cut_up_refused = outcome(pieces(data, cuts))
    assert refused == cut_up_refused
    # What one piece held before the length that is too long may have been taken already, or not yet.
    assert whole == cut_up or refused


def test_a_frame_may_have_just_the_limit() -> None:
    assert split([with_length(b"x" * 10)], limit_bytes=10) == [b"x" * 10]


@pytest.mark.parametrize(
    "stream",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        b"\xff" * 4,
        (LIMIT_BYTES + 1).to_bytes(4, "little"),
    ],
)
def test_a_length_over_the_limit_is_refused_before_the_frame_has_come(stream: bytes) -> None:
    splitter = FrameSplitter(LIMIT_BYTES)
    frames = splitter.feed(with_length(b"before") + stream)
    assert next(frames) == b"before"
    with pytest.raises(FrameTooLong, match=f"over the limit of {LIMIT_BYTES}") as raised:
        next(frames)
    assert isinstance(raised.value, ProtocolError)
