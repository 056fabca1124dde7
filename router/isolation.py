"""Where one loop serves many requests: one that fails fails by itself, and the loop goes on."""

import logging

logger = logging.getLogger(__name__)

BORDERS = ("report", "sweep", "worker_lost", "send", "submit", "end", "metrics", "discovery")


class Borders:
    """Counts, by the border, what nobody foresaw (`baton_internal_errors_total`)."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(BORDERS, 0)

    def contain(self, where: str, whose: str, error: BaseException) -> None:
        """Says once what has failed, and for whom. Raises again what is no failure but an order to stop."""
        # A panic of the Rust libraries is no Exception, so that nobody takes it for an expected one.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise error
        self.counts[where] += 1
        logger.error("internal error (%s) of %s; others go on", where, whose, exc_info=error)
