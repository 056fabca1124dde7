"""Every decoder, for a moment: it takes what is valid and raises what is promised for all else."""

from random import Random
from typing import Any

import msgspec
import pytest

from kvtransfer.errors import ProtocolError
from tests.fuzz.frames import BOUNDARIES, damaged, message_types, sample
from tests.fuzz.targets import TARGETS, Target, attack, attack_with_the_nasty

KINDS = [
    pytest.param(name, kind, id=f"{name}: {kind.__name__}")
    for name, (union, _) in BOUNDARIES.items()
    for kind in message_types(union)
]


@pytest.mark.parametrize(("boundary", "kind"), KINDS)
def test_every_message_survives_the_way_and_none_of_its_damage_does_harm(
    boundary: str, kind: type[msgspec.Struct]
) -> None:
    _, codec = BOUNDARIES[boundary]
    rng = Random(kind.__name__)
    refused = 0
    for _ in range(40):
        message = sample(kind, rng)
        frame = codec.encode([message])
        assert codec.decode(frame) == [message]
        for broken in (frame[: rng.randrange(len(frame))], damaged(frame, rng)):
            try:
                codec.encode(codec.decode(broken))
            except ProtocolError:
                refused += 1
    assert refused > 40  # every frame that is cut short, and much else


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_decoder_raises_nothing_else(target: Target) -> None:
    attack_with_the_nasty(target)
    attack(target, Random(target.name), 300)


def test_a_decoder_that_raises_something_else_is_seen() -> None:
    def take(data: bytes) -> Any:
        return data[5]

    with pytest.raises(IndexError) as raised:
        attack(Target("broken", lambda rng: b"123456", take), Random(1), 300)
    assert raised.value.__notes__[0].startswith("broken: b'")
