"""The registered movers: every module of this folder that has a `MoverSpec` called `MOVER`.

Nothing is written down twice: flags, choice and memory ledger ask here.
"""

import importlib
import pkgutil

from kvtransfer import movers
from kvtransfer.config import AUTO
from kvtransfer.errors import MoverError
from kvtransfer.movers.spec import MoverSpec


def registered_movers() -> list[MoverSpec]:
    """All of them, the most preferred first. Imports the folder's modules, and none of the libraries that
    they move by. Raises MoverError if two modules claim one name."""
    found: dict[str, MoverSpec] = {}
    for info in pkgutil.iter_modules(movers.__path__, f"{movers.__name__}."):
        spec = getattr(importlib.import_module(info.name), "MOVER", None)
        if not isinstance(spec, MoverSpec):
            continue
        if spec.name == AUTO or spec.name in found:
            raise MoverError(f"{info.name}: a mover cannot be called {spec.name}, which is taken")
        found[spec.name] = spec
    return sorted(found.values(), key=lambda spec: (-spec.preference, spec.name))


def mover_choices() -> list[str]:
    """The values of `--mover`."""
    return [AUTO, *(spec.name for spec in registered_movers())]


def mover_context_bytes(name: str) -> int:
    """`MoverSpec.context_bytes` of a mover; nothing for one that no flag chooses."""
    return next((spec.context_bytes for spec in registered_movers() if spec.name == name), 0)
