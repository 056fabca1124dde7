"""The router's keys, from flags and from a file."""

from pathlib import Path

from deploy.errors import UserError
from deploy.settings.values import parse_api_key


def api_keys(given: tuple[str, ...], file: Path | None) -> tuple[str, ...]:
    """All keys, each once. In the file empty lines and those that begin with `#` are left out.

    Raises UserError for a file that cannot be read, holds no key, or a line that is none; no message
    repeats a key.
    """
    if file is None:
        return given
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"--api-key-file: {file} cannot be read: {reason}") from None
    found = list(given)
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            found.append(parse_api_key(line.strip()))
        except ValueError as error:
            raise UserError(f"--api-key-file: {file}, line {number}: {error}") from None
    if len(found) == len(given):
        raise UserError(f"--api-key-file: {file} holds no key")
    return tuple(dict.fromkeys(found))
