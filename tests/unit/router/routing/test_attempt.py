"""The dispatch state machine, driven by hand: every way a flight can go, and what is sent on the way."""

import pytest
from msgspec.structs import replace

from router.errors import ApiError
from router.routing.attempt import MOVES, Flight, IllegalPhase, Phase, Send, Times
from services.protocol.messages import (
    Cancel,
    DecodeStarted,
    Failed,
    FirstToken,
    Generate,
    Join,
    Prefill,
    PrefillDone,
    PushAgain,
    Reserve,
    Sampling,
    Tokens,
    TransferAddress,
    Undelivered,
    Work,
)

SOURCE = TransferAddress("ipc:///p", 3)


class Recorder:
    """`stops` names (choice, token) pairs that complete a stop string."""

    def __init__(self, stops: set[tuple[int, int]] | None = None) -> None:
        self.stops = stops or set()
        self.tokens: list[tuple[int, int]] = []
        self.errors: list[ApiError] = []
        self.prefilled = 0

    def on_prefilled(self, report: PrefillDone) -> None:
        self.prefilled += 1

    def on_tokens(self, report: Tokens, now_s: float) -> bool:
        self.tokens += [(report.choice, token) for token in report.tokens]
        return report.finish is None and (report.choice, report.tokens[-1]) not in self.stops

    def on_failed(self, error: ApiError) -> None:
        self.errors.append(error)


def make(
    choices: int = 1, unified: bool = False, stops: set[tuple[int, int]] | None = None
) -> tuple[Flight, Recorder]:
    recorder = Recorder(stops)
    work = Work(7, [1, 2, 3], Sampling(max_tokens=9, seed=1), choices)
    if unified:
        return Flight(work, "u", recorder, Times(0.0), 1), recorder
    return Flight(work, "d", recorder, Times(0.0), 1, prefill="p", transfer_id=99, source=SOURCE), recorder


def prefilled(flight: Flight, worker: str = "p") -> None:
    flight.on_prefill_done(worker, PrefillDone(7, 0.5, 0.25, 2))


def joined(choices: int = 1) -> tuple[Flight, Recorder]:
    flight, recorder = make(choices)
    flight.start()
    prefilled(flight)
    for choice in range(choices):
        flight.on_tokens("p", Tokens(7, choice, [10 + choice]), 1.0)
    assert flight.phase is Phase.JOINING
    return flight, recorder


def decoding(choices: int = 1) -> tuple[Flight, Recorder]:
    flight, recorder = joined(choices)
    flight.on_decode_started("d", DecodeStarted(7, 0.1, 0.05, 3, 0), 2.0)
    assert flight.phase is Phase.DECODING
    return flight, recorder


def test_a_pair_is_asked_at_once_and_joined_after_the_last_first_token() -> None:
    flight, recorder = make(choices=2)
    assert flight.start() == (
        Send("p", Prefill(flight.work, 99)),
        Send("d", Reserve(flight.work, 99, SOURCE)),
    )
    prefilled(flight)
    assert not flight.on_tokens("p", Tokens(7, 1, [11]), 1.0)
    assert flight.on_tokens("p", Tokens(7, 0, [10]), 1.0) == (
        Send("d", Join(7, [FirstToken(0, 10), FirstToken(1, 11)])),
    )
    flight.on_decode_started("d", DecodeStarted(7, 0.1, 0.05, 3, 0), 2.0)
    assert not flight.on_tokens("d", Tokens(7, 0, [20], None, "stop"), 3.0)
    assert not flight.ended
    assert not flight.on_tokens("d", Tokens(7, 1, [21], None, "length"), 4.0)
    assert flight.phase is Phase.FINISHED
    assert recorder.tokens == [(1, 11), (0, 10), (0, 20), (1, 21)]
    assert (flight.times.queue_s, flight.times.tail_s, flight.times.ended_s) == (0.5, 0.05, 4.0)
    assert flight.generated_tokens == 4


