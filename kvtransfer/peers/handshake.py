"""The handshake's check that two transfer processes fit together, before they exchange anything else."""

from kvtransfer.protocol.layout import head_range, shared_heads
from kvtransfer.protocol.peer_messages import PeerHello

PEER_VERSION = "baton-kv/2"


def mismatch(ours: PeerHello, theirs: PeerHello) -> str | None:
    """Why these two must not talk, naming the field and both values; None if they fit.

    Page size, page layout and tensor parallelism may differ: the slot layout is the same for all. Number and
    size of the slots may differ too: a segment is made to fit both. Ranks that have no head in common have
    nothing to transfer.
    """
    pairs: tuple[tuple[str, object, object], ...] = (
        ("version", ours.version, theirs.version),
        ("model_digest", ours.geometry.model_digest, theirs.geometry.model_digest),
        ("layers", ours.geometry.layers, theirs.geometry.layers),
        ("kv_heads", ours.geometry.kv_heads, theirs.geometry.kv_heads),
        ("head_dim", ours.geometry.head_dim, theirs.geometry.head_dim),
        ("dtype", ours.geometry.dtype, theirs.geometry.dtype),
        ("mover", ours.mover, theirs.mover),
    )
    for name, our_value, their_value in pairs:
        if our_value != their_value:
            return f"{name} differs: {our_value!r} here, {their_value!r} there"
    kv_heads = ours.geometry.kv_heads
    if kv_heads % ours.tp or kv_heads % theirs.tp:
        return f"tp: {ours.tp} here and {theirs.tp} there do not both divide {kv_heads} KV heads"
    here, there = (head_range(kv_heads, one.rank, one.tp) for one in (ours, theirs))
    if not shared_heads(here, there):
        return f"rank: {ours.rank} of {ours.tp} here and {theirs.rank} of {theirs.tp} there share no head"
    if ours.epoch == theirs.epoch:
        return "a transfer process cannot be its own peer"
    return None
