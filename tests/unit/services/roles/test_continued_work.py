"""A choice that another worker began: its tokens, lengths, penalties and reports go on where they were."""

from typing import Any

import pytest

from services.engine.batch import Row
from services.protocol.messages import FirstToken, Generate, ReserveKv, Sampling, SequenceRequest, StartDecode
from services.roles.decode import DecodeRole
from services.roles.limits import WorkerLimits, finish_reason, refuse
from services.roles.role import Role
from services.roles.unified import UnifiedRole
from services.scheduler.sequence import prompt_sequence
from tests.unit.services.roles.test_overlap import ROUTER, Served

PROMPT = [9, 30, 31, 32, 33, 34]
CHOICE = 2
SAMPLING = Sampling(max_tokens=14, seed=1, presence_penalty=0.5, ignore_eos=True)


def continued(output: list[int], sampling: Sampling = SAMPLING) -> SequenceRequest:
    return SequenceRequest(7, PROMPT + output, sampling, first_choice=CHOICE, output_tokens=len(output))


@pytest.mark.parametrize("output_tokens", [1, 2, 5, 12])
@pytest.mark.parametrize("kind", [UnifiedRole, DecodeRole])
@pytest.mark.parametrize("overlap", [False, True])
def test_the_rest_is_what_it_would_have_been(kind: type[Role], overlap: bool, output_tokens: int) -> None:
    served = Served(kind, pages=40, overlap=overlap)
    wanted = served.expected(SequenceRequest(1, PROMPT, SAMPLING), CHOICE)
    assert len(wanted) == 14
    work, key = continued(wanted[:output_tokens]), (7, CHOICE)
    launch = served.device.launch

    def checked(rows: list[Row]) -> Any:
        for draw in (draw for row in rows for draw in row.samples):
            assert draw.prompt == PROMPT and draw.output[:output_tokens] == wanted[:output_tokens]
        return launch(rows)

    served.device.launch = checked  # type: ignore[method-assign]
    if kind is UnifiedRole:
        served.role.accept(ROUTER, Generate(work))
    else:
        served.role.accept(ROUTER, ReserveKv(work, 8, None))  # type: ignore[arg-type]
        served.role.accept(ROUTER, StartDecode(7, [FirstToken(CHOICE, wanted[output_tokens])]))
        served.out[key] = [wanted[output_tokens]]
    served.run()
    assert dict(served.out) == {key: wanted[output_tokens:]} and served.finished == {key}
    assert len(served.context.requests) == 0 and served.pool.counts().used == 0


def test_a_join_of_a_choice_that_is_not_of_the_work_is_dropped() -> None:
    served = Served(DecodeRole, pages=40, overlap=False)
    served.role.accept(ROUTER, ReserveKv(continued([5]), 8, None))  # type: ignore[arg-type]
    for choice in (0, CHOICE + 1):
        served.role.accept(ROUTER, StartDecode(7, [FirstToken(choice, 6)]))
    assert served.context.counters["dropped_join"] == 2


LIMITS = WorkerLimits(100, 20, 4, 3, frozenset())


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (SequenceRequest(1, [1, 2], Sampling(max_tokens=5, seed=1), output_tokens=2), "output_tokens"),
        (SequenceRequest(1, [1] * 9, Sampling(max_tokens=5, seed=1), output_tokens=5), "output_tokens"),
        (SequenceRequest(1, [1], Sampling(max_tokens=5, seed=1), choices=2, first_choice=127), "choice 128"),
    ],
)
def test_what_cannot_be_continued_is_refused(given: SequenceRequest, reason: str) -> None:
    failed = refuse(given, LIMITS, 0)
    assert failed is not None and failed.code == "invalid" and reason in failed.message


def test_earlier_output_counts_against_both_lengths() -> None:
    work = continued([5, 6, 7])
    assert refuse(work, LIMITS, 0) is None
    assert prompt_sequence(work).limit_tokens == len(PROMPT) + 14
    assert finish_reason(work, 8, 13, LIMITS) is None
    assert finish_reason(work, 8, 14, LIMITS) == "length"