def test_a_unified_worker_does_both() -> None:
    flight, _ = make(unified=True)
    assert flight.start() == (Send("u", Generate(flight.work)),)
    prefilled(flight, "u")
    assert not flight.on_tokens("u", Tokens(7, 0, [1]), 1.0)
    assert flight.phase is Phase.DECODING
    assert not flight.on_tokens("u", Tokens(7, 0, [2], None, "stop"), 2.0)
    assert flight.phase is Phase.FINISHED


def test_a_choice_that_ends_with_its_first_token_is_not_joined() -> None:
    flight, _ = make(choices=2)
    flight.start()
    prefilled(flight)
    flight.on_tokens("p", Tokens(7, 0, [10], None, "stop"), 1.0)
    assert flight.on_tokens("p", Tokens(7, 1, [11]), 1.0) == (Send("d", Join(7, [FirstToken(1, 11)])),)


def test_a_request_that_ends_at_the_first_token_releases_its_reservation() -> None:
    flight, _ = make()
    flight.start()
    prefilled(flight)
    sends = flight.on_tokens("p", Tokens(7, 0, [10], None, "length"), 1.0)
    assert list(sends) == [Send("d", Cancel(7))]
    assert flight.phase is Phase.FINISHED


def test_a_stop_string_in_the_first_token_also_frees_the_prefill_side() -> None:
    flight, _ = make(stops={(0, 10)})
    flight.start()
    prefilled(flight)
    sends = flight.on_tokens("p", Tokens(7, 0, [10]), 1.0)
    assert list(sends) == [Send("p", Cancel(7)), Send("d", Cancel(7))]


def test_stop_strings_end_one_choice_then_the_request() -> None:
    flight, recorder = decoding(choices=2)
    recorder.stops = {(0, 20), (1, 21)}
    assert list(flight.on_tokens("d", Tokens(7, 0, [20]), 3.0)) == [Send("d", Cancel(7, 0))]
    assert not flight.on_tokens("d", Tokens(7, 0, [30]), 3.0), "late tokens of an ended choice"
    assert recorder.tokens[-1] == (0, 20)
    assert list(flight.on_tokens("d", Tokens(7, 1, [21]), 4.0)) == [Send("d", Cancel(7))]
    assert flight.phase is Phase.FINISHED
    assert flight.ignored == 1


PHASES = {
    Phase.PREFILLING: ["p", "d"],
    Phase.JOINING: ["p", "d"],
    Phase.DECODING: ["d"],
}


def in_phase(phase: Phase) -> tuple[Flight, Recorder]:
    if phase is Phase.JOINING:
        return joined()
    if phase is Phase.DECODING:
        return decoding()
    flight, recorder = make()
    flight.start()
    return flight, recorder


@pytest.mark.parametrize("phase", PHASES)
def test_cancel_reaches_every_worker_involved(phase: Phase) -> None:
    flight, recorder = in_phase(phase)
    assert list(flight.cancel(5.0)) == [Send(worker, Cancel(7)) for worker in PHASES[phase]]
    assert flight.phase is Phase.CANCELLED
    assert not flight.cancel(6.0)
    assert not recorder.errors


def break_one(flight: Flight, worker: str, lost: bool) -> list[Send]:
    if lost:
        return list(flight.on_worker_lost(worker, 5.0))
    return list(flight.on_failed(worker, Failed(7, "transfer", "gone", True), 5.0))


