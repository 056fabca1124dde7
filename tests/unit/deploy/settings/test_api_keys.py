"""Keys from a file."""

from pathlib import Path

import pytest

from deploy.errors import UserError
from deploy.settings.api_keys import api_keys


def test_keys_of_both_kinds_once_each(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\nsk-one\n\n  sk-two \nsk-flag\n")
    assert api_keys(("sk-flag",), file) == ("sk-flag", "sk-one", "sk-two")
    assert api_keys(("sk-flag",), None) == ("sk-flag",)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"# nothing\n\n", "holds no key"),
        (b"sk-good\nsk-,comma\n", "line 2: a key must be printable ASCII"),
        (b"\xff\xfe", "cannot be read: it is not text"),
    ],
)
def test_a_wrong_file_is_refused_without_showing_a_key(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        api_keys((), file)
    assert "sk-" not in str(caught.value)
