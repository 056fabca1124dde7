"""What a checkpoint's files hold of a model: where each of its tensors lies, and what identifies them."""

import hashlib
from dataclasses import dataclass, fields
from typing import Literal

from services.config import Dtype, Quantization
from services.engine.checkpoint.safetensors_files import (
    INDEX_NAME,
    StoredFile,
    StoredTensor,
    read_checkpoint_files,
)
from services.engine.errors import CheckpointError
from services.engine.models.model_config import ModelConfig
from services.engine.models.tensor_names import is_passed_over, own_name

DUMMY_SEED = 20240229
_LOADABLE = ("F32", "BF16", "F16", "F64")
_NOT_SHAPE_GIVING = {
    "model_dir",
    "family",
    "published",
    "eos_token_ids",
    "max_model_len",
    "mtp_layers",
    "notes",
}


@dataclass(frozen=True, slots=True)
class Located:
    file: StoredFile
    tensor: StoredTensor


def check_tensors(model: ModelConfig, files: list[StoredFile]) -> dict[str, Located]:
    """Where each tensor of the model lies, by the model's own name for it. Raises `CheckpointError` if one is
    missing, misshaped, of an unsupported dtype, there twice, or not part of the model."""
    expected = model.tensor_shapes()
    located: dict[str, Located] = {}
    for file in files:
        for tensor in file.tensors:
            name = own_name(tensor.name, model)
            if name not in expected:
                if is_passed_over(tensor.name, model):
                    continue
                raise CheckpointError(
                    f"{file.path}: unexpected tensor {tensor.name}: "
                    f"{model.architecture} with this config has none"
                )
            if name in located:
                raise CheckpointError(
                    f"{file.path}: {tensor.name} and {located[name].tensor.name} are the same tensor"
                )
            _check(tensor, expected[name], file)
            located[name] = Located(file, tensor)
    missing = [name for name in expected if name not in located]
    if missing:
        where = files[0].path if len(files) == 1 else model.model_dir / INDEX_NAME
        raise CheckpointError(f"{where}: missing tensor {missing[0]}" + _and_more(len(missing) - 1))
    return located


def _check(tensor: StoredTensor, shape: tuple[int, ...], file: StoredFile) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{file.path}: tensor {tensor.name} has shape {list(tensor.shape)}, "
            f"config.json asks for {list(shape)}"
        )
    if tensor.dtype not in _LOADABLE:
        raise CheckpointError(
            f"{file.path}: tensor {tensor.name} has dtype {tensor.dtype} (supported: {', '.join(_LOADABLE)})"
        )


def _and_more(count: int) -> str:
    return f" (and {count} more)" if count else ""


def model_digest(
    model: ModelConfig,
    dtype: Dtype,
    load_format: Literal["auto", "dummy"],
    quantization: Quantization = "none",
) -> str:
    """SHA-256 that two workers must share before KV may pass between them: the shape-giving configuration,
    the tensors, the dtype, the quantization, and every weight file's header and size (for dummy weights:
    their seed). The dtype of the KV cache has a field of its own in the handshake."""
    digest = hashlib.sha256()
    for field in fields(model):
        if field.name not in _NOT_SHAPE_GIVING:
            digest.update(f"{field.name}={getattr(model, field.name)!r}\n".encode())
    for name in model.family.config.own_keys():
        digest.update(f"{name}={getattr(model.published, name)!r}\n".encode())
    for spec in model.tensors:
        digest.update(f"{spec.name}={spec.shape}\n".encode())
    digest.update(f"dtype={dtype} quantization={quantization}\n".encode())
    if load_format == "dummy":
        digest.update(f"dummy={DUMMY_SEED}\n".encode())
    else:
        for file in read_checkpoint_files(model.model_dir):
            digest.update(f"{file.path.name} {file.file_bytes} {len(file.header)}\n".encode())
            digest.update(file.header)
    return digest.hexdigest()
