"""Fault isolation: an error that nobody foresaw ends its own request, and the event loop goes on."""

import logging

logger = logging.getLogger(__name__)

BORDERS = ("report", "sweep", "worker_lost", "send", "submit", "end", "metrics", "discovery")


class Borders:
    """Counts unforeseen errors by the border at which they were stopped (`baton_internal_errors_total`)."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(BORDERS, 0)

    def contain(self, where: str, whose: str, error: BaseException) -> None:
        """Logs the error once, with the request that it ends, and counts it. Raises it again if it is
        no failure but an order to stop, like KeyboardInterrupt."""
        # A panic of the Rust libraries is no Exception, so that nobody takes it for an expected one.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise error
        self.counts[where] += 1
        logger.error("internal error (%s) of %s; others go on", where, whose, exc_info=error)
