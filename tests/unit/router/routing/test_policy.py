"""Which workers are chosen."""

import random

from msgspec.structs import replace

from router.routing.policy import Candidate, place, place_decode, spare
from services.protocol.messages import Role, WorkerTransferAddress


def worker(name: str, role: Role, **changes: object) -> Candidate:
    base = Candidate(
        name=name,
        role=role,
        model_digest="m",
        transfer=None if role == "unified" else WorkerTransferAddress(f"ipc:///{name}", 1),
        page_size_tokens=16,
        pages=100,
        reported_queued=0,
        reported_running=0,
        reported_used_pages=0,
        queued_tokens=0,
        live_tokens=0,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def names(workers: list[Candidate], tokens: int = 100) -> tuple[str | None, str] | None:
    found = place(workers, tokens)
    return None if found is None else (found.prefill.name if found.prefill else None, found.decode.name)


def test_a_pair_needs_both_sides_and_their_transfer_processes() -> None:
    p, d = worker("p", "prefill"), worker("d", "decode")
    assert names([]) is None
    assert names([p]) is None
    assert names([d]) is None
    assert names([p, d]) == ("p", "d")
    assert names([p, replace(d, transfer=None)]) is None
    assert names([p, replace(d, model_digest="other")]) is None


def test_a_unified_worker_is_preferred() -> None:
    assert names([worker("p", "prefill"), worker("d", "decode"), worker("u", "unified")]) == (None, "u")
    two = [worker("u1", "unified", uncached_tokens=50), worker("u2", "unified")]
    assert names(two) == (None, "u2")


def test_prefill_goes_where_the_fewest_tokens_wait() -> None:
    d = worker("d", "decode")
    assert names(
        [worker("p1", "prefill", uncached_tokens=900), worker("p2", "prefill", uncached_tokens=10), d]
    ) == (
        "p2",
        "d",
    )
    # Equal by our own account: what the worker reports decides.
    assert names([worker("p1", "prefill", reported_queued=3), worker("p2", "prefill"), d]) == ("p2", "d")


def test_decode_goes_where_the_smallest_share_of_pages_is_used() -> None:
    p = worker("p", "prefill")
    full, large = worker("a", "decode", reported_used_pages=50), worker("b", "decode", pages=1000)
    assert names([p, full, large]) == ("p", "b")
    # A burst since the last report counts as well.
    burst = worker("b", "decode", live_tokens=16 * 60)
    assert names([p, full, burst]) == ("p", "a")


def test_a_full_decode_worker_is_the_last_choice_but_still_one() -> None:
    p = worker("p", "prefill")
    full = worker("a", "decode", reported_used_pages=99)
    assert names([p, full, worker("b", "decode", reported_used_pages=90)], tokens=100) == ("p", "b")
    assert names([p, full], tokens=100) == ("p", "a")


def test_prefill_is_only_paired_with_its_own_model() -> None:
    p1, p2 = worker("p1", "prefill", model_digest="x"), worker("p2", "prefill", uncached_tokens=5)
    assert names([p1, p2, worker("d", "decode")]) == ("p2", "d")


def test_who_is_avoided_is_taken_only_where_there_is_no_other() -> None:
    p, d, e = worker("p", "prefill"), worker("d", "decode"), worker("e", "decode")
    assert spare([p, d, e], frozenset()) == [p, d, e]
    assert spare([p, d, e], frozenset({"d"})) == [p, e]
    assert spare([p, d], frozenset({"d"})) == [p, d]
    assert spare([p, d, replace(e, transfer=None)], frozenset({"d"})) == [p, d, replace(e, transfer=None)]
    assert spare([p, d, e], frozenset({"d", "e"})) == [p, d, e]
    assert spare([p, d, e], frozenset({"d", "e"}), strict=True) == [p]


def test_held_kv_goes_to_the_emptiest_decode_worker_of_its_model() -> None:
    p, d = worker("p", "prefill"), worker("d", "decode", live_tokens=800)
    e, f = worker("e", "decode", live_tokens=16), worker("f", "decode", model_digest="other")
    assert place_decode([p, d, e, f], "m", 100) == e
    assert place_decode([p, d, e, f], "other", 100) == f
    assert place_decode([p, replace(e, transfer=None)], "m", 100) is None


def test_a_worker_whose_pool_is_too_small_is_never_taken() -> None:
    p, d = worker("p", "prefill", pages=4), worker("d", "decode")
    assert names([p, d], tokens=64) == ("p", "d")
    assert names([p, d], tokens=65) is None
    assert names([p, worker("q", "prefill", uncached_tokens=9000), d], tokens=65) == ("q", "d")
    assert names([worker("p", "prefill"), worker("d", "decode", pages=6)], tokens=100) is None


def test_a_prefix_draws_a_prompt_until_its_worker_is_behind_by_its_length() -> None:
    d, other = worker("d", "decode"), worker("q", "prefill", uncached_tokens=100)
    for behind, chosen in ((0, "p"), (639, "p"), (641, "q")):
        holder = worker("p", "prefill", cached_tokens=640, uncached_tokens=100 + behind)
        assert names([holder, other, d]) == (chosen, "d"), behind
    # The longer of two prefixes, if all else is equal.
    short, long = worker("p", "prefill", cached_tokens=64), worker("q", "prefill", cached_tokens=128)
    assert names([short, long, d]) == ("q", "d")


def test_a_prefix_need_not_be_moved_to_a_decode_worker_that_has_it() -> None:
    p, empty = worker("p", "prefill"), worker("d", "decode")
    for used_pages, chosen in ((3, "e"), (5, "d")):
        holder = worker("e", "decode", cached_tokens=64, reported_used_pages=used_pages)
        # Of 100 tokens the holder lacks 36: 3 pages instead of 7.
        assert names([p, empty, holder]) == ("p", chosen), used_pages
    full = worker("e", "decode", cached_tokens=64, reported_used_pages=95)
    assert names([p, worker("d", "decode", reported_used_pages=93), full]) == ("p", "d"), "a full one is last"


def test_equal_workers_take_turns() -> None:
    p, d = worker("p", "prefill", last_assigned=4), worker("d", "decode", last_assigned=4)
    assert names([p, worker("q", "prefill", last_assigned=3), d, worker("e", "decode", last_assigned=2)]) == (
        "q",
        "e",
    )


def test_whatever_the_load_the_choice_can_hold_it_and_nobody_is_clearly_better() -> None:
    rng = random.Random(5)
    for _ in range(2000):
        workers = [
            worker(
                f"{role}{number}",
                role,
                pages=rng.choice((4, 10, 100)),
                reported_used_pages=rng.randrange(5),
                uncached_tokens=rng.randrange(3) * 500,
                cached_tokens=rng.choice((0, 64, 640)),
                last_assigned=rng.randrange(3),
            )
            for role in ("prefill", "decode")
            for number in range(rng.randrange(4))
        ]
        tokens = rng.choice((10, 100, 1000))
        needed = -(-tokens // 16)
        able = {
            role: [one for one in workers if one.role == role and one.pages >= needed]
            for role in ("prefill", "decode")
        }
        found = place(workers, tokens)
        assert (found is None) == (not able["prefill"] or not able["decode"])
        if found is None:
            continue
        assert found.prefill is not None
        assert found.prefill in able["prefill"]
        assert found.decode in able["decode"]

        def room(one: Candidate, needed: int = needed) -> bool:
            return one.reported_used_pages + needed <= one.pages

        if room(found.prefill):
            best = min(one.uncached_tokens - one.cached_tokens for one in able["prefill"] if room(one))
            assert found.prefill.uncached_tokens - found.prefill.cached_tokens == best
        else:
            assert not any(map(room, able["prefill"]))
        assert room(found.decode) or not any(map(room, able["decode"]))


def test_equal_prompts_are_spread_and_a_shared_prefix_stays_together_within_its_bound() -> None:
    """A router's account, as it sends a burst of prompts before any of them has run."""
    d = worker("d", "decode", pages=1 << 20)
    for shared_tokens, most_apart in ((0, 1000), (640, 1640)):
        waiting = dict.fromkeys("pqr", 0)
        seen: set[str] = set()
        for last_assigned in range(60):
            found = place(
                [
                    worker(
                        name,
                        "prefill",
                        pages=1 << 20,
                        uncached_tokens=waiting[name],
                        cached_tokens=shared_tokens if name in seen else 0,
                        last_assigned=last_assigned,
                    )
                    for name in "pqr"
                ]
                + [d],
                1000,
            )
            assert found is not None
            assert found.prefill is not None
            name = found.prefill.name
            waiting[name] += 1000 - found.prefill.cached_tokens
            seen.add(name)
            assert max(waiting.values()) - min(waiting.values()) <= most_apart


def test_a_shared_prefix_has_one_worker_while_it_keeps_up() -> None:
    d = worker("d", "decode")
    for last_assigned in range(5):
        first = worker("q", "prefill", cached_tokens=640, uncached_tokens=360, last_assigned=last_assigned)
        assert names([worker("p", "prefill"), first, d], tokens=1000) == ("q", "d")
