"""The prefill worker's policy: which prompts run, and whose KV is kept until it is handed over.

A prompt whose reservation is confirmed goes first: its KV can leave while it is computed. One that is not
confirmed yet runs only while no confirmed one waits, and gives its pages back if a confirmed one needs
them; it is then computed again later, without sampling its first tokens a second time.
"""

from services.protocol.messages import SequenceRequest
from services.scheduler.batch import RunningBatch
from services.scheduler.chunks import DEFAULT_TAIL_TOKENS
from services.scheduler.pages import PagePool
from services.scheduler.sequence import Sequence, State, StepPlan, prompt_sequence


class PrefillScheduler:
    def __init__(
        self, pool: PagePool, max_batch: int, max_chunk_tokens: int, tail_tokens: int = DEFAULT_TAIL_TOKENS
    ) -> None:
        self.batch = RunningBatch(pool, max_batch, max_chunk_tokens, tail_tokens=tail_tokens)
        self.waiting: list[Sequence] = []
        self.holding: dict[int, Sequence] = {}
        self._confirmed: set[int] = set()
        self._ready: list[int] = []
        self._sequences: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def add(self, work: SequenceRequest) -> Sequence:
        sequence = prompt_sequence(work)
        self.batch.number(sequence)
        self._sequences[work.request_id] = sequence
        self.waiting.append(sequence)
        return sequence

    def confirm(self, request_id: int) -> None:
        """The decode worker has pages for this request. Unknown ids have ended meanwhile."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._confirmed.add(request_id)
            if sequence.state is not State.WAITING:
                self._ready.append(request_id)

    def take_ready(self) -> list[int]:
        """Requests that are confirmed and have pages since the last call. Some may have ended."""
        ready, self._ready = self._ready, []
        return ready

    def unconfirm(self, request_id: int) -> None:
        """The decode worker is lost: what is computed stays as long as nobody who is confirmed needs its
        pages."""
        self._confirmed.discard(request_id)

    def get(self, request_id: int) -> Sequence | None:
        return self._sequences.get(request_id)

    def schedule(self) -> StepPlan:
        self._admit()
        return self.batch.plan_step()

    def launched(self, plan: StepPlan) -> list[Sequence]:
        """Count the step's tokens as computed; returns the prompts it completes, now held."""
        self.batch.launched(plan)
        done = [one.sequence for one in plan.chunks if one.sequence.pending_tokens == 0]
        for sequence in done:
            self.batch.hold(sequence)
            self.holding[sequence.work.request_id] = sequence
        return done

    def sequences(self) -> list[Sequence]:
        """All that have not ended."""
        return list(self._sequences.values())

    def end(self, request_id: int) -> Sequence | None:
        """Handed over, cancelled or failed: release everything. Unknown ids are ignored."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return None
        self._confirmed.discard(request_id)
        self.holding.pop(request_id, None)
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        self.batch.end(sequence)
        return sequence

    # ------------------------------------------------------------ admission

    def _admit(self) -> None:
        while self.batch.wants_more():
            confirmed = next((one for one in self.waiting if self._is_confirmed(one)), None)
            if confirmed is not None:
                if not self._admit_confirmed(confirmed):
                    return
            elif any(map(self._is_confirmed, self.batch.computing)) or not self._admit_unconfirmed():
                return

    def _admit_confirmed(self, sequence: Sequence) -> bool:
        while not self.batch.admit(sequence):
            unconfirmed = self._youngest_unconfirmed()
            if unconfirmed is None:
                return False
            self.holding.pop(unconfirmed.work.request_id, None)
            self.batch.reset(unconfirmed)
            self.waiting.append(unconfirmed)
            self.waiting.sort(key=lambda one: one.arrival)
        self.waiting.remove(sequence)
        self._ready.append(sequence.work.request_id)
        return True

    def _admit_unconfirmed(self) -> bool:
        # One whose first tokens are out gains nothing from being computed before it is confirmed.
        candidate = next((one for one in self.waiting if one.choices), None)
        if candidate is None or not self.batch.admit(candidate):
            return False
        self.waiting.remove(candidate)
        return True

    def _youngest_unconfirmed(self) -> Sequence | None:
        holders = [*self.batch.computing, *self.holding.values()]
        unconfirmed = [one for one in holders if not self._is_confirmed(one)]
        return max(unconfirmed, key=lambda one: one.arrival, default=None)

    def _is_confirmed(self, sequence: Sequence) -> bool:
        return sequence.work.request_id in self._confirmed
