"""A unified worker in this process, driven turn by turn: the role, scheduler and engine that serve, without
sockets. Tokens count when they are in the outbox: sampled, copied to the host, and reported.
"""

import random
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from deploy.bench.engine.workload import Decode, Offline, PrefillRow, prompt_lengths
from deploy.bench.errors import BenchError, LeftOut
from services.protocol.messages import Cancel, Failed, Generate, Report, Sampling, SequenceRequest, Tokens
from services.roles.report_queue import ReportQueue
from services.startup import PreparedWorker
from services.worker import Worker

ROUTER = b"bench"
DEADLINE_S = 3600.0


@dataclass(frozen=True, slots=True)
class DecodeTimes:
    """Seconds of each step, and the mean number of positions that a sequence attended to in them."""

    steps_s: list[float]
    mean_context: float

    @property
    def mean_s(self) -> float:
        return sum(self.steps_s) / len(self.steps_s)


class EngineLoop:
    """One worker, turn by turn. Every method leaves it idle, also when it raises BenchError."""

    def __init__(self, prepared: PreparedWorker) -> None:
        self.worker = Worker(prepared, worker_epoch=1)
        self.context, self.role = self.worker.context, self.worker.role
        self.context.outbox = ReportQueue(self._deliver)
        self.output_tokens: dict[int, int] = {}
        self.total_tokens = 0
        self._failure: str | None = None
        self._next_id = 1
        self._random = random.Random(0)

    def close(self) -> None:
        self.worker.close()

    # ------------------------------------------------------------ measurements

    def prefill_s(self, row: PrefillRow, around: AbstractContextManager[object] | None = None) -> float:
        """Seconds from giving the prompts, when `around` is entered, to the last one's first token."""
        return self._all_tokens_s(row.requests, row.tokens, 1, around)

    def offline_s(self, row: Offline) -> float:
        """Seconds from giving all requests to the last one's last token."""
        return self._all_tokens_s(row.requests, row.input_tokens, row.output_tokens, None)

    def decode_times(self, row: Decode, warm_steps: int, steps: int) -> DecodeTimes:
        """Consecutive steps of a batch that decodes already, with the row's context in their middle."""
        try:
            prompts = self.start_decoding(row, warm_steps, steps)
            self.until_total(self.total_tokens + row.batch * warm_steps)
            # The step that samples a sequence's token n + 1 attends to its prompt and n tokens.
            first_context = (sum(prompts) + sum(self.output_tokens.values())) / row.batch
            wanted = self.total_tokens + row.batch * steps
            times_s: list[float] = []
            last_s = time.perf_counter()
            while self.total_tokens < wanted:
                before = self.total_tokens
                self.turn()
                if self.total_tokens > before:
                    now_s = time.perf_counter()
                    times_s.append(now_s - last_s)
                    last_s = now_s
            if self.total_tokens != wanted or len(times_s) != steps:
                raise BenchError(f"the batch did not stay at {row.batch}: {len(times_s)} steps for {steps}")
            return DecodeTimes(times_s, first_context + (steps - 1) / 2)
        finally:
            self.clear()

    def start_decoding(self, row: Decode, warm_steps: int, steps: int) -> list[int]:
        """Run prompts until the whole batch decodes; returns the prompts' tokens. The row's context is that
        after `warm_steps` and half of `steps`. Whoever calls this calls `clear` in the end."""
        self._check_room(row.longest_tokens(warm_steps + steps), row.batch)
        first = max(1, row.context - warm_steps - steps // 2)
        prompts = prompt_lengths(row.batch, first, self.context.max_chunk_tokens)
        works = [self._work(tokens, self.context.limits.max_sequence_tokens) for tokens in prompts]
        self.give(works)
        while len(self.output_tokens) < row.batch:
            self.turn()
        return prompts

    # ------------------------------------------------------------ the loop

    def turn(self) -> None:
        """What the worker's loop does in one turn. Raises BenchError when a request failed, or when there is
        nothing to do."""
        before = self.total_tokens
        busy = self.role.step()
        self.context.outbox.flush()
        if self._failure is not None:
            raise BenchError(self._failure)
        if not busy and self.total_tokens == before:
            raise BenchError("the worker has nothing to run, but not all tokens are here")

    def until_total(self, tokens: int) -> None:
        while self.total_tokens < tokens:
            self.turn()

    def give(self, works: list[SequenceRequest]) -> None:
        for work in works:
            self.role.accept(ROUTER, Generate(work))

    def clear(self) -> None:
        """End what runs, and whatever of it is still on the device."""
        for running in self.context.requests.all():
            self.role.accept(ROUTER, Cancel(running.work.request_id))
        while self.role.step():
            self.context.outbox.flush()
        self.context.outbox.flush()
        self.output_tokens.clear()
        self._failure = None

    def _all_tokens_s(
        self,
        requests: int,
        input_tokens: int,
        output_tokens: int,
        around: AbstractContextManager[object] | None,
    ) -> float:
        try:
            self._check_room(input_tokens + output_tokens, 1)
            works = [self._work(input_tokens, output_tokens) for _ in range(requests)]
            with around or nullcontext():
                started_s = time.perf_counter()
                self.give(works)
                self.until_total(self.total_tokens + requests * output_tokens)
                return time.perf_counter() - started_s
        finally:
            self.clear()

    def _deliver(self, router: bytes, reports: list[Report]) -> bool:
        for report in reports:
            match report:
                case Tokens(request_id=request_id, tokens=tokens):
                    self.output_tokens[request_id] = self.output_tokens.get(request_id, 0) + len(tokens)
                    self.total_tokens += len(tokens)
                case Failed(message=message):
                    self._failure = message
                case _:
                    continue
        return True

    def _check_room(self, tokens: int, sequences: int) -> None:
        limits, pool = self.context.limits, self.context.pool
        if tokens > limits.max_sequence_tokens:
            raise LeftOut(f"a sequence has at most {limits.max_sequence_tokens} tokens here, not {tokens}")
        if sequences > limits.max_batch:
            raise LeftOut(f"a batch has at most {limits.max_batch} sequences here, not {sequences}")
        if sequences * (pool.pages_for(tokens) + 1) > pool.total:
            held_tokens = pool.total * pool.page_size_tokens
            raise LeftOut(f"the KV pool holds {held_tokens} tokens, not {sequences} sequences of {tokens}")

    def _work(self, prompt_tokens: int, max_tokens: int) -> SequenceRequest:
        """A prompt that shares no prefix with another, greedily continued and not ended by an end token."""
        vocab_size = self.context.limits.vocab_size
        prompt = [self._random.randrange(vocab_size) for _ in range(prompt_tokens)]
        request_id, self._next_id = self._next_id, self._next_id + 1
        sampling = Sampling(max_tokens=max_tokens, seed=0, temperature=0.0, ignore_eos=True)
        return SequenceRequest(request_id, prompt, sampling, deadline_s=DEADLINE_S)
