"""An online model of how long a worker's step takes, from what the step computes. Pure.

A step of n decoding sequences that read K cached tokens between them, and of c prompt tokens whose mean
context is x tokens, takes

    T(n, K, c, x) = base + per_decode·n + per_cached·K + per_prompt·max(0, c − free) + per_pair·c·x

seconds. The first `free` prompt tokens cost nothing, since a decode step waits for weights to be read anyway
(the roofline's ridge; Sarathi-Serve, Agrawal et al., 2024, uses the same slack for its chunks). The
coefficients are fitted by least squares to measured steps and never fall below zero.
"""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

SAMPLES_A_BUCKET = 8
REFIT_EVERY = 32
REFIT_SHARE = 0.25
"""And only after so many new steps a kept sample: a fit to many takes the host most of a millisecond."""
MAX_DEVIATIONS = 3.0
"""A sample whose residual is further from the median than this many median absolute deviations is left out:
a host that was stopped for a moment says nothing of the device."""
ANY_NUMBER = 1 << 30
"""Of tokens: more than any step has."""
_SPREAD_FLOOR = 0.02
"""Of the predicted time: residuals of a model that fits to the digit would make every next one an outlier."""

Row = npt.NDArray[np.float64]
Kept = npt.NDArray[np.bool_]


class StepShape(NamedTuple):
    """What one step computes; `context_tokens` is how many tokens a prompt token attends to, on average."""

    decodes: int
    cached_tokens: int
    prompt_tokens: int = 0
    context_tokens: float = 0.0

    def plus_chunk(self, start: int, count: int) -> "StepShape":
        """With `count` more tokens of a prompt whose first `start` are computed."""
        prompt = self.prompt_tokens + count
        pairs = self.prompt_tokens * self.context_tokens + count * (start + count / 2)
        return StepShape(self.decodes, self.cached_tokens, prompt, pairs / prompt)


@dataclass(frozen=True, slots=True)
class StepCosts:
    """The coefficients of `T`, in seconds; `free_prompt_tokens` is a count."""

    base_s: float
    per_decode_s: float
    per_cached_token_s: float
    per_prompt_token_s: float
    per_pair_s: float
    free_prompt_tokens: int = 0

    def predict_s(self, shape: StepShape) -> float:
        paid = max(0, shape.prompt_tokens - self.free_prompt_tokens)
        return (
            self.base_s
            + self.per_decode_s * shape.decodes
            + self.per_cached_token_s * shape.cached_tokens
            + self.per_prompt_token_s * paid
            + self.per_pair_s * shape.prompt_tokens * shape.context_tokens
        )

    def prompt_tokens_within(
        self, target_s: float, decodes: int, cached_tokens: int, context_tokens: float
    ) -> int:
        """The most prompt tokens that a step may compute beside these decodes and end within `target_s`;
        0 where the decodes alone take longer."""
        slack_s = target_s - self.predict_s(StepShape(decodes, cached_tokens))
        if slack_s < 0:
            return 0
        pair_s = self.per_pair_s * context_tokens
        if pair_s > 0 and pair_s * self.free_prompt_tokens >= slack_s:
            return int(slack_s / pair_s)
        each_s = self.per_prompt_token_s + pair_s
        paid_s = slack_s + self.per_prompt_token_s * self.free_prompt_tokens
        return int(paid_s / each_s) if paid_s < each_s * ANY_NUMBER else ANY_NUMBER


def unknown_costs(free_prompt_tokens: int = 0) -> StepCosts:
    """What steps cost where none has been measured: nothing. So no step is too long, and any number of prompt
    tokens fits, until the first `REFIT_EVERY` steps, the warm-up, have been fitted."""
    return StepCosts(0.0, 0.0, 0.0, 0.0, 0.0, free_prompt_tokens)


