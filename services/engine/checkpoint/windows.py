"""Which layers of a model see only the last tokens, and how many."""

from pathlib import Path

from services.engine.checkpoint.config_keys import shown
from services.engine.checkpoint.published_config import PublishedConfig
from services.engine.errors import CheckpointError

_KINDS = {"full_attention", "sliding_attention"}


def read_windows(
    config: PublishedConfig, path: Path, family: str, full_attention_only: bool
) -> tuple[int | None, ...]:
    """Each layer's sliding window in tokens, None for full attention. Raises CheckpointError.

    Mistral slides in every layer or by `layer_types`, Qwen in the layers from `max_window_layers` on or by
    `layer_types`. Attention that never does is refused a window, though transformers would cut its cache.
    """
    window, kinds = config.window(), config.kinds()
    if full_attention_only and (window is not None or "sliding_attention" in kinds):
        key = "sliding_window" if window is not None else "layer_types"
        raise CheckpointError(
            f"{path}: {key} is {shown(getattr(config, key))}, but {family} has full attention only"
        )
    if len(kinds) != config.num_hidden_layers or not set(kinds) <= _KINDS:
        raise CheckpointError(
            f"{path}: layer_types must name 'full_attention' or 'sliding_attention' "
            f"for each of the {config.num_hidden_layers} layers"
        )
    if "sliding_attention" in kinds and (window is None or window < 1):
        raise CheckpointError(
            f"{path}: sliding_window is {shown(window)}, but layers slide; it must be at least 1"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
