"""Whether to disaggregate: every answer, from figures made by hand."""

import msgspec
import pytest

from deploy.bench.serving.statistics import ClientDelay, RateFigures, SloLimits, Spread, System
from deploy.bench.serving.verdict import verdict

LIMITS = SloLimits(ttft_ms=200.0)


def spread(p50: float, p99: float) -> Spread:
    return Spread(100, p50, p50, p99, p99, p99)


FIGURES = RateFigures(
    rate=4.0, offered_rate=4.0, requests=400, completed=400, failures={}, left_out=0, span_s=100.0,
    ttft_ms=spread(100, 200), second_token_ms=spread(120, 250), itl_ms=spread(10, 40), tpot_ms=spread(12, 20),
    e2e_ms=spread(900, 1500), input_tokens_per_request=1.0, output_tokens_per_s=500.0, tokens_per_chunk=1.0,
    chunks_per_arrival=1.0, good=400, goodput=4.0, goodput_per_gpu=2.0, client=ClientDelay(None, 0.0),
)  # fmt: skip


def figures(rate: float = 4.0, **changes: object) -> RateFigures:
    return msgspec.structs.replace(FIGURES, rate=rate, **changes)


def good(share: float, rate: float = 4.0) -> RateFigures:
    count = round(400 * share)
    goodput = rate * share
    return figures(rate, good=count, goodput=goodput, goodput_per_gpu=goodput / 2)


def system(name: str, *rates: RateFigures) -> System:
    return System(name, 2, list(rates))


@pytest.mark.parametrize(
    ("split", "unified", "answer", "says"),
    [
        ((1.0, 0.9), (1.0, 0.4), "disaggregate", "1P1D serves 1.80 times the good requests"),
        ((1.0, 0.3), (1.0, 0.9), "do not disaggregate", "1P1D serves 0.56 times"),
        ((1.0, 0.9), (1.0, 0.92), "do not disaggregate", "the simpler system is enough"),
        ((0.0, 0.0), (0.0, 0.0), "do not disaggregate", "neither keeps the limits at any rate"),
        ((0.9, 0.0), (0.0, 0.0), "disaggregate", "2 unified serves none"),
    ],
)
def test_by_goodput(split: tuple[float, float], unified: tuple[float, float], answer: str, says: str) -> None:
    found = verdict(
        system("1P1D", good(split[0], 4.0), good(split[1], 8.0)),
        system("2 unified", good(unified[0], 4.0), good(unified[1], 8.0)),
        LIMITS,
        0.05,
    )
    assert found.answer == answer
    assert says in found.text()
    assert "at best" in found.reasons[0]


def test_each_system_is_judged_at_its_best_rate() -> None:
    found = verdict(
        system("1P1D", good(1.0, 4.0), good(0.0, 8.0)),
        system("u", good(0.1, 4.0), good(0.1, 8.0)),
        LIMITS,
        0.05,
    )
    assert found.answer == "disaggregate"
    assert "at 4 req/s (400 of 400 good)" in found.reasons[0]
    assert "at 8 req/s (40 of 400 good)" in found.reasons[1]


def test_few_requests_are_noise() -> None:
    few = [msgspec.structs.replace(good(share), requests=10, good=round(10 * share)) for share in (0.8, 0.6)]
    assert verdict(system("1P1D", few[0]), system("u", few[1]), LIMITS, 0.05).answer == "do not disaggregate"
    many = [good(0.8), good(0.6)]
    assert verdict(system("1P1D", many[0]), system("u", many[1]), LIMITS, 0.05).answer == "disaggregate"


def test_by_latency() -> None:
    plain = system("2 unified", figures())
    same = verdict(system("1P1D", figures(itl_ms=spread(10, 41))), plain, SloLimits(), 0.05)
    assert same.answer == "do not disaggregate"
    assert same.reasons == ["no figure differs by more than 5%: the simpler system is enough"]
    better = verdict(system("1P1D", figures(itl_ms=spread(10, 20))), plain, SloLimits(), 0.05)
    assert better.answer == "disaggregate"
    assert better.reasons == ["1P1D is better: ITL p99 at 4 req/s: 20 ms against 40"]
    worse = verdict(system("1P1D", figures(ttft_ms=spread(150, 200))), plain, SloLimits(), 0.05)
    assert worse.answer == "do not disaggregate"
    assert worse.reasons == ["1P1D is worse: TTFT p50 at 4 req/s: 150 ms against 100"]
    mixed = figures(ttft_ms=spread(150, 200), itl_ms=spread(10, 20))
    both = verdict(system("1P1D", mixed), plain, SloLimits(), 0.05)
    assert both.answer == "it depends"
    assert "give --slo-ttft-ms" in both.reasons[-1]


def test_lost_requests_and_tokens_count_without_limits() -> None:
    plain = system("2 unified", figures())
    lost = verdict(system("1P1D", figures(completed=399)), plain, SloLimits(), 0.05)
    assert lost.reasons == ["1P1D is worse: completed at 4 req/s: 399 against 400 of 400"]
    slow = verdict(system("1P1D", figures(output_tokens_per_s=400.0)), plain, SloLimits(), 0.05)
    assert slow.reasons == ["1P1D is worse: output at 4 req/s: 400 tok/s against 500"]
    nothing = figures(completed=0, ttft_ms=None, second_token_ms=None, itl_ms=None, tpot_ms=None)
    assert verdict(system("1P1D", nothing), plain, SloLimits(), 0.05).answer == "do not disaggregate"
