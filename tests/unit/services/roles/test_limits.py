"""The pure rules of every role, and the bookkeeping a preempted prompt needs."""

import pytest

from services.engine.batch import RowResult
from services.protocol.messages import Sampling, SequenceRequest, TokenLogprob
from services.rates import Rate
from services.roles.limits import WorkerLimits, finish_reason, refuse
from services.roles.report_queue import ReportQueue
from services.roles.running_requests import Requests
from services.roles.unified import UnifiedRole
from services.scheduler.sequence import Chunk, prompt_sequence

LIMITS = WorkerLimits(
    vocab_size=100, max_sequence_tokens=20, max_batch=4, max_queue=3, eos_token_ids=frozenset({9})
)


def work(prompt: list[int], choices: int = 1, **sampling: object) -> SequenceRequest:
    values = {"max_tokens": 5, "seed": 1, **sampling}
    return SequenceRequest(1, prompt, Sampling(**values), choices)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "queued", "code"),
    [
        (work([1, 2]), 3, "overloaded"),
        (work([1] * 20), 0, "too_long"),
        (work([1], choices=5), 0, "invalid"),
        (work([100]), 0, "invalid"),
        (work([1], stop_token_ids=[100]), 0, "invalid"),
        (work([1], logit_bias={100: 1.0}), 0, "invalid"),
    ],
)
def test_what_cannot_be_taken_is_refused_with_its_reason(
    given: SequenceRequest, queued: int, code: str
) -> None:
    failed = refuse(given, LIMITS, queued)
    assert failed is not None and failed.code == code
    assert failed.retryable == (code == "overloaded")


def test_what_fits_exactly_is_taken() -> None:
    assert refuse(work([99] * 19, choices=4), LIMITS, 2) is None


@pytest.mark.parametrize(
    ("given", "token", "output_tokens", "expected"),
    [
        (work([1]), 5, 1, None),
        (work([1]), 9, 1, "stop"),
        (work([1], ignore_eos=True), 9, 1, None),
        (work([1], stop_token_ids=[7]), 7, 1, "stop"),
        (work([1], ignore_eos=True, stop_token_ids=[9]), 9, 1, "stop"),
        (work([1]), 5, 5, "length"),
        (work([1] * 18, max_tokens=9), 5, 2, "length"),
        (work([1]), 9, 5, "stop"),
    ],
)
def test_when_a_choice_ends(
    given: SequenceRequest, token: int, output_tokens: int, expected: str | None
) -> None:
    assert finish_reason(given, token, output_tokens, LIMITS) == expected


def test_a_prompt_that_starts_again_has_its_log_probabilities_once() -> None:
    class Context:
        requests = Requests()

    role = UnifiedRole.__new__(UnifiedRole)
    role.context = Context()  # type: ignore[assignment]
    given = work(list(range(6)), prompt_logprobs=0)
    running = Context.requests.add(given, b"router", 0.0)
    sequence = prompt_sequence(given)

    def compute(start: int, count: int) -> None:
        logprobs = [TokenLogprob(float(at), []) for at in range(start, min(start + count, 5))]
        role.collect_prompt_logprobs(Chunk(sequence, start, count, ()), RowResult([], logprobs))

    compute(0, 2)
    compute(2, 2)
    compute(0, 2)  # preempted: from the beginning
    compute(2, 2)
    compute(4, 2)
    assert [one.logprob for one in running.prompt_logprobs] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_the_outbox_sends_one_frame_a_router_and_names_the_lost_ones() -> None:
    sent: list[tuple[bytes, int]] = []

    def send(router: bytes, reports: list[object]) -> bool:
        sent.append((router, len(reports)))
        return router != b"gone"

    outbox = ReportQueue(send)  # type: ignore[arg-type]
    for router in (b"a", b"gone", b"a"):
        outbox.add(router, object())  # type: ignore[arg-type]
    assert outbox.flush() == [b"gone"]
    assert sorted(sent) == [(b"a", 2), (b"gone", 1)]
    assert outbox.flush() == [] and len(sent) == 2


def test_a_rate_looks_back_over_its_window_only() -> None:
    rate = Rate()
    for second in range(20):
        rate.observe(float(second), 0 if second < 10 else 100 * (second - 9))
    assert rate.per_second() == pytest.approx(100.0)
