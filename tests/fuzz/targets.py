"""What is fuzzed: each target takes bytes and raises what its callers are promised, or nothing."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from kvtransfer.errors import ProtocolError
from kvtransfer.net.codec import Codec
from router.errors import ApiError
from router.openai.requests import BodyDecoder, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from tests.fuzz.frames import BOUNDARIES, damaged, message_types, nasty, sample

BODIES: list[tuple[type[Any], list[dict[str, Any]]]] = [
    (
        CompletionBody,
        [
            {"prompt": "a", "max_tokens": 3, "n": 2, "stop": ["x"], "logit_bias": {"5": -1.5}},
            {"prompt": [[1, 2], [3]], "stream": True, "stream_options": {"include_usage": True}, "seed": -1},
        ],
    ),
    (
        ChatBody,
        [
            {"messages": [{"role": "user", "content": "é"}], "temperature": 0.5, "top_p": 0.9},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "logprobs": True},
        ],
    ),
    (TokenizeBody, [{"prompt": "a"}]),
    (DetokenizeBody, [{"tokens": [1, 2]}]),
]


@dataclass(frozen=True)
class Target:
    """`seeds` are valid inputs; `take` may raise only what it says."""

    name: str
    seeds: Callable[[Random], bytes]
    take: Callable[[bytes], None]


def _frames(name: str) -> Target:
    union, codec = BOUNDARIES[name]
    kinds = message_types(union)

    def seeds(rng: Random) -> bytes:
        return codec.encode([sample(rng.choice(kinds), rng) for _ in range(rng.randint(1, 3))])

    return Target(name, seeds, lambda data: take_frame(codec, data))


def take_frame(codec: Codec[Any], data: bytes) -> None:
    """What is decoded is a message of this boundary, so it can be said again."""
    try:
        messages = codec.decode(data)
    except ProtocolError:
        return
    codec.encode(messages)


def _bodies(kind: type[Any], examples: list[dict[str, Any]]) -> Target:
    decoder = BodyDecoder()

    def take(data: bytes) -> None:
        try:
            decoder.decode(kind, data)
        except ApiError as error:
            if not 400 <= error.status < 500:
                raise AssertionError(f"{error.status} for a body") from error
            error.body()

    return Target(kind.__name__, lambda rng: json.dumps(rng.choice(examples)).encode(), take)


TARGETS = [*map(_frames, BOUNDARIES), *(_bodies(kind, examples) for kind, examples in BODIES)]


def attack(target: Target, rng: Random, rounds: int) -> None:
    """Raises whatever the target should not have, with the input in its notes."""
    for round_number in range(rounds):
        data = target.seeds(rng)
        if round_number % 8:
            data = damaged(data, rng)
        _try(target, data)


def attack_with_the_nasty(target: Target) -> None:
    for data in nasty():
        _try(target, data)


def _try(target: Target, data: bytes) -> None:
    try:
        target.take(data)
    except Exception as error:
        error.add_note(f"{target.name}: {data!r}")
        raise
