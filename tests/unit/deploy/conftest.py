"""What several tests of this folder need."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Where a socket's whole path fits what the kernel takes; pytest's own directories are too deep."""
    with tempfile.TemporaryDirectory(prefix="baton-test-", dir="/tmp") as name:
        yield Path(name)
