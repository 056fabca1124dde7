"""Ids come from the kernel's generator, and no byte of it serves two of them."""

import itertools

import pytest

import router.ids
from router.ids import draw_name, draw_number


def test_no_byte_is_used_twice_and_none_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bytes] = []
    counter = itertools.count(1)

    def urandom(count: int) -> bytes:
        given.append(b"".join(next(counter).to_bytes(4, "little") for _ in range(count // 4)))
        return given[-1]

    monkeypatch.setattr("router.ids.os.urandom", urandom)
    monkeypatch.setattr(router.ids, "_pool", router.ids._Pool())
    names = [bytes.fromhex(draw_name()) for _ in range(1000)]
    words = [name[at : at + 4] for name in names for at in (0, 4, 8)]
    assert len(set(words)) == len(words) == 3000
    source = b"".join(given)
    assert set(words) <= {source[at : at + 4] for at in range(0, len(source), 4)}


def test_a_number_has_62_bits_and_is_never_0(monkeypatch: pytest.MonkeyPatch) -> None:
    for byte, expected in ((b"\xff", 2**62 - 1), (b"\0", 1)):
        monkeypatch.setattr("router.ids.os.urandom", lambda count, byte=byte: byte * count)
        monkeypatch.setattr(router.ids, "_pool", router.ids._Pool())
        assert draw_number() == expected
