"""Failures of workers as errors for the client, and whether the router may run the work again. Pure."""

from router.errors import ApiError
from services.protocol.messages import Failed

_ERRORS: dict[str, tuple[int, str | None]] = {
    "invalid": (400, None),
    "too_long": (400, "context_length_exceeded"),
    "overloaded": (429, "overloaded"),
    "deadline": (504, "deadline_exceeded"),
    "transfer": (503, "transfer_failed"),
    "draining": (503, "draining"),
    "internal": (500, "internal_error"),
    "invalid_logits": (500, "invalid_logits"),
}
_RETRIED = frozenset({"overloaded", "transfer", "draining", "internal"})
"""What another attempt may mend, where the worker says so too."""


def error_of(report: Failed, retry_after_s: int, committed: bool) -> ApiError:
    """The client's view of a worker's failure. Logits that are no numbers come from the checkpoint or from
    the prompt, whichever worker or client tries them again."""
    status, code = _ERRORS[report.code]
    return ApiError(
        status,
        report.message or report.code,
        code=code,
        retry_after_s=retry_after_s if status in (429, 503) else None,
        committed=committed or report.code == "invalid_logits",
        retry_reason=report.code if report.retryable and report.code in _RETRIED else None,
    )


def lost_error(role: str, retry_after_s: int, committed: bool) -> ApiError:
    """A worker is gone, or silent, or it was restarted."""
    return ApiError(
        503,
        f"The {role} worker was lost while it ran this request.",
        code="worker_lost",
        retry_after_s=retry_after_s,
        committed=committed,
        retry_reason=f"{role}_lost",
    )


def given_up(error: ApiError, last: bool) -> ApiError:
    """An error that is not retried here any more. `last`: the request has had all its attempts; it may be
    what kills its workers, so a client library must not send it again by itself."""
    return ApiError(
        error.status,
        error.message,
        code=error.code,
        retry_after_s=error.retry_after_s,
        committed=error.committed or last,
    )
