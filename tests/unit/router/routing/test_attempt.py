"""The dispatch state machine, driven by hand: every way an attempt can go, and what is sent on the way."""

import pytest
from msgspec.structs import replace

from router.errors import ApiError
from router.routing.attempt import (
    TRANSITIONS,
    Attempt,
    AttemptPhase,
    IllegalAttemptTransition,
    Times,
    WorkerMessage,
)
from router.routing.policy import Pairing
from services.protocol.messages import (
    Cancel,
    DecodeStarted,
    Failed,
    FirstToken,
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

SOURCE = WorkerTransferAddress("ipc:///p", 3)
PAIRING = Pairing("p", "d", SOURCE)


class Recorder:
    """`stops` names (choice, token) pairs that complete a stop string."""

    def __init__(self, stops: set[tuple[int, int]] | None = None) -> None:
        self.stops = stops or set()
        self.tokens: list[tuple[int, int]] = []
        self.prefilled = 0

    def on_prefilled(self, report: PrefillDone) -> None:
        self.prefilled += 1

    def on_tokens(self, report: Tokens, now_s: float) -> bool:
        self.tokens += [(report.choice, token) for token in report.tokens]
        return report.finish is None and (report.choice, report.tokens[-1]) not in self.stops


def make(
    choices: int = 1, unified: bool = False, stops: set[tuple[int, int]] | None = None
) -> tuple[Attempt, Recorder]:
    """An attempt on its first workers."""
    recorder = Recorder(stops)
    work = SequenceRequest(7, [1, 2, 3], Sampling(max_tokens=9, seed=1), choices)
    attempt = Attempt(recorder, work, Times(0.0), 1)  # type: ignore[arg-type]
    sends = attempt.start(work, Pairing(None, "u", None) if unified else PAIRING, 0 if unified else 99)
    assert sends == (
        (WorkerMessage("u", Generate(work)),)
        if unified
        else (WorkerMessage("p", Prefill(work, 99)), WorkerMessage("d", ReserveKv(work, 99, SOURCE)))
    )
    return attempt, recorder


def error_of(attempt: Attempt) -> ApiError:
    """What an attempt has failed with."""
    assert attempt.phase is AttemptPhase.FAILED and attempt.error is not None
    return attempt.error


def prefilled(attempt: Attempt, worker: str = "p") -> None:
    attempt.on_prefill_done(worker, PrefillDone(7, 0.5, 0.25, 2))


def joined(choices: int = 1) -> tuple[Attempt, Recorder]:
    attempt, recorder = make(choices)
    prefilled(attempt)
    for choice in range(choices):
        attempt.on_tokens("p", Tokens(7, choice, [10 + choice]), 1.0)
    assert attempt.phase is AttemptPhase.JOINING
    return attempt, recorder


def decoding(choices: int = 1) -> tuple[Attempt, Recorder]:
    attempt, recorder = joined(choices)
    attempt.on_decode_started("d", DecodeStarted(7, 0.1, 0.05, 3, 0), 2.0)
    assert attempt.phase is AttemptPhase.DECODING
    return attempt, recorder


def test_a_pair_is_asked_at_once_and_joined_after_the_last_first_token() -> None:
    attempt, recorder = make(choices=2)
    prefilled(attempt)
    assert not attempt.on_tokens("p", Tokens(7, 1, [11]), 1.0)
    assert attempt.on_tokens("p", Tokens(7, 0, [10]), 1.0) == (
        WorkerMessage("d", StartDecode(7, [FirstToken(0, 10), FirstToken(1, 11)])),
    )
    attempt.on_decode_started("d", DecodeStarted(7, 0.1, 0.05, 3, 0), 2.0)
    assert not attempt.on_tokens("d", Tokens(7, 0, [20], None, "stop"), 3.0)
    assert not attempt.ended
    assert not attempt.on_tokens("d", Tokens(7, 1, [21], None, "length"), 4.0)
    assert attempt.phase is AttemptPhase.FINISHED
    assert recorder.tokens == [(1, 11), (0, 10), (0, 20), (1, 21)]
    assert (attempt.times.queue_s, attempt.times.tail_s, attempt.times.ended_s) == (0.5, 0.05, 4.0)
    assert attempt.generated_tokens == 4


def test_a_unified_worker_does_both() -> None:
    attempt, _ = make(unified=True)
    prefilled(attempt, "u")
    assert not attempt.on_tokens("u", Tokens(7, 0, [1]), 1.0)
    assert attempt.phase is AttemptPhase.DECODING
    assert not attempt.on_tokens("u", Tokens(7, 0, [2], None, "stop"), 2.0)
    assert attempt.phase is AttemptPhase.FINISHED


def test_a_choice_that_ends_with_its_first_token_is_not_joined() -> None:
    attempt, _ = make(choices=2)
    prefilled(attempt)
    attempt.on_tokens("p", Tokens(7, 0, [10], None, "stop"), 1.0)
    assert attempt.on_tokens("p", Tokens(7, 1, [11]), 1.0) == (
        WorkerMessage("d", StartDecode(7, [FirstToken(1, 11)])),
    )


def test_a_request_that_ends_at_the_first_token_releases_its_reservation() -> None:
    attempt, _ = make()
    prefilled(attempt)
    sends = attempt.on_tokens("p", Tokens(7, 0, [10], None, "length"), 1.0)
    assert list(sends) == [WorkerMessage("d", Cancel(7))]
    assert attempt.phase is AttemptPhase.FINISHED


def test_a_stop_string_in_the_first_token_also_frees_the_prefill_side() -> None:
    attempt, _ = make(stops={(0, 10)})
    prefilled(attempt)
    sends = attempt.on_tokens("p", Tokens(7, 0, [10]), 1.0)
    assert list(sends) == [WorkerMessage("p", Cancel(7)), WorkerMessage("d", Cancel(7))]


def test_stop_strings_end_one_choice_then_the_request() -> None:
    attempt, recorder = decoding(choices=2)
    recorder.stops = {(0, 20), (1, 21)}
    assert list(attempt.on_tokens("d", Tokens(7, 0, [20]), 3.0)) == [WorkerMessage("d", Cancel(7, 0))]
    assert not attempt.on_tokens("d", Tokens(7, 0, [30]), 3.0), "late tokens of an ended choice"
    assert recorder.tokens[-1] == (0, 20)
    assert list(attempt.on_tokens("d", Tokens(7, 1, [21]), 4.0)) == [WorkerMessage("d", Cancel(7))]
    assert attempt.phase is AttemptPhase.FINISHED
    assert attempt.ignored == 1


PHASES = {
    AttemptPhase.PREFILLING: ["p", "d"],
    AttemptPhase.JOINING: ["p", "d"],
    AttemptPhase.DECODING: ["d"],
}


def in_phase(phase: AttemptPhase) -> tuple[Attempt, Recorder]:
    if phase is AttemptPhase.JOINING:
        return joined()
    if phase is AttemptPhase.DECODING:
        return decoding()
    attempt, recorder = make()
    return attempt, recorder


@pytest.mark.parametrize("phase", PHASES)
def test_cancel_reaches_every_worker_involved(phase: AttemptPhase) -> None:
    attempt, _ = in_phase(phase)
    assert list(attempt.cancel(5.0)) == [WorkerMessage(worker, Cancel(7)) for worker in PHASES[phase]]
    assert attempt.phase is AttemptPhase.CANCELLED
    assert not attempt.cancel(6.0)
    assert attempt.error is None


def break_one(attempt: Attempt, worker: str, lost: bool) -> list[WorkerMessage]:
    if lost:
        return list(attempt.on_worker_lost(worker, 5.0))
    return list(attempt.on_failed(worker, Failed(7, "transfer", "gone", True), 5.0))


@pytest.mark.parametrize(
    ("phase", "worker"), [*((phase, "p") for phase in PHASES), (AttemptPhase.DECODING, "d")]
)
@pytest.mark.parametrize("lost", [True, False])
def test_a_failure_of_one_side_cancels_the_other(phase: AttemptPhase, worker: str, lost: bool) -> None:
    attempt, _ = in_phase(phase)
    involved = PHASES[phase]
    sends = break_one(attempt, worker, lost)
    if worker not in involved:
        assert not attempt.ended, "the prefill worker's part was over"
        assert not sends
        return
    # The prefill worker may not have heard that its KV was taken by one who is gone now.
    cancelled = ("p", *involved) if phase is AttemptPhase.DECODING else involved
    assert sends == [WorkerMessage(other, Cancel(7)) for other in cancelled if other != worker]
    assert attempt.phase is AttemptPhase.FAILED
    assert (attempt.open_choices, attempt.failed_on) == ([0], worker)
    error = error_of(attempt)
    assert error.status == 503
    role = "decode" if worker == "d" else "prefill"
    assert error.retry_reason == (f"{role}_lost" if lost else "transfer")
    assert error.committed == (phase is not AttemptPhase.PREFILLING)


@pytest.mark.parametrize("lost", [True, False])
def test_kv_that_is_held_is_pushed_to_another_decode_worker(lost: bool) -> None:
    attempt, recorder = in_phase(AttemptPhase.JOINING)
    assert not break_one(attempt, "d", lost)
    assert (attempt.phase, attempt.workers) == (AttemptPhase.HELD, ("p",))
    assert attempt.error is not None and attempt.error.retry_reason and not attempt.ended
    work = replace(attempt.work, request_id=8)
    assert list(attempt.pair(Pairing("p", "e", SOURCE), 8, 100)) == [
        WorkerMessage("p", RepushKv(7, 100)),
        WorkerMessage("e", ReserveKv(work, 100, SOURCE)),
        WorkerMessage("e", StartDecode(8, [FirstToken(0, 10)])),
    ]
    assert attempt.phase is AttemptPhase.JOINING
    # what the former worker, or the new one under the former id, has to say
    attempt.on_decode_started("d", DecodeStarted(7, 0.1, 0.05, 3, 0), 6.0)
    attempt.on_decode_started("e", DecodeStarted(7, 0.1, 0.05, 3, 0), 6.0)
    assert not attempt.on_failed("e", Failed(7, "transfer", "late", True), 6.0)
    assert not attempt.on_kv_transfer_failed("p", KvTransferFailed(7, 99, "late"))
    assert (attempt.phase, attempt.ignored) == (AttemptPhase.JOINING, 4)
    attempt.on_decode_started("e", DecodeStarted(8, 0.1, 0.05, 3, 0), 7.0)
    assert not attempt.on_tokens("e", Tokens(7, 0, [66]), 8.0)
    assert not attempt.on_tokens("e", Tokens(8, 0, [20]), 8.0)
    assert recorder.tokens == [(0, 10), (0, 20)]
    assert list(attempt.cancel(9.0)) == [WorkerMessage("e", Cancel(8))]


def test_kv_that_nobody_will_ask_for_again_is_let_go() -> None:
    """The decode worker has it, and the prefill worker has not heard so."""
    attempt, _ = make()
    assert not attempt.on_kv_lease_expiring("p")
    prefilled(attempt)
    attempt.on_tokens("p", Tokens(7, 0, [10]), 1.0)
    assert attempt.phase is AttemptPhase.JOINING and not attempt.on_kv_lease_expiring("p")
    attempt.on_decode_started("d", DecodeStarted(7, 0.1, 0.05, 3, 0), 2.0)
    assert list(attempt.on_kv_lease_expiring("p")) == [WorkerMessage("p", Cancel(7))]
    assert list(attempt.on_kv_transfer_failed("p", KvTransferFailed(7, 99, "no word"))) == [
        WorkerMessage("p", Cancel(7))
    ]
    assert attempt.phase is AttemptPhase.DECODING
    assert not attempt.on_kv_lease_expiring("d")


def test_kv_that_was_taken_is_not_held_when_the_word_of_it_is_lost() -> None:
    """The decode worker has committed and decodes; its transfer process, or the way back, was lost then."""
    attempt, _ = decoding()
    assert list(attempt.on_kv_transfer_failed("p", KvTransferFailed(7, 99, "lost"))) == [
        WorkerMessage("p", Cancel(7))
    ]
    assert attempt.phase is AttemptPhase.DECODING and not attempt.on_kv_transfer_failed(
        "x", KvTransferFailed(7, 99, "lost")
    )
    attempt.on_tokens("d", Tokens(7, 0, [20], finish="length"), 3.0)
    assert attempt.phase is AttemptPhase.FINISHED and attempt.error is None


def test_a_prompt_goes_on_while_its_decode_worker_is_replaced() -> None:
    attempt, recorder = make(choices=2)
    assert list(attempt.on_kv_transfer_failed("p", KvTransferFailed(7, 99, "no way through"))) == [
        WorkerMessage("d", Cancel(7))
    ]
    assert attempt.phase is AttemptPhase.UNPAIRED
    prefilled(attempt)
    assert not attempt.on_tokens("p", Tokens(7, 0, [10]), 1.0)
    attempt.pair(Pairing("p", "e", SOURCE), 8, 100)
    assert attempt.phase is AttemptPhase.PREFILLING
    assert not attempt.on_worker_lost("e", 1.0)
    assert not attempt.on_tokens("p", Tokens(7, 1, [11]), 1.0)
    assert attempt.phase is AttemptPhase.HELD
    firsts = [FirstToken(0, 10), FirstToken(1, 11)]
    assert list(attempt.pair(Pairing("p", "f", SOURCE), 9, 101))[-1] == WorkerMessage(
        "f", StartDecode(9, firsts)
    )
    assert list(attempt.on_worker_lost("p", 2.0)) == [WorkerMessage("f", Cancel(9))]
    assert attempt.phase is AttemptPhase.FAILED and recorder.prefilled == 1


def test_an_unpaired_attempt_may_end_with_its_first_tokens() -> None:
    attempt, _ = make()
    attempt.on_worker_lost("d", 1.0)
    prefilled(attempt)
    assert not attempt.on_tokens("p", Tokens(7, 0, [10], None, "length"), 2.0)
    assert attempt.phase is AttemptPhase.FINISHED


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("invalid", 400),
        ("too_long", 400),
        ("overloaded", 429),
        ("deadline", 504),
        ("transfer", 503),
        ("draining", 503),
        ("internal", 500),
        ("invalid_logits", 500),
    ],
)
def test_failures_have_their_status(code: str, status: int) -> None:
    attempt, _ = in_phase(AttemptPhase.PREFILLING)
    attempt.on_failed("p", Failed(7, code, "why", True), 1.0)  # type: ignore[arg-type]
    error = error_of(attempt)
    assert (error.status, error.message) == (status, "why")
    assert (error.retry_after_s is not None) == (status in (429, 503))


