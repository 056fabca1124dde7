"""Which workers are chosen."""

from msgspec.structs import replace

from router.policy import Candidate, place, place_decode, spare
from services.messages import Role, TransferAddress


def worker(name: str, role: Role, **changes: object) -> Candidate:
    base = Candidate(
        name=name,
        role=role,
        model_digest="m",
        transfer=None if role == "unified" else TransferAddress(f"ipc:///{name}", 1),
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
    two = [worker("u1", "unified", queued_tokens=50), worker("u2", "unified")]
    assert names(two) == (None, "u2")


def test_prefill_goes_where_the_fewest_tokens_wait() -> None:
    d = worker("d", "decode")
    assert names(
        [worker("p1", "prefill", queued_tokens=900), worker("p2", "prefill", queued_tokens=10), d]
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
    p1, p2 = worker("p1", "prefill", model_digest="x"), worker("p2", "prefill", queued_tokens=5)
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
