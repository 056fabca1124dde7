"""Sampling defaults of a checkpoint: its generation_config.json, for what a request does not say."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import Struct

from router.config import RouterConfigError
from router.text.checkpoint import read_json

FILE = "generation_config.json"
AUTO, NONE = "auto", "none"


class SamplingDefaults(Struct, frozen=True):
    """`max_tokens` None: the endpoint's own default. `source` is the file that says so, if one does."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    source: str | None = None

    def describe(self) -> str:
        """One line for whoever starts a server."""
        if self.source is None:
            return "sampling defaults: temperature 1, nothing else"
        said = ", ".join(f"{name} {value:g}" for name, value in self._changed())
        return f"sampling defaults: {said or 'temperature 1, nothing else'} ({self.source})"

    def _changed(self) -> list[tuple[str, float]]:
        plain = SamplingDefaults()
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens")
        return [(name, getattr(self, name)) for name in names if getattr(self, name) != getattr(plain, name)]


@dataclass(frozen=True, slots=True)
class _Key:
    """One key of the file; its bounds are those of the request's field."""

    field: str
    whole: bool
    allowed: str
    fits: Callable[[float], bool]


_KEYS = {
    "temperature": _Key("temperature", False, "a number from 0 to 2", lambda value: 0 <= value <= 2),
    "top_p": _Key("top_p", False, "a number above 0, at most 1", lambda value: 0 < value <= 1),
    "top_k": _Key("top_k", True, "a whole number from -1 up", lambda value: -1 <= value < 2**31),
    "min_p": _Key("min_p", False, "a number from 0 to 1", lambda value: 0 <= value <= 1),
    "repetition_penalty": _Key(
        "repetition_penalty", False, "a number above 0, at most 2", lambda value: 0 < value <= 2
    ),
    "max_new_tokens": _Key("max_tokens", True, "a whole number from 1 up", lambda value: 1 <= value < 2**31),
}


def sampling_defaults(model_dir: Path, source: str = AUTO) -> SamplingDefaults:
    """`source`: `auto` (the model directory's file, if it has one), `none`, or a directory or file that must
    be there. Raises RouterConfigError naming the file and the key."""
    if source == NONE:
        return SamplingDefaults()
    path = model_dir / FILE
    if source != AUTO:
        given = Path(source).expanduser()
        path = given / FILE if given.is_dir() else given
        if not path.is_file():
            raise RouterConfigError(f"--generation-config: {path} does not exist (or give auto or none)")
    elif not path.exists():
        return SamplingDefaults()
    values = read_json(path)
    found: dict[str, Any] = {}
    for name, key in _KEYS.items():
        value = values.get(name)
        if value is not None:
            found[key.field] = _checked(path, name, key, value)
    greedy = values.get("do_sample")
    if greedy is not None and not isinstance(greedy, bool):
        raise RouterConfigError(_complaint(path, "do_sample", greedy, "true or false"))
    if greedy is False:
        found["temperature"] = 0.0
    return SamplingDefaults(**found, source=str(path)) if found else SamplingDefaults()


def _checked(path: Path, name: str, key: _Key, value: object) -> float:
    is_number = isinstance(value, int) if key.whole else isinstance(value, int | float)
    if isinstance(value, int | float) and is_number and not isinstance(value, bool) and key.fits(value):
        return max(0, value) if name == "top_k" else value
    raise RouterConfigError(_complaint(path, name, value, key.allowed))


def _complaint(path: Path, name: str, value: object, allowed: str) -> str:
    return f"{path}: {name} is {value!r:.80}, not {allowed}; --generation-config none leaves the file aside"
