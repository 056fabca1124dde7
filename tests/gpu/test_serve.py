"""The whole path on a GPU: the same processes, the staging buffers in device memory, copies between them."""

from pathlib import Path

import pytest

from tests.checkpoints import FAMILIES
from tests.e2e.test_tokens import check_family


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(family: str, tmp_path: Path) -> None:
    """Both workers may share one GPU; a small share of it is plenty for a tiny model."""
    check_family(family, tmp_path, "--mem-fraction", "0.05", device="cuda")
