"""JSON files of a model directory, read with errors that name them."""

import json
from pathlib import Path
from typing import Any

from services.engine.checkpoint.model_directory import hint
from services.engine.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: not found; --model must be a Hugging Face model directory{hint(path.parent)}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, holds {type(values).__name__}")
    return values
