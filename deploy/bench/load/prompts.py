"""Prompts as token ids, so that their lengths are exact whatever the tokenizer. Pure.

Ids are sampled from a range; what each prompt holds depends on the seed, the stream it belongs to (one for
each rate of a run) and its number or its blocks' ids alone. A second rate therefore finds nothing of the
first one's in a prefix cache, and two systems that are compared get the same prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int64]
_UNIQUE, _BLOCK = 0, 1


@dataclass(frozen=True, slots=True)
class Prompts:
    """`low` to `high`, both included, are the ids; `stream` keeps the prompts of different runs apart."""

    seed: int
    stream: int
    low: int
    high: int

    def unique(self, number: int, tokens: int) -> TokenIds:
        """int64 [tokens], shared with no other number."""
        return self._draw(_UNIQUE, number, tokens)

    def of_blocks(self, block_ids: Sequence[int], block_tokens: int, tokens: int) -> TokenIds:
        """int64 [tokens], made of the blocks in order and cut: the same id, the same tokens."""
        parts = [self._draw(_BLOCK, block_id, block_tokens) for block_id in block_ids]
        return np.concatenate(parts)[:tokens]

    def _draw(self, kind: int, number: int, tokens: int) -> TokenIds:
        random = np.random.default_rng((self.seed, self.stream, kind, number))
        return random.integers(self.low, self.high, tokens, endpoint=True)
