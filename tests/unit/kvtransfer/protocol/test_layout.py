"""Slot geometry, against numpy and against plain sets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.errors import TransferConfigError
from kvtransfer.messages import KvGeometry
from kvtransfer.protocol.layout import TokenRanges, segment_bytes, tokens_per_slot

GEOMETRY = KvGeometry("m", layers=3, kv_heads=4, head_dim=8, dtype="bfloat16")


def test_bytes_are_those_of_the_array() -> None:
    for tokens in (1, 7):
        array = np.zeros((4, 3, 2, tokens, 8), dtype=np.float16)
        assert array.nbytes == segment_bytes(GEOMETRY, tokens)


def test_tokens_per_slot_is_the_most_that_fits() -> None:
    for slot_bytes in (GEOMETRY.token_bytes, 10 * GEOMETRY.token_bytes - 1, 12345):
        tokens = tokens_per_slot(GEOMETRY, slot_bytes)
        assert segment_bytes(GEOMETRY, tokens) <= slot_bytes < segment_bytes(GEOMETRY, tokens + 1)


def test_a_slot_that_holds_no_token_is_refused() -> None:
    with pytest.raises(TransferConfigError, match="slot_bytes"):
        tokens_per_slot(GEOMETRY, GEOMETRY.token_bytes - 1)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), max_size=30))
def test_token_ranges_agree_with_a_set(wanted: list[tuple[int, int]]) -> None:
    ranges, model = TokenRanges(), set[int]()
    for start, length in wanted:
        tokens = set(range(start, start + length))
        assert ranges.overlaps(start, start + length) == bool(tokens & model)
        if tokens & model:
            with pytest.raises(ValueError, match="already there"):
                ranges.add(start, start + length)
        else:
            ranges.add(start, start + length)
            model |= tokens
        assert ranges.tokens == len(model)
