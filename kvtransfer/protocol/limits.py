"""The bounds of both state machines, fixed for as long as one worker is attached."""

from dataclasses import dataclass

from kvtransfer.messages import KvGeometry
from kvtransfer.protocol.layout import tokens_per_slot


@dataclass(frozen=True, slots=True)
class TransferLimits:
    """How many slots, tokens and transfers there may be, and how long they may wait.

    `slots_per_transfer` bounds what one transfer may have once its data moves, `idle_slots_per_transfer` what
    it may have before its first data while others want slots as well: a queued request must not keep slots
    that a running one needs (`before_data`).

    `receive_slots` is below the pool's size, so that one slot is always left to send with: two processes that
    receive from each other could otherwise grant all their slots and wait for each other.

    `unready_slots` bounds what all transfers together may have whose prompts wait for pages at the source.
    The others of `receive_slots` are for transfers that surely move: so one of them always does.

    `token_bytes` and `tokens_per_slot` are of all `kv_heads` that the worker's rank, one of `tp`, has; of
    fewer heads there is less in a token, and there are more tokens in a slot.
    """

    slots: int
    token_bytes: int
    tokens_per_slot: int
    slots_per_transfer: int
    idle_slots_per_transfer: int
    receive_slots: int
    unready_slots: int
    offer_timeout_s: float
    resend_s: float
    quarantine_s: float
    slot_bytes: int
    kv_heads: int
    tp: int
    max_transfers: int = 16384

    @classmethod
    def of(
        cls,
        geometry: KvGeometry | None,
        slots: int,
        slot_bytes: int,
        share: float,
        transfer_timeout_s: float,
        tp: int = 1,
    ) -> "TransferLimits":
        """`share` is the part of the pool that one transfer may have; without a geometry (no worker yet) a
        slot has one token of any size. Raises TransferConfigError."""
        per_transfer = max(1, int(slots * share))
        return cls(
            slots=slots,
            token_bytes=slot_bytes if geometry is None else geometry.token_bytes // tp,
            tokens_per_slot=1 if geometry is None else tokens_per_slot(geometry, slot_bytes, tp),
            slots_per_transfer=per_transfer,
            idle_slots_per_transfer=min(2, per_transfer),
            receive_slots=max(1, slots - 1),
            unready_slots=max(1, slots - 1) // 2,
            offer_timeout_s=transfer_timeout_s,
            resend_s=1.0,
            quarantine_s=2 * transfer_timeout_s,
            slot_bytes=slot_bytes,
            kv_heads=1 if geometry is None else geometry.kv_heads // tp,
            tp=tp,
        )

    def before_data(self, free_slots: int, own_slots: int, transfers: int) -> int:
        """How many slots one of so many open transfers may have before its first data, if it surely moves:
        its share of half of what is free, `own_slots` included. A prompt that is alone is moved in one go."""
        return min(self.slots_per_transfer, (free_slots + own_slots) // (2 * max(1, transfers)))

    def token_bytes_of(self, kv_heads: int) -> int:
        """Bytes of one token's KV of so many heads."""
        return self.token_bytes // self.kv_heads * kv_heads

    def segment_tokens_of(self, kv_heads: int) -> int:
        """How many tokens of so many heads fit a slot."""
        return self.slot_bytes // self.token_bytes_of(kv_heads)
