"""API keys: the one that a request comes with, if it is valid."""

import hmac
from collections.abc import Iterable, Sequence


class Keys:
    """The valid API keys. A given key is compared with all of them, each in constant time, so that the time
    taken says nothing about any of them."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [(key, key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find(self, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """The one valid key of `Authorization: Bearer KEY` and `x-api-key: KEY`. None where there is none, or
        where not all that are given are that one: whose cache would such a request use?"""
        found: set[str | None] = set()
        for name, value in headers:
            if name == b"x-api-key":
                found.add(self._known(value.strip()))
            elif name == b"authorization":
                scheme, _, given = value.strip().partition(b" ")
                if scheme.lower() == b"bearer":
                    found.add(self._known(given.strip()))
        return found.pop() if len(found) == 1 else None

    def _known(self, given: bytes) -> str | None:
        known: str | None = None
        for key, encoded in self._keys:
            if hmac.compare_digest(given, encoded):
                known = key
        return known
