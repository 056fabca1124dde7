"""The whole load of one rate, made before its first request is sent: times, prompts, lengths, bodies. Pure.

`warm_up` requests come first, at the same rate, and do not count: the measured ones meet a system that is
already at work.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from deploy.bench.load.arrivals import Seconds, stretched
from deploy.bench.load.errors import LoadError
from deploy.bench.load.lengths import Lengths
from deploy.bench.load.prompts import Prompts, TokenIds
from deploy.bench.load.traces import BLOCK_TOKENS, TracedRequest

MOST_PROMPT_TOKENS = 100_000_000
"""Of one rate: bodies are kept in memory, about five bytes a token."""


@dataclass(frozen=True, slots=True)
class RequestTemplate:
    """How one request asks: what does not differ between the requests of a run."""

    model: str
    temperature: float


@dataclass(frozen=True, slots=True)
class Planned:
    """`at_s` counts from the start of the run. `body` is the JSON of `POST /v1/completions`."""

    at_s: float
    input_tokens: int
    output_tokens: int
    measured: bool
    body: bytes


@dataclass(frozen=True, slots=True)
class PlannedLoad:
    """`rate` is the measured requests' own, over the `span_s` in which they arrive; `left_out` are those too
    long for the model."""

    planned: list[Planned]
    rate: float
    span_s: float
    left_out: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """One request to be, before its prompt is made."""

    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] = ()


def sampled_sizes(inputs: Lengths, outputs: Lengths, count: int, seed: int) -> list[Sizes]:
    """The same for every rate; more of them begin with the same."""
    given, made = (np.random.default_rng((seed, which)) for which in (1, 2))
    sampled = zip(inputs.sample(count, given), outputs.sample(count, made), strict=True)
    return [Sizes(int(prompt), int(answer)) for prompt, answer in sampled]


def trace_sizes(requests: Sequence[TracedRequest], shrink: int) -> list[Sizes]:
    """Lengths divided by `shrink`, at least 1."""
    return [
        Sizes(max(1, one.input_tokens // shrink), max(1, one.output_tokens // shrink), one.block_ids)
        for one in requests
    ]


def trace_times(requests: Sequence[TracedRequest], rate: float | None) -> Seconds:
    """As recorded, or stretched to `rate`. Raises LoadError where that cannot be."""
    recorded_s = np.array([one.at_s for one in requests], dtype=np.float64)
    if rate is None:
        return recorded_s - recorded_s[:1]
    try:
        return stretched(recorded_s, rate)
    except ValueError as error:
        raise LoadError(str(error)) from None


def make_load(
    times_s: Seconds,
    sizes: Sequence[Sizes],
    prompts: Prompts,
    ask: RequestTemplate,
    *,
    warm_up: int,
    max_model_len: int | None,
    shrink: int = 1,
) -> PlannedLoad:
    """One request for each time and size. Raises LoadError if none is left, or if it is too much to hold."""
    if sum(size.input_tokens for size in sizes) > MOST_PROMPT_TOKENS:
        raise LoadError(f"more than {MOST_PROMPT_TOKENS} prompt tokens for one rate; ask for fewer requests")
    planned: list[Planned] = []
    left_out = 0
    for number, (at_s, size) in enumerate(zip(times_s, sizes, strict=True)):
        if max_model_len is not None and size.input_tokens + size.output_tokens > max_model_len:
            left_out += number >= warm_up
            continue
        if size.block_ids:
            block_tokens = max(1, BLOCK_TOKENS // shrink)
            prompt = prompts.of_blocks(size.block_ids, block_tokens, size.input_tokens)
        else:
            prompt = prompts.unique(number, size.input_tokens)
        planned.append(
            Planned(
                float(at_s),
                len(prompt),
                size.output_tokens,
                number >= warm_up,
                body(prompt, size, ask, number),
            )
        )
    counted = sum(one.measured for one in planned)
    if not counted:
        raise LoadError(f"every request is longer than the model's {max_model_len} tokens")
    span_s = float(times_s[-1] - times_s[warm_up])
    expected = len(times_s) - warm_up
    # The last gap ends with an arrival that is not there: the mean of the others stands for it.
    span_s *= expected / (expected - 1) if expected > 1 else 0.0
    return PlannedLoad(planned, counted / span_s if span_s else 0.0, span_s, left_out)


def body(prompt: TokenIds, size: Sizes, ask: RequestTemplate, number: int) -> bytes:
    """A request for exactly `output_tokens`, whatever the model samples and a server's defaults are."""
    return msgspec.json.encode(
        {
            "model": ask.model,
            "prompt": prompt.tolist(),
            "max_tokens": size.output_tokens,
            "temperature": ask.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": number,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
