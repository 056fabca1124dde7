"""Whether two transfer processes fit together: decided before anything else is said."""

from kvtransfer.peer_messages import PeerHello

PEER_VERSION = "baton-kv/1"


def mismatch(ours: PeerHello, theirs: PeerHello) -> str | None:
    """Why these two must not talk, naming the field and both values; None if they fit.

    Page size, page layout and tensor parallelism may differ: the slot layout is the same for all. The
    number of slots may differ too, their size not, because a segment packed into one fills another.
    """
    pairs: tuple[tuple[str, object, object], ...] = (
        ("version", ours.version, theirs.version),
        ("model_digest", ours.geometry.model_digest, theirs.geometry.model_digest),
        ("layers", ours.geometry.layers, theirs.geometry.layers),
        ("kv_heads", ours.geometry.kv_heads, theirs.geometry.kv_heads),
        ("head_dim", ours.geometry.head_dim, theirs.geometry.head_dim),
        ("dtype", ours.geometry.dtype, theirs.geometry.dtype),
        ("mover", ours.mover, theirs.mover),
        ("slot_bytes", ours.slot_bytes, theirs.slot_bytes),
    )
    for name, our_value, their_value in pairs:
        if our_value != their_value:
            return f"{name} differs: {our_value!r} here, {their_value!r} there"
    if ours.epoch == theirs.epoch:
        return "a transfer process cannot be its own peer"
    return None
