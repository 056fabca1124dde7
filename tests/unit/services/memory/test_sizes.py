"""Sizes as text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.memory.sizes import MAX_SIZE_BYTES, format_bytes, format_flag, parse_bytes


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("2GiB", 2 << 30),
        ("512MiB", 512 << 20),
        ("1.5GB", 1_500_000_000),
        ("1000", 1000),
        (" 3 kib ", 3072),
        ("7B", 7),
        ("0.5TiB", 1 << 39),
    ],
)
def test_reads_what_people_write(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not a size"),
        ("GiB", "is not a size"),
        ("-1GiB", "is not a size"),
        ("1e9", "is not a size"),
        ("2 G iB", "is not a size"),
        ("2GB/s", "is not a size"),
        ("2Gib it", "is not a size"),
        ("2Q", "unknown unit 'Q'"),
        ("0", "out of range"),
        ("0.1B", "out of range"),
        ("99999TiB", "out of range"),
    ],
)
def test_refuses_the_rest_by_name(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)


@given(st.integers(1, MAX_SIZE_BYTES))
def test_a_flag_is_read_back_exactly(size_bytes: int) -> None:
    assert parse_bytes(format_flag(size_bytes)) == size_bytes


def test_formats_for_reading() -> None:
    assert format_bytes(0) == "0 B"
    assert format_bytes(1536) == "1.50 KiB"
    assert format_bytes(-(3 << 30)) == "-3.00 GiB"
    assert format_bytes(150 << 20) == "150.0 MiB"
