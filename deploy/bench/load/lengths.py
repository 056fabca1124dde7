"""How many tokens prompts and answers have: always the same, or sampled. Pure."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_TOKENS = 1 << 24
Tokens = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Fixed:
    tokens: int

    def sample(self, count: int, random: np.random.Generator) -> Tokens:
        return np.full(count, self.tokens, dtype=np.int64)

    def __str__(self) -> str:
        return str(self.tokens)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every length from `low` to `high`, both included, as often as any other."""

    low: int
    high: int

    def sample(self, count: int, random: np.random.Generator) -> Tokens:
        return random.integers(self.low, self.high, count, endpoint=True)

    def __str__(self) -> str:
        return f"uniform:{self.low}:{self.high}"


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Half below `median`, with the tail of real prompts (`sigma` of the logarithm); cut to 1 and `most`."""

    median: int
    sigma: float
    most: int

    def sample(self, count: int, random: np.random.Generator) -> Tokens:
        sampled = random.lognormal(np.log(self.median), self.sigma, count)
        return np.clip(np.rint(sampled), 1, self.most).astype(np.int64)

    def __str__(self) -> str:
        return f"lognormal:{self.median}:{self.sigma:g}:{self.most}"


Lengths = Fixed | Uniform | LogNormal


def parse_lengths(text: str) -> Lengths:
    """`512`, `uniform:LOW:HIGH` or `lognormal:MEDIAN:SIGMA:MOST`. Raises ValueError with what is allowed."""
    match text.split(":"):
        case [tokens]:
            return Fixed(_whole(tokens, text))
        case ["uniform", low, high]:
            uniform = Uniform(_whole(low, text), _whole(high, text))
            if uniform.low > uniform.high:
                raise ValueError(f"{text!r}: {uniform.low} is more than {uniform.high}")
            return uniform
        case ["lognormal", median, sigma, most]:
            try:
                spread = float(sigma)
            except ValueError:
                spread = -1.0
            if not 0 < spread <= 10:
                raise ValueError(f"{text!r}: {sigma!r} is not a number above 0 and up to 10")
            sampled = LogNormal(_whole(median, text), spread, _whole(most, text))
            if sampled.median > sampled.most:
                raise ValueError(f"{text!r}: {sampled.median} is more than {sampled.most}")
            return sampled
    raise ValueError(f"{text!r} is none of 512, uniform:LOW:HIGH, lognormal:MEDIAN:SIGMA:MOST")


def _whole(part: str, text: str) -> int:
    if not (part.isascii() and part.isdigit()) or not 1 <= int(part) <= MOST_TOKENS:
        raise ValueError(f"{text!r}: {part!r} is not a number of tokens from 1 to {MOST_TOKENS}")
    return int(part)