class StepTimeModel:
    """`costs` follow what is measured, from the first fit on. Samples are kept by size of the step, the
    latest few of each, so that an hour of idling does not make the model forget what a full step takes."""

    def __init__(self, costs: StepCosts) -> None:
        self.costs = costs
        self._fitted = costs != unknown_costs(costs.free_prompt_tokens)
        self._free = costs.free_prompt_tokens
        self._buckets: dict[tuple[int, int, int], deque[tuple[Row, float]]] = {}
        self._since_fit = 0
        self.predicted_s = 0.0
        """Sums over all observed steps, as they were predicted before; beside `measured_s`."""
        self.measured_s = 0.0
        self.absolute_error_s = 0.0
        self.observed = 0

    def observe(self, shape: StepShape, seconds: float) -> None:
        """A step of this shape took so long."""
        predicted_s = self.costs.predict_s(shape)
        self.observed += 1
        self.predicted_s += predicted_s
        self.measured_s += seconds
        self.absolute_error_s += abs(seconds - predicted_s)
        bucket = self._buckets.setdefault(_bucket(shape), deque(maxlen=SAMPLES_A_BUCKET))
        bucket.append((self._features(shape), seconds))
        self._since_fit += 1
        if self._since_fit >= REFIT_EVERY and self._since_fit >= self._samples() * REFIT_SHARE:
            self._since_fit = 0
            self._fit()

    def _samples(self) -> int:
        return sum(map(len, self._buckets.values()))

    def _features(self, shape: StepShape) -> Row:
        paid = max(0, shape.prompt_tokens - self._free)
        pairs = shape.prompt_tokens * shape.context_tokens
        return np.array([1.0, shape.decodes, shape.cached_tokens, paid, pairs])

    def _fit(self) -> None:
        samples = [sample for bucket in self._buckets.values() for sample in bucket]
        features = np.array([row for row, _ in samples])
        times_s = np.array([seconds for _, seconds in samples])
        prompts = np.array([bucket[1] > 0 for bucket, kept in self._buckets.items() for _ in kept])
        kept = _inliers_of_kinds(features @ _vector(self.costs), times_s, prompts)
        if kept.sum() < features.shape[1] or not self._fitted:  # nothing is far off from what is not known
            kept = np.ones(len(samples), dtype=bool)
        fitted = _nonnegative(features[kept], times_s[kept], _vector(self.costs))
        again = _inliers_of_kinds(features @ fitted, times_s, prompts)
        if again.sum() >= features.shape[1]:
            fitted = _nonnegative(features[again], times_s[again], _vector(self.costs))
        self._fitted = True
        base, decode, cached, prompt, pair = map(float, fitted)
        self.costs = StepCosts(base, decode, cached, prompt, pair, self._free)


def _vector(costs: StepCosts) -> Row:
    return np.array(
        [
            costs.base_s,
            costs.per_decode_s,
            costs.per_cached_token_s,
            costs.per_prompt_token_s,
            costs.per_pair_s,
        ]
    )


def _bucket(shape: StepShape) -> tuple[int, int, int]:
    """Powers of two of decodes, prompt tokens and the tokens that are read."""
    read = shape.cached_tokens + int(shape.prompt_tokens * shape.context_tokens)
    return shape.decodes.bit_length(), shape.prompt_tokens.bit_length(), read.bit_length() // 2


def _inliers_of_kinds(predicted_s: Row, times_s: Row, prompts: Kept) -> Kept:
    """Steps with prompts and steps without are judged among their own: the costs of a prompt that were never
    measured are wrong for all prompts alike, and that makes none of them an outlier."""
    kept = np.zeros(len(times_s), dtype=bool)
    for kind in (prompts, ~prompts):
        if kind.any():
            kept[kind] = _inliers(predicted_s[kind], times_s[kind])
    return kept


def _inliers(predicted_s: Row, times_s: Row) -> Kept:
    residuals = (times_s - predicted_s) / np.maximum(predicted_s, 1e-9)
    from_median = np.abs(residuals - np.median(residuals))
    spread = max(float(np.median(from_median)), _SPREAD_FLOOR)
    return from_median <= MAX_DEVIATIONS * spread


def _nonnegative(features: Row, times_s: Row, before: Row) -> Row:
    """Least squares of relative errors. A coefficient that the samples do not show (its column is zero, or
    it would be negative) keeps what it was `before`, and the others are fitted to the rest."""
    weights = 1.0 / np.maximum(times_s, 1e-6)
    scale = np.maximum(np.abs(features).max(axis=0), 1e-12)
    free = [at for at in range(features.shape[1]) if np.ptp(features[:, at]) > 0 or at == 0]
    while free:
        fixed = [at for at in range(features.shape[1]) if at not in free]
        rest_s = times_s - features[:, fixed] @ before[fixed]
        columns = features[:, free] / scale[free]
        solved, _, rank, _ = np.linalg.lstsq(columns * weights[:, None], rest_s * weights, rcond=1e-6)
        values = solved / scale[free]
        negative = [at for at, value in zip(free, values, strict=True) if value < 0]
        if not negative and rank == len(free):
            fitted = before.copy()
            fitted[free] = values
            return fitted
        if not negative:  # two columns that always grow together: the later one keeps its value
            negative = free[-1:]
        free = [at for at in free if at not in negative]
    return before
