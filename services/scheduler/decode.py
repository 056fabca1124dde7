"""The decode worker's policy: which prompts get pages, and which choices run.

A request passes three gates: *reserve* (pages for its prompt are taken; only then may its KV be sent),
*arrived* (the whole KV is in the pages) and *join* (the first tokens are known). The last two come in
either order. A choice preempted for lack of pages is computed again here, in chunks, like any prompt: the
engine is the same, the role is policy.
"""

from collections import deque
from dataclasses import dataclass, field

from services.protocol.messages import FirstToken, SequenceRequest
from services.scheduler.batch import RunningBatch
from services.scheduler.pages import PagePool
from services.scheduler.sequence import Sequence, StepPlan, prompt_sequence
from services.scheduler.step_deadline import StepDeadline


@dataclass(slots=True, eq=False)
class Reservation:
    """A request between its first sight and its first decode step."""

    prompt: Sequence
    arrived: bool = False
    first_tokens: list[FirstToken] | None = None
    ended_choices: set[int] = field(default_factory=set)

    @property
    def complete(self) -> bool:
        return self.arrived and self.first_tokens is not None

    def remaining_choices(self) -> set[int]:
        """Choices that may still go on: those joined, or all while none is named, less the ended ones."""
        if self.first_tokens is None:
            return set(self.prompt.work.choice_numbers) - self.ended_choices
        return {one.choice for one in self.first_tokens} - self.ended_choices


class DecodeScheduler:
    def __init__(
        self,
        pool: PagePool,
        max_batch: int,
        max_chunk_tokens: int,
        max_sequence_tokens: int | None = None,
        deadline: StepDeadline | None = None,
    ) -> None:
        self.batch = RunningBatch(pool, max_batch, max_chunk_tokens, max_sequence_tokens, deadline=deadline)
        self.waiting: deque[Reservation] = deque()
        self.reservations: dict[int, Reservation] = {}
        self._joined: deque[Reservation] = deque()
        self._sequences: dict[int, list[Sequence]] = {}

    def __len__(self) -> int:
        return len(self.reservations) + len(self._sequences)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self.reservations or request_id in self._sequences

    @property
    def reserved(self) -> int:
        """Requests that hold pages and wait for KV, first tokens, or a place in the batch."""
        return len(self.reservations) - len(self.waiting)

    # ------------------------------------------------------------ the three gates

    def add(self, work: SequenceRequest) -> Sequence:
        prompt = prompt_sequence(work)
        self.batch.number(prompt)
        reservation = Reservation(prompt)
        self.reservations[work.request_id] = reservation
        self.waiting.append(reservation)
        return prompt

    def reserve(self) -> list[Sequence]:
        """Take pages for as many waiting requests as there are, in order of arrival; returns them.

        `cached_tokens` of each are already there: only the rest must be sent. Nothing is reserved while a
        preempted choice waits for pages.
        """
        reserved: list[Sequence] = []
        while self.waiting and not self.batch.resuming and self.batch.reserve(self.waiting[0].prompt):
            reserved.append(self.waiting.popleft().prompt)
        return reserved

    def arrived(self, request_id: int) -> Reservation | None:
        """All of a reserved prompt's KV is in its pages. Returns the reservation if it is complete now."""
        reservation = self.reservations.get(request_id)
        if reservation is None:
            return None
        reservation.arrived = True
        reservation.prompt.computed_tokens = len(reservation.prompt.tokens)
        self.batch.publish(reservation.prompt, 0)
        return self._complete(reservation)

    def join(self, request_id: int, first_tokens: list[FirstToken]) -> Reservation | None:
        """The choices that go on. Returns the reservation if it is complete now."""
        reservation = self.reservations.get(request_id)
        if reservation is None or reservation.first_tokens is not None:
            return None
        reservation.first_tokens = first_tokens
        if not reservation.remaining_choices():
            self._drop(reservation)
            return None
        return self._complete(reservation)

    def start(self) -> list[tuple[int, int]]:
        """Move complete reservations into the batch while it has room; returns due page copies."""
        copies: list[tuple[int, int]] = []
        while self._joined:
            reservation = self._joined[0]
            choices = reservation.remaining_choices()
            going = [one for one in reservation.first_tokens or [] if one.choice in choices]
            if not self.batch.has_room(len(going)):
                break
            self._joined.popleft()
            request_id = reservation.prompt.work.request_id
            del self.reservations[request_id]
            forked, sequences = self.batch.fork(reservation.prompt, going)
            copies += forked
            if sequences:
                self._sequences[request_id] = sequences
        return copies

    # ------------------------------------------------------------ steps

    def schedule(self) -> StepPlan:
        self.batch.admit_resuming()
        return self.batch.plan_step()

    def launched(self, plan: StepPlan) -> None:
        self.batch.launched(plan)

    def sequences(self) -> list[Sequence]:
        """All that have not ended."""
        prompts = [reservation.prompt for reservation in self.reservations.values()]
        return prompts + [one for sequences in self._sequences.values() for one in sequences]

    def end(self, request_id: int, choice: int | None = None) -> bool:
        """End a request, or one choice; True when nothing of the request is left. Unknown ids: False."""
        reservation = self.reservations.get(request_id)
        if reservation is not None:
            return self._end_reservation(reservation, choice)
        sequences = self._sequences.get(request_id)
        if sequences is None:
            return False
        gone = [one for one in sequences if choice is None or one.choices == [choice]]
        for sequence in gone:
            self.batch.end(sequence)
        left = [one for one in sequences if one not in gone]
        if left:
            self._sequences[request_id] = left
            return False
        del self._sequences[request_id]
        return True

    def _complete(self, reservation: Reservation) -> Reservation | None:
        if not reservation.complete:
            return None
        self._joined.append(reservation)
        return reservation

    def _end_reservation(self, reservation: Reservation, choice: int | None) -> bool:
        if choice is not None:
            reservation.ended_choices.add(choice)
            if reservation.remaining_choices():
                return False
        self._drop(reservation)
        return True

    def _drop(self, reservation: Reservation) -> None:
        del self.reservations[reservation.prompt.work.request_id]
        for queue in (self.waiting, self._joined):
            if reservation in queue:
                queue.remove(reservation)
        self.batch.end(reservation.prompt)
