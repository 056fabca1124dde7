"""What can go wrong in the engine, as types a worker can tell apart."""


class EngineError(Exception):
    """Root of everything the engine raises on purpose."""


class CheckpointError(EngineError):
    """A model directory cannot be served. The message names the file and what is wrong with it."""


class RowError(EngineError, ValueError):
    """A row asks for tokens, pages or positions that do not exist. Nothing was executed."""


class SegmentError(EngineError, ValueError):
    """A pack or unpack names tokens, pages or slot bytes that do not exist. Nothing was moved."""


class ChecksumMismatch(EngineError):
    """A segment's bytes are not those that were packed. The pages were left as they were."""


class EngineStateError(EngineError):
    """A method was called before what it needs: weights, then the pool, then steps."""
