"""Samples of every message type, and damage done to their frames: what every decoder has to stand."""

import types
from collections.abc import Iterator
from random import Random
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from kvtransfer.codecs import WORKER_COMMANDS, WORKER_EVENTS
from kvtransfer.messages import Command, Event
from kvtransfer.net.codec import PROTOCOL_VERSION, Codec
from kvtransfer.protocol.peer_messages import PeerMessage
from services.protocol.messages import Report, Request

BOUNDARIES: dict[str, tuple[Any, Codec[Any]]] = {
    "router to worker": (Request, Codec(Request)),
    "worker to router": (Report, Codec(Report)),
    "worker to transfer": (Command, WORKER_COMMANDS),
    "transfer to worker": (Event, WORKER_EVENTS),
    "transfer to transfer": (PeerMessage, Codec(PeerMessage)),
}
"""Without seals, which would keep all damage from the decoders."""
Kind = TypeVar("Kind")


def message_types(union: Any) -> list[type[msgspec.Struct]]:
    return list(get_args(union))


def sample(kind: type[Kind], rng: Random) -> Kind:
    """A valid message with every field filled at random, also those that have a default."""
    hints = get_type_hints(kind, include_extras=True)
    fields = {field.name: value_of(hints[field.name], rng) for field in msgspec.structs.fields(kind)}
    return kind(**fields)


def value_of(hint: Any, rng: Random, bounds: tuple[msgspec.Meta, ...] = ()) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        given = tuple(one for one in arguments[1:] if isinstance(one, msgspec.Meta))
        return value_of(arguments[0], rng, given)
    if origin in (Union, types.UnionType):
        return value_of(rng.choice(arguments), rng, bounds)
    if origin is Literal:
        return rng.choice(arguments)
    if hint is type(None):
        return None
    if origin is list:
        least = max((meta.min_length or 0 for meta in bounds), default=0)
        return [value_of(arguments[0], rng) for _ in range(least + rng.randint(0, 3))]
    if origin is tuple:
        least = max((meta.min_length or 0 for meta in bounds), default=0)
        return tuple(value_of(arguments[0], rng) for _ in range(least + rng.randint(0, 3)))
    if origin is dict:
        return {value_of(arguments[0], rng): value_of(arguments[1], rng) for _ in range(rng.randint(0, 3))}
    if hint is bool:
        return rng.random() < 0.5
    if hint is int:
        low = max((int(meta.ge) for meta in bounds if meta.ge is not None), default=0)
        high = min((int(meta.le) for meta in bounds if meta.le is not None), default=low + 100)
        return rng.randint(low, min(high, low + 100))
    if hint is float:
        return rng.choice((0.25, 0.5, 1.0))
    if hint is str:
        return "".join(rng.choice("aé/漢") for _ in range(rng.randint(1, 8)))
    if hint is bytes:
        return rng.randbytes(rng.randint(0, 8))
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return sample(hint, rng)
    raise TypeError(f"no sample of {hint}")


def damaged(frame: bytes, rng: Random) -> bytes:
    """Bytes turned over, cut off, put in, taken out, or another value in the place of one."""
    data = bytearray(frame)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data)) if data else 0
        match rng.randrange(6):
            case 0 if data:
                data[at] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at] = rng.choice((0x00, 0x7F, 0xC0, 0xC1, 0xC6, 0xCF, 0xD3, 0xDD, 0xDF, 0xFF))
            case 2:
                del data[at:]
            case 3:
                data[at:at] = rng.randbytes(rng.randint(1, 9))
            case 4 if data:
                del data[at : at + rng.randint(1, 9)]
            case _:
                data[at:at] = data[: rng.randint(0, len(data))]
    return bytes(data)


def nasty() -> Iterator[bytes]:
    """Frames that have hurt decoders: nesting, lengths that lie, keys that repeat, text that is none."""
    head = bytes((PROTOCOL_VERSION,))
    yield b""
    yield head
    yield head + b"\x91" * 100_000
    yield head + b"\xdd\xff\xff\xff\xff"
    yield head + b"\x91\xdf\xff\xff\xff\xff"
    yield head + b"\x91\xc6\xff\xff\xff\xff"
    yield head + b"\x91\x82\xa4type\xa4ping\xa4type\xa4ping"
    yield head + b"\x91\x81\xa4type\xa2\xff\xfe"
    yield head + b"\x91\xd6\xff\x00\x00\x00\x00"
