"""What ends one row of a benchmark, and only that row."""


class BenchError(RuntimeError):
    """A measurement could not be made. The message says why."""


class LeftOut(BenchError):
    """This model or this device has no room for a row: nothing went wrong, and nothing was measured."""
