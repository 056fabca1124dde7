"""The load of one rate: what is asked, what counts, what is left out; lengths and settings."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.bench.load.errors import LoadError
from deploy.bench.load.lengths import parse_lengths
from deploy.bench.load.options import BenchServeSettings, parse_rates, parse_token_ids
from deploy.bench.load.plan import PlannedLoad, RequestTemplate, Sizes, make_load
from deploy.bench.load.prompts import Prompts
from deploy.bench.load.rates import rates_of
from deploy.errors import UserError
from tests.unit.deploy.bench.load.test_traces import AZURE, MOONCAKE, written

ASK = RequestTemplate("m", 0.0)


def bodies(load: PlannedLoad) -> list[dict[str, Any]]:
    return [json.loads(one.body) for one in load.planned]


def rate_load(index: int = 0, max_model_len: int | None = None, **given: Any) -> PlannedLoad:
    return rates_of(BenchServeSettings(**given)).load(index, ASK, max_model_len)


def test_every_request_asks_for_exact_lengths() -> None:
    load = rate_load(
        rates=(4.0,), requests=30, warm_up=5, input_tokens=parse_lengths("uniform:3:90"),
        output_tokens=parse_lengths("7"),
    )  # fmt: skip
    assert [one.measured for one in load.planned] == [False] * 5 + [True] * 30
    for planned, asked in zip(load.planned, bodies(load), strict=True):
        assert len(asked["prompt"]) == planned.input_tokens
        assert 3 <= planned.input_tokens <= 90
        assert asked["max_tokens"] == planned.output_tokens == 7
        assert asked["ignore_eos"] is True
        assert asked["stream"] is True
        assert asked["stream_options"] == {"include_usage": True}
    assert load.span_s * load.rate == pytest.approx(30)
    assert load.rate == pytest.approx(4, rel=0.3)


def test_the_same_seed_makes_the_same_load_and_another_rate_other_prompts() -> None:
    given = {"rates": (2.0, 8.0), "requests": 20, "input_tokens": parse_lengths("lognormal:50:1:200")}
    one, again, other = rate_load(**given), rate_load(**given), rate_load(**given, seed=1)
    assert one == again
    assert one != other
    fast = rate_load(1, **given)
    assert [planned.input_tokens for planned in one.planned] == [p.input_tokens for p in fast.planned]
    assert [planned.at_s for planned in one.planned] == pytest.approx([4 * p.at_s for p in fast.planned])
    assert not {tuple(a["prompt"]) for a in bodies(one)} & {tuple(a["prompt"]) for a in bodies(fast)}


def test_a_longer_run_begins_with_the_same_lengths() -> None:
    given = {"rates": (2.0,), "warm_up": 0, "input_tokens": parse_lengths("uniform:1:99")}
    given["output_tokens"] = parse_lengths("uniform:1:99")
    short, long = rate_load(**given, requests=10), rate_load(**given, requests=50)
    assert [(one.input_tokens, one.output_tokens) for one in long.planned[:10]] == [
        (one.input_tokens, one.output_tokens) for one in short.planned
    ]


def test_a_trace_at_its_own_speed_and_at_another(tmp_path: Path) -> None:
    file = written(tmp_path / "t", *MOONCAKE)
    own = rate_load(trace=file, arrivals="trace", warm_up=1)
    assert [one.at_s for one in own.planned] == [0.0, 3.0, 3.001]
    first, second, third = (asked["prompt"] for asked in bodies(own))
    assert first[:1024] == third[:1024]
    assert second == first[:512]
    fast = rate_load(trace=file, arrivals="trace", rates=(10.0,), requests=2, warm_up=1)
    assert [one.at_s for one in fast.planned] == pytest.approx([0.0, 0.2 * 3000 / 3001, 0.2])
    small = rate_load(trace=file, arrivals="trace", warm_up=1, shrink=64)
    assert [one.input_tokens for one in small.planned] == [17, 8, 16]
    one, two, three = (asked["prompt"] for asked in bodies(small))
    assert one[:16] == three
    assert two == one[:8]
    assert one[8:16] == Prompts(0, 0, 256, 1023).of_blocks((8,), 8, 8).tolist()


def test_a_trace_with_other_arrivals(tmp_path: Path) -> None:
    file = tmp_path / "azure"
    file.write_text(AZURE)
    load = rate_load(trace=file, rates=(2.0,), requests=2, warm_up=1)
    assert [one.input_tokens for one in load.planned] == [374, 396, 4096]
    assert load.planned[-1].at_s == pytest.approx(1.0)


def test_what_is_too_long_is_left_out_and_counted() -> None:
    sizes = [Sizes(99, 5), Sizes(10, 5), Sizes(10, 7), Sizes(10, 6), Sizes(100, 1)]
    load = make_load(np.arange(5.0), sizes, Prompts(0, 0, 1, 9), ASK, warm_up=2, max_model_len=16)
    assert [one.output_tokens for one in load.planned] == [5, 6]
    assert load.left_out == 2, "the one that would only warm up does not count"
    with pytest.raises(LoadError, match="longer than the model's 5 tokens"):
        make_load(np.arange(5.0), sizes, Prompts(0, 0, 1, 9), ASK, warm_up=2, max_model_len=5)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"arrivals": "trace"}, "--arrivals trace: --trace is missing"),
        ({"shrink": 2}, "--shrink: it divides a trace's lengths, and there is no --trace"),
        ({"trace": "T"}, "--rates is missing: --arrivals poisson needs it"),
        ({"trace": "none"}, "--trace: none cannot be read"),
    ],
)
def test_settings_that_do_not_go_together(given: dict[str, Any], says: str, tmp_path: Path) -> None:
    if "trace" in given:
        places = {"T": written(tmp_path / "t", *MOONCAKE), "none": Path("none")}
        given = {**given, "trace": places[given["trace"]]}
    with pytest.raises(UserError) as refused:
        rates_of(BenchServeSettings(**given))
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"rates": (1.0,), "requests": 3, "warm_up": 1}, "3 requests, and 4 are wanted"),
        ({"arrivals": "trace", "warm_up": 3}, "3 requests, and 3 of them warm up"),
        ({"arrivals": "trace", "requests": 3, "warm_up": 1}, "3 requests, and 4 are wanted"),
    ],
)
def test_a_trace_that_is_too_short(given: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        rate_load(trace=written(tmp_path / "t", *MOONCAKE), **given)
    assert str(refused.value).startswith("--trace: it has")
    assert says in str(refused.value)


def test_lengths_are_as_they_are_written() -> None:
    random = np.random.default_rng(5)
    assert set(parse_lengths("12").sample(50, random).tolist()) == {12}
    assert set(parse_lengths("uniform:3:5").sample(500, random).tolist()) == {3, 4, 5}
    sampled = parse_lengths("lognormal:200:0.8:1000").sample(20_000, random)
    assert np.median(sampled) == pytest.approx(200, rel=0.05)
    assert np.std(np.log(sampled[sampled < 1000])) == pytest.approx(0.8, rel=0.1)
    assert sampled.max() == 1000
    for text in ("12", "uniform:3:5", "lognormal:200:0.8:1000"):
        assert str(parse_lengths(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "-3",
        "x",
        "uniform:5:3",
        "uniform:5",
        "lognormal:9:0:10",
        "lognormal:9:x:10",
        "lognormal:9:1:8",
    ],
)
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="'"):
        parse_lengths(text)


def test_rates_and_ids() -> None:
    assert parse_rates("2, 4.5,8") == (2.0, 4.5, 8.0)
    assert parse_token_ids("256-1023") == (256, 1023)
    for text in ("", "2,", "4,2", "2,2", "0", "x", "nan"):
        with pytest.raises(ValueError, match=r"is|must"):
            parse_rates(text)
    for text in ("", "5", "5-", "9-9", "9-3", "a-b", "1-99999999999"):
        with pytest.raises(ValueError, match="'"):
            parse_token_ids(text)
