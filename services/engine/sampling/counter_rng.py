"""The one random number of a draw, from a counter-based generator: no state, so no batch, worker or retry
can shift it (the idea of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)."""

import struct
from hashlib import blake2b


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, keyed by the request's seed, its choice and the position."""
    digest = blake2b(
        struct.pack("<QQQ", seed, choice, position), digest_size=8, person=b"baton draw"
    ).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
