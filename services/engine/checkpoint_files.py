"""The safetensors files of a model directory: which there are, what their headers say, what identifies them.

Only headers are read here (8 bytes of length, then JSON), with every length checked against the file, so
that a torn download is found before any memory is allocated. No torch.
"""

import hashlib
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from services.config import Dtype, Quantization
from services.engine.errors import CheckpointError
from services.engine.model_config import ModelConfig

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
DUMMY_SEED = 20240229
MAX_HEADER_BYTES = 100 << 20
_LOADABLE = {"F32": 4, "BF16": 2, "F16": 2}
_KV_SCALE = re.compile(r"model\.layers\.(?P<layer>\d{1,4})\.self_attn\.(?:[kv]_proj\.)?(?P<kind>[kv])_scale")
_NOT_SHAPE_GIVING = {"model_dir", "eos_token_ids", "max_model_len"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    name: str
    shape: tuple[int, ...]
    dtype: str
    byte_count: int


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One safetensors file. `header` is its raw JSON, `file_bytes` the whole file's size."""

    path: Path
    header: bytes
    file_bytes: int
    tensors: tuple[StoredTensor, ...]


def read_checkpoint_files(model_dir: Path) -> list[StoredFile]:
    """Headers of every safetensors file the checkpoint consists of, in a fixed order.

    Raises `CheckpointError` for a missing or torn file, a bad index, or a checkpoint in another format.
    """
    index = model_dir / INDEX_NAME
    if index.exists():
        return _read_shards(model_dir, index)
    single = model_dir / SINGLE_NAME
    if single.exists():
        return [read_header(single)]
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in model_dir.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{model_dir / pickled[0]}: refused: only safetensors weights are loaded, because pickled "
            "ones can run code; convert the checkpoint to safetensors first"
        )
    raise CheckpointError(f"{model_dir}: holds neither {SINGLE_NAME} nor {INDEX_NAME}")


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
    held = {tensor.name: file.path.name for file in stored for tensor in file.tensors}
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
        tensors = [_entry(name, value) for name, value in entries.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: torn or not a safetensors file (bad header: {error!r})") from error
    data_bytes = max((end for _, end in tensors), default=0)
    if data_bytes != file_bytes - 8 - header_bytes:
        raise CheckpointError(
            f"{path}: torn: its header describes {data_bytes} bytes of tensors, the file has "
            f"{file_bytes - 8 - header_bytes}"
        )
    return StoredFile(path, header, file_bytes, tuple(tensor for tensor, _ in tensors))


def _entry(name: str, value: Any) -> tuple[StoredTensor, int]:
    begin, end = value["data_offsets"]
    return StoredTensor(name, tuple(int(n) for n in value["shape"]), str(value["dtype"]), end - begin), int(
        end
    )


def check_tensors(model: ModelConfig, files: list[StoredFile]) -> dict[str, StoredFile]:
    """Where each tensor of the model lies. Raises `CheckpointError` if one is missing, misshaped, of an
    unsupported dtype, or not part of the model."""
    expected = model.tensor_shapes()
    located: dict[str, StoredFile] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor.name not in expected:
                if _is_harmless(tensor.name, model):
                    continue
                raise CheckpointError(
                    f"{file.path}: unexpected tensor {tensor.name}: "
                    f"{model.architecture} with this config has none"
                )
            if tensor.shape != expected[tensor.name]:
                raise CheckpointError(
                    f"{file.path}: tensor {tensor.name} has shape {list(tensor.shape)}, "
                    f"config.json asks for {list(expected[tensor.name])}"
                )
            if tensor.dtype not in _LOADABLE:
                raise CheckpointError(
                    f"{file.path}: tensor {tensor.name} has dtype {tensor.dtype} "
                    f"(supported: {', '.join(_LOADABLE)})"
                )
            located[tensor.name] = file
    missing = [name for name in expected if name not in located]
    if missing:
        where = files[0].path if len(files) == 1 else model.model_dir / INDEX_NAME
        raise CheckpointError(f"{where}: missing tensor {missing[0]}" + _and_more(len(missing) - 1))
    return located


def _and_more(count: int) -> str:
    return f" (and {count} more)" if count else ""


def _is_harmless(name: str, model: ModelConfig) -> bool:
    """Old exporters stored the rotary table, and a copy of a tied output matrix; some store scales for a KV
    cache of fp8, which is not always asked for."""
    if name == "lm_head.weight":
        return model.tied_embeddings
    return name.endswith("rotary_emb.inv_freq") or kv_scale_of(name, model) is not None


def kv_scale_of(name: str, model: ModelConfig) -> tuple[int, int] | None:
    """`(layer, 0 for keys or 1 for values)` if `name` is a calibrated scale of the KV cache, in one of the
    two spellings that exporters use; else None."""
    match = _KV_SCALE.fullmatch(name)
    if match is None or int(match["layer"]) >= model.layers:
        return None
    return int(match["layer"]), 0 if match["kind"] == "k" else 1


def model_digest(
    model: ModelConfig,
    dtype: Dtype,
    load_format: Literal["auto", "dummy"],
    quantization: Quantization = "none",
) -> str:
    """SHA-256 that two workers must share before KV may pass between them: the shape-giving configuration,
    the dtype, the quantization, and every weight file's header and size (for dummy weights: their seed).
    The dtype of the KV cache has a field of its own in the handshake."""
    digest = hashlib.sha256()
    for field in fields(model):
        if field.name not in _NOT_SHAPE_GIVING:
            digest.update(f"{field.name}={getattr(model, field.name)!r}\n".encode())
    digest.update(f"dtype={dtype} quantization={quantization}\n".encode())
    if load_format == "dummy":
        digest.update(f"dummy={DUMMY_SEED}\n".encode())
    else:
        for file in read_checkpoint_files(model.model_dir):
            digest.update(f"{file.path.name} {file.file_bytes} {len(file.header)}\n".encode())
            digest.update(file.header)
    return digest.hexdigest()
