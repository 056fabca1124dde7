"""Where one turn serves many requests: one that fails fails by itself, and the worker goes on."""

import logging
from collections import Counter

from services.scheduler.errors import SchedulerError
from services.tensor_parallel.link import RankLost
from services.tensor_parallel.rank_pool import RankError

log = logging.getLogger(__name__)

_EVERYBODYS = (RankError, RankLost, SchedulerError, MemoryError)
"""Accounts that do not add up, or a rank that is gone: no request can be trusted to the rest."""


def contain(
    where: str, request_id: int | None, error: Exception, counters: Counter[str], on_gpu: bool
) -> None:
    """Says and counts once what nobody foresaw. Raises it again where it is not one request's: the worker
    ends then, as after any failure of its engine on a GPU, whose context may be spoilt."""
    if isinstance(error, _EVERYBODYS) or (on_gpu and isinstance(error, RuntimeError)):
        raise error
    counters[f"internal_errors_{where}"] += 1
    whose = "no request" if request_id is None else f"request {request_id}"
    log.error("internal error (%s) of %s; others go on", where, whose, exc_info=error)
