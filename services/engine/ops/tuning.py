"""Launch configurations that were measured, by GPU, kernel and shape.

A table is a JSON file `<GPU name>.json`: kernel -> shape ("64x4096x12288") -> configuration. Those in
`tuned/` come with the package; a user's own, made by a benchmark with `--save`, lies in `$BATON_CACHE_DIR`
or `~/.cache/baton/tuned` and goes before them, shape by shape. Both are read once a process.
"""

import math
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import msgspec
import torch

Shape = tuple[int, ...]
Config = dict[str, bool | int | str]
Table = dict[str, dict[Shape, Config]]
LaunchT = TypeVar("LaunchT", bound=msgspec.Struct)
SHIPPED = Path(__file__).parent / "tuned"


class TuningTableError(ValueError):
    """A table that cannot be read; the message names the file."""


def nearest(entries: Mapping[Shape, Config], shape: Shape) -> Config | None:
    """The configuration of the most similar shape with as many dimensions, or None.

    The first dimension is the number of tokens. Of the entries that are nearest in all others, by their
    ratios, it is the one with the fewest tokens that are enough; without one, that with the most.
    """
    alike = [known for known in entries if len(known) == len(shape)]
    if not alike:
        return None

    def distance(known: Shape) -> tuple[float, bool, float]:
        ratios = [abs(math.log2(ours / theirs)) for ours, theirs in zip(shape, known, strict=True)]
        return sum(ratios[1:]), known[0] < shape[0], ratios[0]

    return entries[min(alike, key=distance)]


@lru_cache(maxsize=4096)
def lookup(kernel: str, shape: Shape, gpu: str) -> Config | None:
    """What was measured for `kernel` on `gpu` (torch.cuda.get_device_name) nearest to `shape`, or None.

    Raises TuningTableError if a table cannot be read.
    """
    return nearest(_tables(gpu).get(kernel, {}), shape)


@lru_cache(maxsize=1 << 14)
def tuned(kernel: str, shape: Shape, device: torch.device, default: LaunchT) -> LaunchT:
    """The launch of `kernel` for `shape` on `device`, of the default's type; the default where nothing
    was measured for this GPU. Raises TuningTableError if a table cannot be read or has other fields."""
    if device.type != "cuda":
        return default
    found = lookup(kernel, shape, torch.cuda.get_device_name(device))
    if found is None:
        return default
    try:
        return msgspec.convert(found, type(default))
    except msgspec.ValidationError as error:
        raise TuningTableError(f"the table of tuned launches has {found} for {kernel}: {error}") from error


def user_directory() -> Path:
    """Where a user's own tables lie."""
    base = os.environ.get("BATON_CACHE_DIR")
    return (Path(base) if base else Path.home() / ".cache" / "baton") / "tuned"


def save(table: Table, gpu: str, directory: Path) -> Path:
    """Put the entries of `table` into the file for `gpu`, keep its others, and return its path.

    Whoever reads meanwhile sees the old file or the new one. Raises OSError, and TuningTableError if the
    file that is there cannot be read.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / file_name(gpu)
    merged = _merged(read_table(path) if path.exists() else {}, table)
    lines = {
        kernel: {"x".join(map(str, shape)): merged[kernel][shape] for shape in sorted(merged[kernel])}
        for kernel in sorted(merged)
    }
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(lines), indent=1) + b"\n")
    partial.replace(path)
    lookup.cache_clear()
    tuned.cache_clear()
    _tables.cache_clear()
    return path


def read_table(path: Path) -> Table:
    """Raises OSError, and TuningTableError if it is no table."""
    try:
        read = msgspec.json.decode(path.read_bytes(), type=dict[str, dict[str, Config]])
        return {
            kernel: {_shape(text): config for text, config in entries.items()}
            for kernel, entries in read.items()
        }
    except ValueError as error:
        raise TuningTableError(f"{path} is no table of tuned launches: {error}") from error


def file_name(gpu: str) -> str:
    return re.sub(r"[^\w.-]+", "_", gpu) + ".json"


def _shape(text: str) -> Shape:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise ValueError(f"{text!r} is no shape such as 64x4096x12288")
    return tuple(int(part) for part in text.split("x"))


@lru_cache(maxsize=16)
def _tables(gpu: str) -> Table:
    found: Table = {}
    for directory in (SHIPPED, user_directory()):
        path = directory / file_name(gpu)
        if path.is_file():
            found = _merged(found, read_table(path))
    return found


def _merged(below: Table, above: Table) -> Table:
    kernels = below.keys() | above.keys()
    return {kernel: {**below.get(kernel, {}), **above.get(kernel, {})} for kernel in kernels}
