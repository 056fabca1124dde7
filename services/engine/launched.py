"""A step that was handed to the device, and what becomes of it."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from services.engine.batch import Row, RowResult
from services.engine.errors import EngineStateError
from services.engine.events import Event
from services.engine.sampling.sample_kernels import NO_TOKEN
from services.engine.sampling.sampler import QueuedLogprobs, QueuedSamples


@dataclass(frozen=True, slots=True)
class QueuedNonfinite:
    """Which tokens of a step have numbers that are not finite: int32, on its way to the host, for `rows` as
    they lie on the device; row i of them is number `order[i]` of the step."""

    on_host: Tensor
    rows: list[Row]
    order: list[int]

    def collect(self) -> list[tuple[int, int]]:
        """The step's rows that have such tokens, each with the first one's position."""
        if not self.on_host.numpy().any():
            return []
        found: list[tuple[int, int]] = []
        parts = torch.split(self.on_host, [len(row.tokens) for row in self.rows])
        for at, row, marks in zip(self.order, self.rows, parts, strict=True):
            marked = marks.nonzero()
            if marked.numel():
                found.append((at, row.start + int(marked[0])))
        return found


@dataclass(slots=True, eq=False)
class Launched:
    """Results of `rows`. `owners[i]` is the row of the i-th of `samples`, `prompts` the parts of the
    rows' prompt log probabilities in order, `done` what passes when all of them are in host memory (None:
    they are). Every launch is collected once, or never where nothing of it is wanted."""

    rows: list[Row]
    owners: list[int] = field(default_factory=list)
    samples: QueuedSamples | None = None
    prompts: list[tuple[int, QueuedLogprobs]] = field(default_factory=list)
    marks: QueuedNonfinite | None = None
    done: Event | None = None
    _is_collected: bool = False

    @property
    def is_done(self) -> bool:
        """Whether `collect` would return at once."""
        return self.done is None or self.done.query()

    def collect(self) -> list[RowResult]:
        """Wait for the step; results in the order of its rows. The steps launched after it are not waited
        for. Raises `EngineStateError` the second time."""
        if self._is_collected:
            raise EngineStateError("a launch is collected once")
        self._is_collected = True
        if self.done is not None:
            self.done.synchronize()
        results = [RowResult() for _ in self.rows]
        for at, position in self.marks.collect() if self.marks is not None else []:
            results[at].spoil(position)
        for at, logprobs in self.prompts:
            self._take_prompt(results[at], self.rows[at].start, logprobs)
        if self.samples is not None:
            for at, sampled in zip(self.owners, self.samples.collect(), strict=True):
                results[at].sampled.append(sampled)
                if sampled.token == NO_TOKEN:
                    results[at].spoil(self.rows[at].start + len(self.rows[at].tokens) - 1)
        return results

    def _take_prompt(self, result: RowResult, start: int, queued: QueuedLogprobs) -> None:
        """Logits that are no distribution make every log probability NaN."""
        first = start + len(result.prompt_logprobs)
        logprobs = queued.collect()
        result.prompt_logprobs += logprobs
        for position, logprob in enumerate(logprobs, first):
            if math.isnan(logprob.logprob):
                result.spoil(position)
                return
