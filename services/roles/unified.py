"""The unified role: prompts and decoding choices in every step, no transfer."""

from kvtransfer.client import TransferLost
from kvtransfer.messages import Event
from services.engine.batch import Drawn, RowResult
from services.messages import Cancel, FirstToken, Generate, Request
from services.roles.role import Occupancy, Parts, Role
from services.scheduler.sequence import Sequence
from services.scheduler.unified import UnifiedScheduler


class UnifiedRole(Role):
    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.scheduler = UnifiedScheduler(parts.pool, parts.limits.max_batch, parts.max_chunk_tokens)

    def accept(self, router: bytes, request: Request) -> None:
        match request:
            case Generate(work=work):
                if self.take(router, work, None, len(self.scheduler.waiting)) is not None:
                    self.scheduler.add(work)
            case Cancel(request_id=request_id, choice=int(choice)):
                if self.scheduler.end(request_id, choice):
                    self.parts.requests.remove(request_id)
            case Cancel():
                self.cancel(request)
            case _:
                self.parts.counters["dropped_wrong_role"] += 1

    def on_transfer(self, event: Event | TransferLost) -> None:
        self.parts.counters["dropped_transfer_event"] += 1

    def step(self) -> bool:
        plan = self.scheduler.schedule()
        if not plan:
            return False
        result = self.execute(plan)
        if result is None:
            return True
        self.scheduler.finish_step(plan)
        for sequence, drawn in result.decodes:
            self._append(sequence, drawn)
        for chunk, row in result.chunks:
            self.collect_prompt_logprobs(chunk, row)
            if not chunk.draws:
                continue
            if len(chunk.sequence.tokens) == chunk.sequence.prompt_tokens:
                self._fork(chunk.sequence, row)
            else:
                self._append(chunk.sequence, row.drawn[0])
        return True

    def occupancy(self) -> Occupancy:
        queued = len(self.scheduler.waiting) + len(self.scheduler.batch.resuming)
        return Occupancy(queued=queued, running=len(self.scheduler.batch))

    def preemptions(self) -> int:
        return self.scheduler.batch.preemptions

    def release(self, request_id: int, reason: str) -> None:
        self.scheduler.end(request_id)

    def _fork(self, prompt: Sequence, row: RowResult) -> None:
        """A prompt's end: report every choice's first token, and go on with those that did not end."""
        live = self.parts.requests.get(prompt.work.request_id)
        if live is None:
            return
        self.report_prefill(live, prompt)
        going: list[FirstToken] = []
        for choice, drawn in zip(prompt.choices, row.drawn, strict=True):
            if not self.report_token(live, choice, 1, drawn):
                going.append(FirstToken(choice, drawn.token))
        self.parts.engine.copy_pages(self.scheduler.fork(prompt, going))
        if not going:
            self.parts.requests.remove(live.work.request_id)

    def _append(self, sequence: Sequence, drawn: Drawn) -> None:
        live = self.parts.requests.get(sequence.work.request_id)
        if live is None:
            return
        sequence.tokens.append(drawn.token)
        choice, output_tokens = sequence.choices[0], len(sequence.tokens) - sequence.prompt_tokens
        ended = self.report_token(live, choice, output_tokens, drawn)
        if ended and self.scheduler.end(live.work.request_id, choice):
            self.parts.requests.remove(live.work.request_id)
