"""The prefix index: which prefixes each worker has cached, judged by what was sent to it. Pure.

A prompt is a chain of block hashes, each of one block and all before it. For every worker the index has the
hashes of the blocks that went there, as many as its KV pool has room for, least recently used first out: what
the worker's own prefix cache does with pages (services/scheduler/pages.py), in coarser blocks and without
asking it. It may be wrong both ways; then a prompt is computed where it need not have been, or moved.

The hash is Python's own: keyed anew in every process, so that nobody can make prompts collide at will, and a
collision could only misplace a prompt. The idea is that of SGLang's cache-aware router and of Preble
(Srivatsa et al., 2024), with a flat index in place of a tree.
"""

import struct
from collections import OrderedDict
from collections.abc import Sequence

BLOCK_TOKENS = 128
"""A shorter common prefix is not worth a choice."""
MAX_BLOCKS = 256
"""Of one prompt: what is beyond its first 32768 tokens is not looked at."""
MAX_WORKER_BLOCKS = 1 << 14
"""Of one worker, about 2 MiB of memory, whatever its pool holds."""
_BLOCK_BYTES = BLOCK_TOKENS * struct.calcsize("i")


def prefix_blocks(prompt: Sequence[int], salt: bytes) -> list[int]:
    """The chain of a prompt's whole blocks. `salt` separates tenants, as it does their caches."""
    count = min(len(prompt) // BLOCK_TOKENS, MAX_BLOCKS)
    tokens = struct.pack(f"{count * BLOCK_TOKENS}i", *prompt[: count * BLOCK_TOKENS])
    parent, chain = hash(salt), []
    for start in range(0, count * _BLOCK_BYTES, _BLOCK_BYTES):
        parent = hash((parent, tokens[start : start + _BLOCK_BYTES]))
        chain.append(parent)
    return chain


class PrefixIndex:
    def __init__(self) -> None:
        self._workers: dict[str, OrderedDict[int, None]] = {}

    def cached_tokens(self, worker: str, blocks: Sequence[int]) -> int:
        """How long a prefix of the chain the worker is expected to have."""
        known = self._workers.get(worker)
        if not known or not blocks:
            return 0
        # A chain that is forgotten is forgotten from its end, so the known part is found by halving.
        low, high = 0, len(blocks)
        while low < high:
            middle = (low + high) // 2
            if blocks[middle] in known:
                low = middle + 1
            else:
                high = middle
        return low * BLOCK_TOKENS

    def note(self, worker: str, blocks: Sequence[int], room_tokens: int) -> None:
        """A prompt was sent to the worker, whose pool holds `room_tokens`."""
        if not blocks:
            return
        known = self._workers.setdefault(worker, OrderedDict())
        # From the end, so that no block is more recent than the one it follows.
        for block in reversed(blocks):
            if block in known:
                known.move_to_end(block)
            else:
                known[block] = None
        most = min(room_tokens // BLOCK_TOKENS, MAX_WORKER_BLOCKS)
        while len(known) > most:
            known.popitem(last=False)

    def forget(self, worker: str) -> None:
        """Its life has ended, and its cache with it."""
        self._workers.pop(worker, None)

    def count_blocks(self, worker: str) -> int:
        return len(self._workers.get(worker, ()))
