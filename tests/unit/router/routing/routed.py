"""Workers and a dispatcher played by hand, for requests (router/routing/routed_request.py).

`World` answers what requests send, as real workers would, one step at a time, and can lose any of them. The
reference is a function of choice and position, so a token that is drawn at a wrong place, twice, or not at
all shows.
"""

from dataclasses import dataclass, field

from router.errors import ApiError
from router.routing.attempt import Attempt, Times, WorkerMessage
from router.routing.policy import Pairing
from router.routing.routed_request import NextStep, RetryBudget, RoutedRequest, WorkersOffer
from services.protocol.messages import (
    Cancel,
    DecodeStarted,
    Failed,
    FinishReason,
    Generate,
    KvTransferFailed,
    Prefill,
    PrefillDone,
    RepushKv,
    ReserveKv,
    Sampling,
    SequenceRequest,
    StartDecode,
    Tokens,
    WorkerTransferAddress,
)

PROMPT = [1, 2, 3]
MAX_CHOICES = 8
SOURCE = WorkerTransferAddress("ipc:///p", 3)


def token_at(choice: int, position: int) -> int:
    return 100 * choice + position


def expected(choice: int, count: int) -> list[int]:
    return [token_at(choice, len(PROMPT) + index) for index in range(count)]


@dataclass
class Client:
    """The output of a request; `stops` are (choice, number of tokens) at which a stop string is complete."""

    stops: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    finishes: dict[int, str] = field(default_factory=dict)
    errors: list[ApiError] = field(default_factory=list)
    prefilled: int = 0

    @property
    def choices(self) -> "list[Client]":
        """One output for all."""
        return [self] * MAX_CHOICES

    def on_prefilled(self, report: PrefillDone) -> None:
        self.prefilled += 1

    def on_tokens(self, report: Tokens, now_s: float) -> bool:
        assert report.choice not in self.finishes, "tokens after the end"
        assert not self.errors, "tokens after an error"
        got = self.tokens.setdefault(report.choice, [])
        got += report.tokens
        stopped = self.stops.get(report.choice) == len(got)
        if report.finish is not None or stopped:
            self.finishes[report.choice] = report.finish or "stop"
            return False
        return True

    def on_failed(self, error: ApiError) -> None:
        self.errors.append(error)


@dataclass
class Job:
    """One request on one worker. `positions` is how many tokens each of its choices has behind it."""

    work: SequenceRequest
    positions: dict[int, int]
    joined: bool = False
    prefilled: bool = False
    transfer_id: int = 0


