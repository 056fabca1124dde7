"""What several tests of this folder need."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

AT_ONCE = 12


@pytest.fixture
def asking() -> Iterator[ThreadPoolExecutor]:
    """Its threads are on the host (the network namespace) of the thread that first uses it."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield pool
