"""A step that was handed to the device, and what becomes of it."""

from dataclasses import dataclass, field

from services.engine.batch import RowResult
from services.engine.errors import EngineStateError
from services.engine.marks import Mark
from services.engine.sampler import QueuedDraws, QueuedLogprobs


@dataclass(slots=True, eq=False)
class Launched:
    """Results of `row_count` rows. `owners[i]` is the row of the i-th of `draws`, `prompts` the parts of the
    rows' prompt log probabilities in order, `done` what passes when all of them are in host memory (None:
    they are). Every launch is collected once, or never where nothing of it is wanted."""

    row_count: int
    owners: list[int] = field(default_factory=list)
    draws: QueuedDraws | None = None
    prompts: list[tuple[int, QueuedLogprobs]] = field(default_factory=list)
    done: Mark | None = None
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
        results = [RowResult() for _ in range(self.row_count)]
        for at, logprobs in self.prompts:
            results[at].prompt_logprobs += logprobs.collect()
        if self.draws is not None:
            for at, drawn in zip(self.owners, self.draws.collect(), strict=True):
                results[at].drawn.append(drawn)
        return results
