"""What keeps a load from being made or sent at all."""


class LoadError(RuntimeError):
    """One line: what cannot be measured, and why."""
