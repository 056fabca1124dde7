"""The unified role: prompts and decoding choices in every step, no transfer."""

from kvtransfer.client import TransferLost

from kvtransfer.messages import Event
from services.engine.batch import RowResult
from services.messages import Cancel, FirstToken, Generate, Request
from services.requests import Live
from services.roles.role import Occupancy, Parts, Role
from services.scheduler.sequence import Scheduled
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
        done = self.execute(plan)
        if not done:
            return True
        self.scheduler.finish_step(plan)
        for scheduled, result in done:
            self.collect_prompt_logprobs(scheduled, result)
            live = self.parts.requests.get(scheduled.sequence.work.request_id)
            if live is None or not scheduled.draws:
                continue
            if len(scheduled.sequence.tokens) == scheduled.sequence.prompt_tokens:
                self._fork(live, scheduled, result)
            else:
                self._append(live, scheduled, result)
        return True

    def occupancy(self) -> Occupancy:
        queued = len(self.scheduler.waiting) + len(self.scheduler.batch.resuming)
        return Occupancy(queued=queued, running=len(self.scheduler.batch.running))

    def preemptions(self) -> int:
        return self.scheduler.batch.preemptions

    def release(self, request_id: int, reason: str) -> None:
        self.scheduler.end(request_id)

    def _fork(self, live: Live, scheduled: Scheduled, result: RowResult) -> None:
        prompt = scheduled.sequence
        self.report_prefill(live, prompt)
        going: list[FirstToken] = []
        for choice, drawn in zip(prompt.choices, result.drawn, strict=True):
            if not self.report_token(live, choice, 1, drawn):
                going.append(FirstToken(choice, drawn.token))
        self.parts.engine.copy_pages(self.scheduler.fork(prompt, going))
        if not going:
            self.parts.requests.remove(live.work.request_id)

    def _append(self, live: Live, scheduled: Scheduled, result: RowResult) -> None:
        sequence, drawn = scheduled.sequence, result.drawn[0]
        sequence.tokens.append(drawn.token)
        choice = sequence.choices[0]
        output_tokens = len(sequence.tokens) - sequence.prompt_tokens
        if self.report_token(live, choice, output_tokens, drawn) and self.scheduler.end(
            live.work.request_id, choice
        ):
            self.parts.requests.remove(live.work.request_id)
