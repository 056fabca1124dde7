"""Parsers of single values. Each takes the text of a flag, a variable or a YAML scalar alike, and raises
ValueError saying what is allowed; the caller names where the text came from."""

import math
import re
import string
from collections.abc import Callable
from pathlib import Path

from services.memory.sizes import parse_bytes

Parser = Callable[[str], object]
DNS_SCHEME = "tcp+dns://"
_ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::(?P<port>\d{1,5}))?"
)
_DEFAULT_PORTS = {"http": "80", "https": "443"}
_NAME_CHARACTERS = frozenset(string.ascii_letters + string.digits + "-._")


def text(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty")
    return value


def parse_api_key(value: str) -> str:
    """A bearer key. The message of an error never shows it."""
    if not value or "," in value or not (value.isascii() and value.isprintable()):
        raise ValueError("a key must be printable ASCII, not empty, and without a comma")
    return value


def path(value: str) -> Path:
    return Path(text(value)).expanduser()


def flag(value: str) -> bool:
    if value.lower() in ("true", "1", "yes", "on"):
        return True
    if value.lower() in ("false", "0", "no", "off"):
        return False
    raise ValueError(f"{value!r} is neither true nor false")


def choice(*allowed: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"{value!r} is not one of {', '.join(allowed)}")
        return value

    return parse


def integer(low: int, high: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            raise ValueError(f"{value!r} is not a whole number") from None
        if not low <= number <= high:
            raise ValueError(f"{number} is out of range; allowed are {low} to {high}")
        return number

    return parse


def power_of_two(low: int, high: int) -> Callable[[str], int]:
    whole = integer(low, high)

    def parse(value: str) -> int:
        number = whole(value)
        if number & (number - 1):
            raise ValueError(f"{number} is not a power of two")
        return number

    return parse


def fraction(value: str) -> float:
    """A number strictly between 0 and 1."""
    number = _number(value)
    if not 0 < number < 1:
        raise ValueError(f"{value} must lie between 0 and 1, both excluded")
    return number


def seconds(low: float, high: float) -> Callable[[str], float]:
    def parse(value: str) -> float:
        number = _number(value)
        if not low <= number <= high:
            raise ValueError(f"{value} is out of range; allowed are {low:g} to {high:g} seconds")
        return number

    return parse


def number(low: float, high: float) -> Callable[[str], float]:
    def parse(value: str) -> float:
        given = _number(value)
        if not low <= given <= high:
            raise ValueError(f"{value} is out of range; allowed are {low:g} to {high:g}")
        return given

    return parse


def slot_bytes(value: str) -> int:
    size_bytes = parse_bytes(value)
    if size_bytes % 256 or size_bytes >= 1 << 40:
        raise ValueError(f"{value} is not a multiple of 256 bytes below 1TiB")
    return size_bytes


def endpoint(value: str) -> str:
    """A ZMQ address: `ipc:///path` or `tcp://host:port`, with an optional `#key-name` on tcp."""
    scheme, separator, rest = value.partition("://")
    if not separator or scheme not in ("ipc", "tcp") or not rest:
        raise ValueError(f"{value!r} is not an endpoint; write ipc:///path or tcp://host:port")
    if scheme == "ipc":
        if not rest.startswith("/"):
            raise ValueError(f"{value!r}: the path of an ipc:// endpoint must be absolute")
        if len(rest.encode()) > 107:
            raise ValueError(f"{value!r}: a UNIX socket's path may have at most 107 bytes")
    else:
        port = rest.partition("#")[0].rpartition(":")[2]
        if not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(f"{value!r}: a tcp:// endpoint ends with a port from 1 to 65535")
    return value


def origins(value: str) -> str:
    """`*`, or origins as browsers write them: scheme, host and, unless it is the scheme's own, port."""
    return ",".join(_origin(one.strip()) for one in value.split(","))


def _origin(value: str) -> str:
    if value == "*":
        return value
    match = _ORIGIN.fullmatch(value.lower())
    if match is None or int(match["port"] or 0) > 65535:
        raise ValueError(
            f"{value!r} is not an origin; write https://host or http://host:port, or '*' for all"
        )
    port = match["port"] and str(int(match["port"]))
    has_port = port and port != _DEFAULT_PORTS.get(match["scheme"])
    return f"{match['scheme']}://{match['host']}" + (f":{port}" if has_port else "")


def worker_endpoint(value: str) -> str:
    """An `endpoint`, or `tcp+dns://name:port`, which stands for all the addresses that the name has."""
    if not value.startswith(DNS_SCHEME):
        return endpoint(value)
    rest = value.removeprefix(DNS_SCHEME)
    name = rest.partition("#")[0].rpartition(":")[0]
    if not name or not set(name) <= _NAME_CHARACTERS:
        raise ValueError(
            f"{value!r}: a tcp+dns:// endpoint has a name, as in tcp+dns://prefill.baton.svc:7000"
        )
    endpoint(f"tcp://{rest}")
    return value


def above_zero(value: str) -> float:
    number = _number(value)
    if number <= 0:
        raise ValueError(f"{value} must be above 0")
    return number


def _number(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"{value!r} is not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not a finite number")
    return number
