"""The origins that `--allowed-origins` names, however they are spread over flags and commas."""

from deploy.errors import UserError


def allowed_origins(given: tuple[str, ...]) -> tuple[str, ...]:
    """The origins, each once. Raises UserError for `*` beside others."""
    found = tuple(dict.fromkeys(origin for one in given for origin in one.split(",")))
    if "*" in found and len(found) > 1:
        raise UserError("--allowed-origins: '*' stands for all origins, and alone")
    return found
