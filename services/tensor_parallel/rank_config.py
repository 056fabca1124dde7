"""A worker's configuration on its way to another rank."""

from pathlib import Path
from typing import Any

import msgspec

from services.config import WorkerConfig


def encode_config(config: WorkerConfig) -> bytes:
    return msgspec.json.encode(config, enc_hook=str)


def decode_config(data: bytes) -> WorkerConfig:
    """Raises msgspec.MsgspecError for anything but what `encode_config` made."""
    return msgspec.json.decode(data, type=WorkerConfig, dec_hook=_decode)


def _decode(kind: type, value: Any) -> Any:
    if kind is Path:
        return Path(value)
    raise ValueError(f"{kind} is no part of a configuration")
