"""`config.json` of a published checkpoint, with the defaults that its family was published with.

A file names only what its family does not take for granted, so the defaults are part of it. They are those of
`transformers`' configuration classes, written down here because importing that package takes longer than
everything else in the start of a worker; a test compares the two.
"""

import re
from typing import Annotated, Any, TypeVar

import msgspec

from services.engine.checkpoint.config_keys import shown

Count = Annotated[int, msgspec.Meta(ge=1)]
Eos = int | list[int] | None


class PublishedConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What all families have, with Llama's defaults; a family's own is in its file under models/.

    `rope_scaling` and `rope_theta` are the old spelling of `rope_parameters`.
    """

    vocab_size: Count = 32_000
    hidden_size: Count = 4096
    intermediate_size: Count = 11_008
    num_hidden_layers: Count = 32
    num_attention_heads: Count = 32
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    hidden_act: str = "silu"
    max_position_embeddings: Count = 2048
    original_max_position_embeddings: Count | None = None
    rms_norm_eps: float = 1e-6
    eos_token_id: Eos = 2
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = None
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float | None = 10_000.0
    partial_rotary_factor: float | None = None
    num_nextn_predict_layers: int | None = None
    mtp_num_hidden_layers: int | None = None
    num_mtp_layers: int | None = None

    def rope(self) -> dict[str, Any]:
        """The new spelling, whichever the file has."""
        found = dict(self.rope_scaling or self.rope_parameters or {})
        found.setdefault("rope_theta", self.rope_theta)
        found.setdefault("rope_type", found.get("type", "default"))
        if self.partial_rotary_factor is not None:
            found.setdefault("partial_rotary_factor", self.partial_rotary_factor)
        if found["rope_type"] in ("llama3", "yarn"):
            if self.original_max_position_embeddings is not None:
                found["original_max_position_embeddings"] = self.original_max_position_embeddings
            found.setdefault("original_max_position_embeddings", self.max_position_embeddings)
        return found

    def window(self) -> int | None:
        """The sliding window, in tokens, of the layers that slide."""
        return self.sliding_window

    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def kinds(self) -> list[str]:
        """What each layer is, by the names of `layer_types`."""
        if self.layer_types is not None:
            return ["full_attention" if kind == "attention" else kind for kind in self.layer_types]
        kind = "full_attention" if self.window() is None else "sliding_attention"
        return [kind] * self.num_hidden_layers

    def mtp_layers(self) -> int:
        """How many layers that predict further tokens the configuration announces."""
        return self.num_nextn_predict_layers or self.mtp_num_hidden_layers or self.num_mtp_layers or 0

    @classmethod
    def own_keys(cls) -> tuple[str, ...]:
        """The keys that only this family has."""
        return tuple(name for name in cls.__struct_fields__ if name not in PublishedConfig.__struct_fields__)


_WORDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_EXPECTED = re.compile(
    r"Expected `(?P<kinds>[^`]+)`(?:, got `\w+`)?(?P<least> >= \d+)?(?: - at `\$\.(?P<path>[^`]+)`)?"
)


Config = TypeVar("Config", bound=PublishedConfig)


def published_config(raw: dict[str, Any], kind: type[Config]) -> Config:
    """Raises ValueError where a key has a type or value that it cannot have, naming the key."""
    try:
        return msgspec.convert(_whole_numbers(raw), kind)
    except msgspec.ValidationError as error:
        raise ValueError(_said_plainly(str(error), raw)) from error


def _whole_numbers(raw: dict[str, Any]) -> dict[str, Any]:
    """1024.0 is 1024: some exporters write every number with a point."""
    return {
        key: int(value) if isinstance(value, float) and value.is_integer() else value
        for key, value in raw.items()
    }


def _said_plainly(message: str, raw: dict[str, Any]) -> str:
    """`rope_theta is null; it must be a number` for what msgspec says in terms of its own."""
    found = _EXPECTED.fullmatch(message)
    if found is None or found["path"] is None:
        return message
    key = re.split(r"[.\[]", found["path"])[0]
    kinds = [_WORDS.get(kind, kind) for kind in found["kinds"].split(" | ")]
    least = f" of{found['least'].replace('>=', 'at least')}" if found["least"] else ""
    inside = f" (at {found['path']})" if found["path"] != key else ""
    return f"{key} is {shown(raw[key])}; it must be {' or '.join(kinds)}{least}{inside}"
