"""The safetensors files of a model directory: which there are, and what their headers say.

Only headers are read here (8 bytes of length, then JSON), with every length checked against the file, so
that a torn download is found before any memory is allocated. No torch.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.engine.checkpoint.model_directory import hint
from services.engine.errors import CheckpointError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    name: str
    shape: tuple[int, ...]
    dtype: str
    byte_count: int
    begin: int
    """Where its bytes begin in the file."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One safetensors file. `header` is its raw JSON, `file_bytes` the whole file's size."""

    path: Path
    header: bytes
    file_bytes: int
    tensors: tuple[StoredTensor, ...]


def read_checkpoint_files(model_dir: Path) -> list[StoredFile]:
    """Headers of every safetensors file the checkpoint consists of, in a fixed order.

    A single file comes before an index, as in transformers. Raises `CheckpointError` for a missing or torn
    file, a bad index, or a checkpoint in another format.
    """
    single, index = model_dir / SINGLE_NAME, model_dir / INDEX_NAME
    if single.exists():
        return [read_header(single)]
    if index.exists():
        return _read_shards(model_dir, index)
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in model_dir.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{model_dir / pickled[0]}: refused: only safetensors weights are loaded, because pickled "
            "ones can run code; convert the checkpoint to safetensors first"
        )
    raise CheckpointError(f"{model_dir}: holds neither {SINGLE_NAME} nor {INDEX_NAME}{hint(model_dir)}")


def _read_shards(model_dir: Path, index: Path) -> list[StoredFile]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a safetensors index: {error!r}") from error
    stored: list[StoredFile] = []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: shard name {name!r} is not a plain file name")
        if not (model_dir / name).exists():
            raise CheckpointError(f"{index}: names the shard {name}, which is not there")
        stored.append(read_header(model_dir / name))
    held: dict[str, str] = {}
    for file in stored:
        for found in file.tensors:
            if found.name in held:
                raise CheckpointError(
                    f"{model_dir}: {found.name} is in {held[found.name]} and in {file.path.name}"
                )
            held[found.name] = file.path.name
    for tensor, name in weight_map.items():
        if held.get(tensor) != name:
            raise CheckpointError(f"{index}: says that {tensor} is in {name}, but it is not")
    return stored


def read_header(path: Path) -> StoredFile:
    """Parse one file's header; every offset is checked against the file's size."""
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
                raise CheckpointError(
                    f"{path}: torn or not a safetensors file (header does not fit the file)"
                )
            header = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    try:
        entries = json.loads(header)
        data_begin = 8 + header_bytes
        tensors = [
            _entry(name, value, data_begin) for name, value in entries.items() if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: torn or not a safetensors file (bad header: {error!r})") from error
    data_bytes = max((end for _, end in tensors), default=0)
    if data_bytes != file_bytes - 8 - header_bytes:
        raise CheckpointError(
            f"{path}: torn: its header describes {data_bytes} bytes of tensors, the file has "
            f"{file_bytes - 8 - header_bytes}"
        )
    return StoredFile(path, header, file_bytes, tuple(tensor for tensor, _ in tensors))


def _entry(name: str, value: Any, data_begin: int) -> tuple[StoredTensor, int]:
    begin, end = (int(offset) for offset in value["data_offsets"])
    shape = tuple(int(extent) for extent in value["shape"])
    return StoredTensor(name, shape, str(value["dtype"]), end - begin, data_begin + begin), end
