"""The unified role: prompts and decoding choices in every step, no transfer."""

from kvtransfer.client import WorkerEvent
from services.engine.batch import RowResult
from services.protocol.messages import Cancel, FirstToken, Generate, Request
from services.roles.decoding import DecodingRole
from services.roles.role import Occupancy, WorkerContext
from services.scheduler.sequence import Chunk, State
from services.scheduler.unified import UnifiedScheduler


class UnifiedRole(DecodingRole[UnifiedScheduler]):
    def __init__(self, context: WorkerContext) -> None:
        super().__init__(context, UnifiedScheduler)

    def accept(self, router: bytes, request: Request) -> None:
        match request:
            case Generate(work=work):
                if self.take(router, work, None, len(self.scheduler.waiting)) is not None:
                    self.scheduler.add(work)
            case Cancel(request_id=request_id, choice=int(choice)):
                if self.scheduler.end(request_id, choice):
                    self.context.requests.remove(request_id)
            case Cancel():
                self.cancel(request)
            case _:
                self.context.counters["dropped_wrong_role"] += 1

    def on_transfer(self, event: WorkerEvent) -> None:
        self.context.counters["dropped_transfer_event"] += 1

    def take_chunk(self, chunk: Chunk, row: RowResult) -> None:
        self.collect_prompt_logprobs(chunk, row)
        if len(chunk.sequence.tokens) > chunk.sequence.prompt_tokens:
            super().take_chunk(chunk, row)
        elif chunk.samples:
            self._fork(chunk, row)

    def occupancy(self) -> Occupancy:
        queued = len(self.scheduler.waiting) + len(self.scheduler.batch.resuming)
        return Occupancy(queued=queued, running=len(self.scheduler.batch))

    def release(self, request_id: int, reason: str) -> None:
        self.scheduler.end(request_id)

    def _fork(self, chunk: Chunk, row: RowResult) -> None:
        """A prompt's end: report every choice's first token, and go on with those that did not end.

        A prompt that lost its pages meanwhile is computed again, and samples the same tokens then.
        """
        prompt = chunk.sequence
        running = self.context.requests.get(prompt.work.request_id)
        if running is None or prompt.state is not State.RUNNING:
            return
        self.report_prefill(running, prompt)
        output_tokens = running.work.output_tokens + 1
        going: list[FirstToken] = []
        for choice, sampled in zip(chunk.samples, row.sampled, strict=True):
            # a choice may have been cancelled while the step was in flight
            if choice in prompt.choices and not self.report_token(running, choice, output_tokens, sampled):
                going.append(FirstToken(choice, sampled.token))
        self.copy_pages(self.scheduler.fork(prompt, going))
        if not going:
            self.context.requests.remove(running.work.request_id)
