"""The unified worker's policy: prompts and decoding choices share every step (chunked prefill)."""

from collections import deque

from services.protocol.messages import FirstToken, SequenceRequest
from services.scheduler.batch import RunningBatch
from services.scheduler.pages import PagePool
from services.scheduler.sequence import Sequence, State, StepPlan, prompt_sequence
from services.scheduler.step_deadline import StepDeadline


class UnifiedScheduler:
    def __init__(
        self,
        pool: PagePool,
        max_batch: int,
        max_chunk_tokens: int,
        max_sequence_tokens: int | None = None,
        deadline: StepDeadline | None = None,
    ) -> None:
        self.batch = RunningBatch(pool, max_batch, max_chunk_tokens, max_sequence_tokens, deadline=deadline)
        self.waiting: deque[Sequence] = deque()
        self._sequences: dict[int, list[Sequence]] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def add(self, work: SequenceRequest) -> Sequence:
        sequence = prompt_sequence(work)
        self.batch.number(sequence)
        self._sequences[work.request_id] = [sequence]
        self.waiting.append(sequence)
        return sequence

    def schedule(self) -> StepPlan:
        self.batch.admit_resuming()
        while self.waiting and not self.batch.resuming and self.batch.wants_more():
            if not self.batch.admit(self.waiting[0]):
                break
            self.waiting.popleft()
        return self.batch.plan_step()

    def launched(self, plan: StepPlan) -> None:
        self.batch.launched(plan)

    def fork(self, prompt: Sequence, first_tokens: list[FirstToken]) -> list[tuple[int, int]]:
        """A computed prompt goes on as these choices; returns page copies that are due at once."""
        request_id = prompt.work.request_id
        copies, sequences = self.batch.fork(prompt, first_tokens)
        if sequences:
            self._sequences[request_id] = sequences
        else:
            del self._sequences[request_id]
        return copies

    def sequences(self) -> list[Sequence]:
        """All that have not ended."""
        return [one for sequences in self._sequences.values() for one in sequences]

    def end(self, request_id: int, choice: int | None = None) -> bool:
        """End a request, or one choice; True when nothing of the request is left. Unknown ids: False."""
        sequences = self._sequences.get(request_id)
        if sequences is None:
            return False
        keep: list[Sequence] = []
        for sequence in sequences:
            if choice is not None and sequence.choices != [choice]:
                if choice in sequence.choices:
                    sequence.choices.remove(choice)
                keep.append(sequence)
                continue
            if sequence.state is State.WAITING and sequence in self.waiting:
                self.waiting.remove(sequence)
            self.batch.end(sequence)
        if keep:
            self._sequences[request_id] = keep
            return False
        del self._sequences[request_id]
        return True
