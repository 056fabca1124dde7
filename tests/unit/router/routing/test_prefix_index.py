"""The index of prefixes, against one that remembers every prompt."""

import random

from router.routing.prefix_index import BLOCK_TOKENS, MAX_BLOCKS, PrefixIndex, prefix_blocks

ROOM = 1 << 20


def prompt(*parts: tuple[int, int]) -> list[int]:
    """`(token, blocks)` after each other."""
    return [token for token, blocks in parts for _ in range(blocks * BLOCK_TOKENS)]


def test_blocks_are_a_chain_over_whole_blocks() -> None:
    one, two = prefix_blocks(prompt((1, 3), (2, 2)), b""), prefix_blocks(prompt((1, 3), (3, 2)), b"")
    assert len(one) == 5
    assert one[:3] == two[:3]
    assert not set(one[3:]) & set(two[3:])
    assert len(set(one)) == 5, "equal blocks at different places differ"
    assert prefix_blocks([1] * (BLOCK_TOKENS - 1), b"") == []
    assert prefix_blocks([*prompt((1, 1)), 5], b"") == one[:1]
    assert len(prefix_blocks([7] * (MAX_BLOCKS + 9) * BLOCK_TOKENS, b"")) == MAX_BLOCKS


def test_tenants_share_nothing() -> None:
    same = prompt((1, 4))
    assert not set(prefix_blocks(same, b"a")) & set(prefix_blocks(same, b"b"))


def test_a_life_that_ends_takes_its_prefixes_along() -> None:
    index, blocks = PrefixIndex(), prefix_blocks(prompt((1, 4)), b"")
    index.note("a", blocks, ROOM)
    index.note("b", blocks[:2], ROOM)
    index.forget("a")
    assert index.cached_tokens("a", blocks) == 0
    assert index.cached_tokens("b", blocks) == 2 * BLOCK_TOKENS


def test_no_more_is_remembered_than_the_pool_holds() -> None:
    index = PrefixIndex()
    old, new = prefix_blocks(prompt((1, 6)), b""), prefix_blocks(prompt((2, 6)), b"")
    index.note("a", old, 8 * BLOCK_TOKENS)
    index.note("a", new, 8 * BLOCK_TOKENS)
    assert index.count_blocks("a") == 8
    assert index.cached_tokens("a", new) == 6 * BLOCK_TOKENS
    assert index.cached_tokens("a", old) == 2 * BLOCK_TOKENS, "the end of the older one went first"
    index.note("a", new, 3 * BLOCK_TOKENS)
    assert index.cached_tokens("a", new) == 3 * BLOCK_TOKENS


def test_the_longest_known_prefix_is_found_as_by_looking_at_every_block() -> None:
    rng = random.Random(3)
    index, room = PrefixIndex(), 40
    recent: list[int] = []
    for _ in range(600):
        parts = [(rng.randrange(3), 1) for _ in range(rng.randrange(12))]
        blocks = prefix_blocks(prompt(*parts), b"")
        known = 0
        while known < len(blocks) and blocks[known] in recent:
            known += 1
        assert index.cached_tokens("w", blocks) == known * BLOCK_TOKENS
        index.note("w", blocks, room * BLOCK_TOKENS)
        for block in reversed(blocks):
            recent = [one for one in recent if one != block] + [block]
        recent = recent[-room:]