@pytest.mark.parametrize("worker", ["p", "d"])
def test_logits_that_are_no_numbers_are_tried_again_by_nobody(worker: str) -> None:
    attempt, _ = in_phase(AttemptPhase.PREFILLING)
    sends = attempt.on_failed(worker, Failed(7, "invalid_logits", "NaN", False), 1.0)
    error = error_of(attempt)
    assert (error.code, error.committed, error.retry_reason) == ("invalid_logits", True, None)
    assert [(one.worker, type(one.message)) for one in sends] == [("d" if worker == "p" else "p", Cancel)]


def test_reports_that_do_not_belong_change_nothing() -> None:
    attempt, recorder = decoding()
    prefilled(attempt)
    attempt.on_decode_started("d", DecodeStarted(7, 0.1, 0.05, 3, 0), 9.0)
    assert not attempt.on_tokens("p", Tokens(7, 0, [77]), 3.0)
    assert not attempt.on_tokens("d", Tokens(7, 5, [77]), 3.0)
    assert not attempt.on_failed("x", Failed(7, "internal", "", False), 3.0)
    assert attempt.phase is AttemptPhase.DECODING
    assert attempt.ignored == 5
    assert recorder.tokens == [(0, 10)]
    assert recorder.prefilled == 1


def test_tokens_before_decode_started_are_a_broken_protocol() -> None:
    attempt, _ = joined()
    sends = attempt.on_tokens("d", Tokens(7, 0, [20]), 3.0)
    assert list(sends) == [WorkerMessage("p", Cancel(7)), WorkerMessage("d", Cancel(7))]
    assert error_of(attempt).status == 500


def test_a_second_first_token_is_a_broken_protocol() -> None:
    attempt, _ = make(choices=2)
    prefilled(attempt)
    attempt.on_tokens("p", Tokens(7, 0, [10]), 1.0)
    attempt.on_tokens("p", Tokens(7, 0, [11]), 1.0)
    assert error_of(attempt).status == 500


def test_transitions_outside_the_table_raise() -> None:
    attempt, _ = decoding()
    with pytest.raises(IllegalAttemptTransition):
        attempt.start(attempt.work, PAIRING, 99)
    assert set(TRANSITIONS) == set(AttemptPhase)
