"""The command line without what it starts."""

from typing import Any

from deploy.cli import app


def parse(arguments: list[str]) -> Any:
    """The settings that a command line comes to. Raises UserError or the parser's own exceptions."""
    action = app(arguments, prog_name="baton", standalone_mode=False)
    (settings,) = action.args
    return settings
