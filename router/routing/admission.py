"""Admission control: a prompt is taken in or refused at once, by what its wait would be. Pure.

A refusal while a request waits for nothing is worth more than a time-out after the wait: the client can go
elsewhere. What is predicted is the time to the first token, from the prompts that wait before this one and
from what prompts have cost lately on that worker: a line through (tokens, seconds) pairs, newest first,
since a short prompt costs a step and a long one its tokens. Orca and Mooncake refuse by the same prediction.
"""

import math
from collections.abc import Sequence

from router.errors import ApiError
from router.routing.policy import Placement

KEEP = 0.95
"""What an observation weighs after each later one."""
LONGEST_RETRY_S = 60


class Pace:
    """What prompts have cost one worker: `seconds = a * prompts + b * tokens`, by least squares.

    The cost of a prompt is the time since the one before was done, or since it came if none waited: time in
    which the worker had something to do. Prompts that are done at once therefore share it.
    """

    __slots__ = ("_count", "_done_s", "_seconds", "_tokens", "_tokens_seconds", "_tokens_tokens")

    def __init__(self) -> None:
        self._count = self._tokens = self._seconds = 0.0
        self._tokens_tokens = self._tokens_seconds = 0.0
        self._done_s = float("-inf")

    def observe(self, tokens: int, submitted_s: float, now_s: float) -> None:
        """A prompt of `tokens` is done."""
        busy_s = max(0.0, now_s - max(submitted_s, self._done_s))
        self._done_s = now_s
        self._count = self._count * KEEP + 1
        self._tokens = self._tokens * KEEP + tokens
        self._seconds = self._seconds * KEEP + busy_s
        self._tokens_tokens = self._tokens_tokens * KEEP + tokens * tokens
        self._tokens_seconds = self._tokens_seconds * KEEP + tokens * busy_s

    def seconds_for(self, prompts: int, tokens: int) -> float | None:
        """For so many prompts of so many tokens together; None while nothing was observed."""
        if not self._count:
            return None
        mean_tokens, mean_s = self._tokens / self._count, self._seconds / self._count
        variance = self._tokens_tokens / self._count - mean_tokens * mean_tokens
        slope = 0.0
        # Where all prompts had about the same length, that says nothing of longer ones: hope, and learn.
        if variance > 1e-3 * mean_tokens * mean_tokens:
            covariance = self._tokens_seconds / self._count - mean_tokens * mean_s
            slope = min(max(0.0, covariance / variance), mean_s / mean_tokens)
        return prompts * max(0.0, mean_s - slope * mean_tokens) + tokens * slope


class Admission:
    """`ttft_slo_s`: the longest predicted time to the first token. `max_kv_load`: prompt tokens in flight on
    one decode worker, as a multiple of what its KV pool holds. None: no such limit."""

    def __init__(self, ttft_slo_s: float | None, max_kv_load: float | None, retry_after_s: int) -> None:
        self._ttft_slo_s, self._max_kv_load, self._retry_after_s = ttft_slo_s, max_kv_load, retry_after_s
        self._paces: dict[str, Pace] = {}

    def observe(self, worker: str, tokens: int, submitted_s: float, now_s: float) -> None:
        """`worker` is done with a prompt that came at `submitted_s`."""
        if self._ttft_slo_s is not None:
            self._paces.setdefault(worker, Pace()).observe(tokens, submitted_s, now_s)

    def forget(self, worker: str) -> None:
        """It is gone: the next one at its address may be another machine."""
        self._paces.pop(worker, None)

    def check(self, placement: Placement, prompts: Sequence[int], queued_prompts: int) -> None:
        """Raises ApiError 429 where prompts of these lengths, together, would wait too long.

        `queued_prompts` are those that wait on the worker already. An idle worker takes anything: waiting
        would not make it faster.
        """
        incoming = sum(prompts)
        worker = placement.prefill or placement.decode
        if self._ttft_slo_s is not None and queued_prompts and worker.name in self._paces:
            tokens = worker.queued_tokens + incoming
            wait_s = self._paces[worker.name].seconds_for(queued_prompts + len(prompts), tokens)
            if wait_s is not None and wait_s > self._ttft_slo_s:
                over_s = math.ceil(wait_s - self._ttft_slo_s)
                raise self._overloaded(
                    f"the first token would take about {wait_s:.1f} s, over {self._ttft_slo_s:g} s",
                    min(LONGEST_RETRY_S, max(self._retry_after_s, over_s)),
                )
        decode = placement.decode
        if self._max_kv_load is not None and decode.live_tokens:
            room_tokens = decode.pages * decode.page_size_tokens
            load = (decode.live_tokens + incoming) / max(1, room_tokens)
            if load > self._max_kv_load:
                raise self._overloaded(
                    f"prompts in flight would fill the KV cache {load:.1f} times, over {self._max_kv_load:g}",
                    self._retry_after_s,
                )

    def _overloaded(self, why: str, retry_after_s: int) -> ApiError:
        return ApiError(
            429, f"The server is overloaded: {why}.", code="overloaded", retry_after_s=retry_after_s
        )