class World:
    """Prefill workers p0, p1, decode workers d0, d1 (or one unified u0, u1) and the dispatcher between."""

    def __init__(self, choices: int, max_tokens: int, unified: bool, client: Client, retries: int) -> None:
        self.client = client
        self.unified = unified
        self.budget = RetryBudget(retries, 0.0, 1000)
        sampling = Sampling(max_tokens=max_tokens, seed=1, prompt_logprobs=1)
        work = SequenceRequest(self.new_id(), PROMPT, sampling, choices)
        self.routed = RoutedRequest(work, client, Times(0.0), 1, self.budget)
        self.jobs: dict[tuple[str, int], Job] = {}
        self.late: list[tuple[str, object]] = []
        self.now_s = 0.0
        self.route = 0
        self.place(work.request_id)

    ids = 0

    def new_id(self) -> int:
        self.ids += 1
        return self.ids

    # ------------------------------------------------------------ the dispatcher's part

    def place(self, first_id: int = 0) -> None:
        for attempt in list(self.routed.attempts):
            if attempt.wait is None or self.routed.ended:
                continue
            self.route += 1
            suffix = str(self.route % 2)
            if self.unified:
                pairing = Pairing(None, "u" + suffix, None)
            elif attempt.prefill is not None:
                pairing = Pairing(attempt.prefill, "d" + suffix, SOURCE)
            else:
                pairing = Pairing("p" + suffix, "d" + suffix, SOURCE)
            decision = self.routed.decide(attempt, WorkersOffer(pairing, due=True, room=True))
            assert decision.step is NextStep.START
            request_id = first_id or self.new_id()
            self.deliver(self.routed.start(attempt, pairing, request_id, self.new_id(), self.now_s))

    def deliver(self, sends: "list[WorkerMessage] | tuple[WorkerMessage, ...] | object") -> None:
        for send in sends:  # type: ignore[attr-defined]
            worker, message = send.worker, send.message
            match message:
                case Generate(work=work) | Prefill(work=work):
                    job = Job(work, dict.fromkeys(work.choice_numbers, len(work.prompt)))
                    job.transfer_id = getattr(message, "transfer_id", 0)
                    self.jobs[worker, work.request_id] = job
                case ReserveKv(work=work):
                    self.jobs[worker, work.request_id] = Job(work, {})
                case RepushKv(request_id=request_id, transfer_id=transfer_id):
                    if (worker, request_id) in self.jobs:
                        self.jobs[worker, request_id].transfer_id = transfer_id
                    else:
                        self.report(worker, Failed(request_id, "transfer", "not here", True))
                case StartDecode(request_id=request_id, first_tokens=firsts):
                    job = self.jobs[worker, request_id]
                    job.joined = True
                    job.positions = {one.choice: len(job.work.prompt) + 1 for one in firsts}
                    for one in firsts:
                        assert one.token == token_at(one.choice, len(job.work.prompt)), "joined wrongly"
                case Cancel(request_id=request_id, choice=choice):
                    if choice is None:
                        self.jobs.pop((worker, request_id), None)
                    elif (worker, request_id) in self.jobs:
                        self.jobs[worker, request_id].positions.pop(choice, None)

    def report(self, worker: str, report: object) -> None:
        """To every attempt: those it does not belong to must ignore it."""
        for attempt in list(self.routed.attempts):
            if getattr(report, "request_id", None) not in (attempt.work.request_id, attempt.decode_id):
                continue
            match report:
                case Tokens():
                    self.deliver(attempt.on_tokens(worker, report, self.now_s))
                case PrefillDone():
                    attempt.on_prefill_done(worker, report)
                case DecodeStarted():
                    attempt.on_decode_started(worker, report, self.now_s)
                case Failed():
                    self.deliver(attempt.on_failed(worker, report, self.now_s))
                case KvTransferFailed():
                    self.deliver(attempt.on_kv_transfer_failed(worker, report))
            self.follow_up(attempt)

    def follow_up(self, attempt: Attempt) -> None:
        if attempt.needs_decision:
            decision = self.routed.decide(attempt)
            assert decision.step is self.routed.decide(attempt).step, "a decision changes nothing"
            self.deliver(self.routed.apply(attempt, decision, self.now_s))
            if not attempt.ended:
                self.jobs.pop((attempt.decode, attempt.decode_id), None)

    # ------------------------------------------------------------ the workers' part

    def step(self, number: int) -> bool:
        """One job of one worker goes on. False: nobody has anything to do."""
        able = [key for key, job in sorted(self.jobs.items()) if self._can_go(key[0], job)]
        if not able:
            return False
        worker, request_id = able[number % len(able)]
        job = self.jobs[worker, request_id]
        if not worker.startswith("d") and not job.prefilled:
            job.prefilled = True
            self.report(worker, PrefillDone(request_id, 0.1, 0.1, 0))
            self._sample(worker, request_id, job)
            for choice in list(job.positions) if worker.startswith("p") else []:
                job.positions.pop(choice)
        elif worker.startswith("d") and not job.prefilled:
            job.prefilled = True
            self._forget_kv(request_id)
            self.report(worker, DecodeStarted(request_id, 0.1, 0.1, 3, 0))
        else:
            self._sample(worker, request_id, job)
        return True

    def _can_go(self, worker: str, job: Job) -> bool:
        return job.joined if worker.startswith("d") else not job.prefilled or worker.startswith("u")

    def _forget_kv(self, decode_id: int) -> None:
        """A commit: the prefill worker lets the request go."""
        for attempt in self.routed.attempts:
            if attempt.decode_id == decode_id and attempt.prefill is not None:
                self.jobs.pop((attempt.prefill, attempt.work.request_id), None)

    def _sample(self, worker: str, request_id: int, job: Job) -> None:
        for choice in list(job.positions):
            if choice not in job.positions:  # ended by the router meanwhile
                continue
            position = job.positions[choice]
            job.positions[choice] += 1
            begun = len(job.work.prompt) - job.work.output_tokens
            finish: FinishReason | None = None
            if position + 1 - begun >= job.work.sampling.max_tokens:
                finish = "length"
                del job.positions[choice]
            self.report(worker, Tokens(request_id, choice, [token_at(choice, position)], None, finish))
        if not job.positions:
            self.jobs.pop((worker, request_id), None)

    # ------------------------------------------------------------ what goes wrong

    def lose(self, worker: str) -> None:
        """It dies; another life begins at once, with nothing. What it had to say may still come."""
        for key in [key for key in self.jobs if key[0] == worker]:
            job = self.jobs.pop(key)
            self.late.append((worker, Failed(key[1], "transfer", "late", True)))
            self.late.append((worker, DecodeStarted(key[1], 0.1, 0.1, 3, 0)))
            self.late += [
                (worker, Tokens(key[1], choice, [token_at(choice, position)]))
                for choice, position in job.positions.items()
            ]
        for attempt in list(self.routed.attempts):
            if worker in attempt.workers:
                self.deliver(attempt.on_worker_lost(worker, self.now_s))
                self.follow_up(attempt)

    def say_late(self) -> None:
        """From decode workers, of attempts that still know the id: those of a dead prefill or unified worker
        are in no table."""
        late, self.late = self.late, []
        for worker, report in late:
            if worker.startswith("d"):
                self.report(worker, report)

    def fail_transfers(self, worker: str) -> None:
        """Its transfer process dies: what a decode worker waits for, or a prefill worker holds."""
        for (name, request_id), job in list(self.jobs.items()):
            if name != worker:
                continue
            if worker.startswith("p"):
                self.report(worker, KvTransferFailed(request_id, job.transfer_id, "lost"))
            elif not job.prefilled:
                del self.jobs[name, request_id]
                self.report(worker, Failed(request_id, "transfer", "lost", True))
