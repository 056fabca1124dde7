"""Files of a checkpoint directory, read with errors that name them."""

import json
from pathlib import Path
from typing import Any

from router.config import RouterConfigError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises RouterConfigError naming the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RouterConfigError(f"{path} does not exist: model_dir must be a checkpoint directory") from error
    except (OSError, ValueError) as error:
        raise RouterConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise RouterConfigError(f"{path} must hold a JSON object")
    return values
