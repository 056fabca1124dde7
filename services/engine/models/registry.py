"""The model families that are served. To add one: its file, and its name here."""

from typing import Any

from services.engine.models import llama, mistral, qwen2, qwen3, qwen3_moe
from services.engine.models.family import Family

FAMILIES: dict[str, Family[Any]] = {
    family.architecture: family
    for family in (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY, qwen3_moe.FAMILY)
}
"""By architecture."""
