"""Sizes as people write them ("2GiB") and as they read them."""

import re

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
MAX_SIZE_BYTES = 2**50


def parse_bytes(text: str) -> int:
    """Bytes named by "2GiB", "512MiB", "1.5GB" or "1000".

    Raises ValueError, in words for whoever wrote the text, where it names no positive whole size.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write a number and a unit, like 2GiB, 512MiB or 1.5GB")
    number, unit = match.group(1), match.group(2).lower()
    if unit not in _UNITS:
        raise ValueError(
            f"{text!r} has an unknown unit {match.group(2)!r}; allowed: B, KB, MB, GB, TB, KiB, MiB, GiB, TiB"
        )
    size_bytes = int(number) * _UNITS[unit] if number.isdigit() else int(float(number) * _UNITS[unit])
    if not 0 < size_bytes <= MAX_SIZE_BYTES:
        raise ValueError(f"{text!r} is out of range; a size lies between 1 byte and 1024TiB")
    return size_bytes


def format_flag(size_bytes: int) -> str:
    """The shortest exact spelling that `parse_bytes` reads back."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size_bytes >= scale and size_bytes % scale == 0:
            return f"{size_bytes // scale}{unit}"
    return str(size_bytes)


def format_bytes(size_bytes: int) -> str:
    """For reading: at most four digits, binary units, sign kept."""
    magnitude = abs(size_bytes)
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if magnitude >= scale:
            decimals = 2 if magnitude < 100 * scale else 1
            return f"{size_bytes / scale:.{decimals}f} {unit}"
    return f"{size_bytes} B"