@pytest.mark.parametrize(("phase", "worker"), [*((phase, "p") for phase in PHASES), (Phase.DECODING, "d")])
@pytest.mark.parametrize("lost", [True, False])
def test_a_failure_of_one_side_cancels_the_other(phase: Phase, worker: str, lost: bool) -> None:
    flight, recorder = in_phase(phase)
    involved = PHASES[phase]
    sends = break_one(flight, worker, lost)
    if worker not in involved:
        assert not flight.ended, "the prefill worker's part was over"
        assert not sends
        return
    # The prefill worker may not have heard that its KV was taken by one who is gone now.
    told = ("p", *involved) if phase is Phase.DECODING else involved
    assert sends == [Send(other, Cancel(7)) for other in told if other != worker]
    assert flight.phase is Phase.FAILED
    assert (flight.open_choices, flight.failed_on) == ([0], worker)
    error = recorder.errors[0]
    assert error.status == 503
    role = "decode" if worker == "d" else "prefill"
    assert error.retry_reason == (f"{role}_lost" if lost else "transfer")
    assert error.committed == (phase is not Phase.PREFILLING)


@pytest.mark.parametrize("lost", [True, False])
def test_kv_that_is_held_is_pushed_to_another_decode_worker(lost: bool) -> None:
    flight, recorder = in_phase(Phase.JOINING)
    assert not break_one(flight, "d", lost)
    assert (flight.phase, flight.workers) == (Phase.HELD, ("p",))
    assert flight.error is not None and flight.error.retry_reason and not recorder.errors
    work = replace(flight.work, request_id=8)
    assert list(flight.pair("e", 8, 100, SOURCE)) == [
        Send("p", PushAgain(7, 100)),
        Send("e", Reserve(work, 100, SOURCE)),
        Send("e", Join(8, [FirstToken(0, 10)])),
    ]
    assert flight.phase is Phase.JOINING
    # what the former worker, or the new one under the former id, has to say
    flight.on_decode_started("d", DecodeStarted(7, 0.1, 0.05, 3, 0), 6.0)
    flight.on_decode_started("e", DecodeStarted(7, 0.1, 0.05, 3, 0), 6.0)
    assert not flight.on_failed("e", Failed(7, "transfer", "late", True), 6.0)
    assert not flight.on_undelivered("p", Undelivered(7, 99, "late"))
    assert (flight.phase, flight.ignored) == (Phase.JOINING, 4)
    flight.on_decode_started("e", DecodeStarted(8, 0.1, 0.05, 3, 0), 7.0)
    assert not flight.on_tokens("e", Tokens(7, 0, [66]), 8.0)
    assert not flight.on_tokens("e", Tokens(8, 0, [20]), 8.0)
    assert recorder.tokens == [(0, 10), (0, 20)]
    assert list(flight.cancel(9.0)) == [Send("e", Cancel(8))]


def test_kv_that_nobody_will_ask_for_again_is_let_go() -> None:
    """The decode worker has it, and the prefill worker has not heard so."""
    flight, _ = make()
    flight.start()
    assert not flight.on_holding("p")
    prefilled(flight)
    flight.on_tokens("p", Tokens(7, 0, [10]), 1.0)
    assert flight.phase is Phase.JOINING and not flight.on_holding("p")
    flight.on_decode_started("d", DecodeStarted(7, 0.1, 0.05, 3, 0), 2.0)
    assert list(flight.on_holding("p")) == [Send("p", Cancel(7))]
    assert list(flight.on_undelivered("p", Undelivered(7, 99, "no word"))) == [Send("p", Cancel(7))]
    assert flight.phase is Phase.DECODING
    assert not flight.on_holding("d")


def test_kv_that_was_taken_is_not_held_when_the_word_of_it_is_lost() -> None:
    """The decode worker has committed and decodes; its transfer process, or the way back, was lost then."""
    flight, recorder = decoding()
    assert list(flight.on_undelivered("p", Undelivered(7, 99, "lost"))) == [Send("p", Cancel(7))]
    assert flight.phase is Phase.DECODING and not flight.on_undelivered("x", Undelivered(7, 99, "lost"))
    flight.on_tokens("d", Tokens(7, 0, [20], finish="length"), 3.0)
    assert flight.phase is Phase.FINISHED and not recorder.errors


