"""What the roles that decode share: the next step is launched while the one before runs.

1. Plan a step as if every choice went on, and launch it. Tokens that the step before is still sampling are
   named in its rows by their samples: they are on the device, and the host has not seen them.
2. Collect the step before once the device is done with it: settle its tokens, report them, end the choices
   that end with them. Until then turns go by, so that the loop sees to transfers meanwhile.
3. What the step now in flight computes for a choice that has ended is thrown away when it is collected.

Of each step it is measured how long it took, which the model of step times learns (step_time.py).

A sample that looks at all tokens before it (penalties) makes 2 come before 1. So does an engine that finishes
its steps before `launch` returns: there, nothing is left in flight between two steps.
"""

from dataclasses import asdict
from typing import Any, Generic, TypeVar

from kvtransfer.messages import WITHDRAWN
from services.engine.batch import RowResult, SampledToken
from services.roles.role import InFlightStep, Role, WorkerContext, sharing
from services.scheduler.decode import DecodeScheduler
from services.scheduler.sequence import Chunk, Sequence, State
from services.scheduler.step_time import StepTimeModel
from services.scheduler.unified import UnifiedScheduler

Scheduler = TypeVar("Scheduler", DecodeScheduler, UnifiedScheduler)


class DecodingRole(Role, Generic[Scheduler]):
    def __init__(self, context: WorkerContext, scheduler: type[Scheduler]) -> None:
        super().__init__(context)
        limits = context.limits
        self.scheduler: Scheduler = scheduler(
            context.pool,
            limits.max_batch,
            context.max_chunk_tokens,
            limits.max_sequence_tokens,
            context.deadline,
        )
        self._step_before: InFlightStep | None = None
        self._step_in_flight: InFlightStep | None = None
        self._done_s = 0.0
        """When the last step was seen to be done."""
        self._done_late = False
        """It was seen so late that the next one had ended as well."""

    @property
    def in_flight(self) -> bool:
        return self._step_before is not None or self._step_in_flight is not None

    def step(self) -> bool:
        if self._step_before is not None:
            return self._collect_before()
        worked = self.in_flight
        if self.scheduler.batch.reads_pending() and not self._settle():
            return True
        preemptions = self.preemptions()
        plan = self.scheduler.schedule()
        self._step_before, self._step_in_flight = self._step_in_flight, None
        if plan:
            self._step_in_flight = self.launch(plan)
            if self._step_in_flight is not None:
                self.scheduler.launched(plan)
        if self._step_before is not None:
            self._collect_before()
        if not self.context.overlap:
            self._settle()
        # Whoever lost its pages has left room for what waits, even if nothing is left to run now.
        return worked or bool(plan) or self.preemptions() > preemptions

    def preemptions(self) -> int:
        return self.scheduler.batch.preemptions

    def spoil(self, sequence: Sequence, position: int) -> list[Sequence]:
        return sharing(self.scheduler.batch.spoil(sequence, position), self.scheduler.sequences())

    def take_chunk(self, chunk: Chunk, row: RowResult) -> None:
        """A computed chunk of a sequence that has not ended since."""
        if chunk.samples:
            self.append(chunk.sequence, row.sampled[0])

    def append(self, sequence: Sequence, sampled: SampledToken) -> None:
        """A choice's next token is known: report it, and end the choice if it ends with it."""
        running = self.context.requests.get(sequence.work.request_id)
        if running is None:
            return
        output_tokens, choice = sequence.settle(sampled.token), sequence.choices[0]
        ended = self.report_token(running, choice, output_tokens, sampled)
        if ended and self.scheduler.end(running.work.request_id, choice):
            self.end(running.work.request_id, WITHDRAWN)

    def _collect_before(self) -> bool:
        """Collect the step before the last, if it is done. True: there is more to do."""
        if self._step_before is not None and self._step_before.launched.is_done:
            before, self._step_before = self._step_before, None
            self._take_results(before)
        return True

    def _settle(self) -> bool:
        """Collect the step in flight, so that none is; False while it is not done."""
        if self._step_in_flight is None:
            return True
        if not self._step_in_flight.launched.is_done:
            return False
        step, self._step_in_flight = self._step_in_flight, None
        self._take_results(step)
        return True

    def _next_is_done(self) -> bool:
        return self._step_in_flight is not None and self._step_in_flight.launched.is_done

    def _take_results(self, step: InFlightStep) -> None:
        """Report what a step that is done has sampled, and how long it took: since its launch began (the
        device may begin before it ends) or, if it was queued behind the step before, since that one was done.
        Where the end of one was not seen before the end of the next, the time of neither is known.
        """
        before_s, self._done_s = self._done_s, self.context.clock()
        was_late, self._done_late = self._done_late, self._next_is_done()
        result = self.collect(step, after=self._step_in_flight)
        if result is None:
            return
        for sequence, sampled in result.decodes:
            try:
                if sequence.state is not State.ENDED:
                    self.append(sequence, sampled)
            except Exception as error:
                self.contain("token", sequence.work.request_id, error)
        for chunk, row in result.chunks:
            try:
                if chunk.sequence.state is not State.ENDED:
                    self.take_chunk(chunk, row)
            except Exception as error:
                self.contain("chunk", chunk.sequence.work.request_id, error)
        step_s = self._done_s - max(step.begun_s, before_s)
        if step_s > 0 and not (was_late or self._done_late):
            self.context.deadline.model.observe(step.shape, step_s)  # last: a fit takes a moment


def step_times(model: StepTimeModel) -> dict[str, Any]:
    """What a status says of the steps that were measured."""
    return {
        "measured_steps": model.observed,
        "measured_steps_s": model.measured_s,
        "predicted_steps_s": model.predicted_s,
        "step_costs": asdict(model.costs),
    }