def test_a_prompt_goes_on_while_its_decode_worker_is_replaced() -> None:
    flight, recorder = make(choices=2)
    flight.start()
    assert list(flight.on_undelivered("p", Undelivered(7, 99, "no way through"))) == [Send("d", Cancel(7))]
    assert flight.phase is Phase.UNPAIRED
    prefilled(flight)
    assert not flight.on_tokens("p", Tokens(7, 0, [10]), 1.0)
    flight.pair("e", 8, 100, SOURCE)
    assert flight.phase is Phase.PREFILLING
    assert not flight.on_worker_lost("e", 1.0)
    assert not flight.on_tokens("p", Tokens(7, 1, [11]), 1.0)
    assert flight.phase is Phase.HELD
    firsts = [FirstToken(0, 10), FirstToken(1, 11)]
    assert list(flight.pair("f", 9, 101, SOURCE))[-1] == Send("f", Join(9, firsts))
    assert list(flight.on_worker_lost("p", 2.0)) == [Send("f", Cancel(9))]
    assert flight.phase is Phase.FAILED and recorder.prefilled == 1


def test_an_unpaired_flight_may_end_with_its_first_tokens() -> None:
    flight, _ = make()
    flight.start()
    flight.on_worker_lost("d", 1.0)
    prefilled(flight)
    assert not flight.on_tokens("p", Tokens(7, 0, [10], None, "length"), 2.0)
    assert flight.phase is Phase.FINISHED


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
    flight, recorder = in_phase(Phase.PREFILLING)
    flight.on_failed("p", Failed(7, code, "why", True), 1.0)  # type: ignore[arg-type]
    error = recorder.errors[0]
    assert (error.status, error.message) == (status, "why")
    assert (error.retry_after_s is not None) == (status in (429, 503))


@pytest.mark.parametrize("worker", ["p", "d"])
def test_logits_that_are_no_numbers_are_tried_again_by_nobody(worker: str) -> None:
    flight, recorder = in_phase(Phase.PREFILLING)
    sends = flight.on_failed(worker, Failed(7, "invalid_logits", "NaN", False), 1.0)
    error = recorder.errors[0]
    assert (error.code, error.committed, error.retry_reason) == ("invalid_logits", True, None)
    assert [(one.worker, type(one.message)) for one in sends] == [("d" if worker == "p" else "p", Cancel)]


def test_reports_that_do_not_belong_change_nothing() -> None:
    flight, recorder = decoding()
    prefilled(flight)
    flight.on_decode_started("d", DecodeStarted(7, 0.1, 0.05, 3, 0), 9.0)
    assert not flight.on_tokens("p", Tokens(7, 0, [77]), 3.0)
    assert not flight.on_tokens("d", Tokens(7, 5, [77]), 3.0)
    assert not flight.on_failed("x", Failed(7, "internal", "", False), 3.0)
    assert flight.phase is Phase.DECODING
    assert flight.ignored == 5
    assert recorder.tokens == [(0, 10)]
    assert recorder.prefilled == 1


def test_tokens_before_decode_started_are_a_broken_protocol() -> None:
    flight, recorder = joined()
    sends = flight.on_tokens("d", Tokens(7, 0, [20]), 3.0)
    assert list(sends) == [Send("p", Cancel(7)), Send("d", Cancel(7))]
    assert recorder.errors[0].status == 500


def test_a_second_first_token_is_a_broken_protocol() -> None:
    flight, recorder = make(choices=2)
    flight.start()
    prefilled(flight)
    flight.on_tokens("p", Tokens(7, 0, [10]), 1.0)
    flight.on_tokens("p", Tokens(7, 0, [11]), 1.0)
    assert recorder.errors[0].status == 500


def test_moves_outside_the_table_raise() -> None:
    flight, _ = decoding()
    with pytest.raises(IllegalPhase):
        flight.start()
    assert set(MOVES) == set(Phase)
