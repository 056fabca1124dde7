"""How slots of one size serve many short prompts, and one long one: `python -m deploy.bench.transfer.slots`.

Two transfer machines as they run in the transfer processes, with messages that take `HOP_S`, a link that
moves `LINK_BYTES_PER_S`, and workers that pack and unpack as soon as they hear of a slot. Simulated: no
device and no network take part, so the figures are those of the protocol alone.
"""

import heapq
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count

from rich.console import Console
from rich.table import Table

from kvtransfer.config import DEFAULT_SHARE
from kvtransfer.messages import (
    Arrived,
    Commit,
    Filled,
    Freed,
    KvGeometry,
    OpenReceive,
    OpenSend,
    Segment,
    SendGranted,
    SendReady,
    SendSlots,
    SlotUse,
    TransferAddress,
)
from kvtransfer.protocol.limits import TransferLimits
from kvtransfer.protocol.machine import TransferMachine
from kvtransfer.protocol.peer_messages import PeerMessage

STAGING_BYTES = 256 << 20
SLOT_BYTES = (4 << 20, 8 << 20, 16 << 20, 32 << 20)
HOP_S = 100e-6
"""One message between two processes of a host, with the turn of the loop that takes it."""
POST_S = 10e-6
LINK_BYTES_PER_S = 340e9
MOVE_BYTES_PER_S = 1e12
"""Of a pack or an unpack."""
GEOMETRY = KvGeometry("qwen3-8b", layers=36, kv_heads=8, head_dim=128, dtype="bfloat16")
SOURCE = TransferAddress("ipc:///source", 1)
DESTINATION = 2


@dataclass(frozen=True, slots=True)
class SlotLoad:
    """`prompts` of `tokens` each, all reserved before one step computes them together."""

    name: str
    prompts: int
    tokens: int


LOADS = (
    SlotLoad("64 prompts of 32", 64, 32),
    SlotLoad("16 prompts of 128", 16, 128),
    SlotLoad("1 prompt of 512", 1, 512),
    SlotLoad("1 prompt of 2048", 1, 2048),
    SlotLoad("1 prompt of 8192", 1, 8192),
)


class SlotPair:
    """A source and a destination in simulated time, which is 0 when the step ends."""

    def __init__(self, slots: int, slot_bytes: int, load: SlotLoad) -> None:
        limits = TransferLimits.of(GEOMETRY, slots, slot_bytes, DEFAULT_SHARE, 60.0)
        self.source, self.destination = TransferMachine(limits), TransferMachine(limits)
        self.slots, self.load, self.tokens_per_slot = slots, load, limits.tokens_per_slot
        self.now_s = -1.0
        self.link_free_s = 0.0
        self.done_s: dict[int, float] = {}
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._assigned: deque[SlotUse] = deque()
        self._grants: defaultdict[int, int] = defaultdict(int)
        self._packed: defaultdict[int, int] = defaultdict(int)
        self._missing = dict.fromkeys(range(1, load.prompts + 1), load.tokens)

    def run(self) -> list[float]:
        """When each prompt's last token was unpacked, sorted."""
        for transfer_id in self._missing:
            self._to_source(OpenSend(transfer_id, 60.0))
            self._to_source(SendReady(transfer_id))
            self._to_destination(OpenReceive(transfer_id, SOURCE, 0, self.load.tokens, 60.0))
        self._after(-self.now_s, self._pack_all)
        while self._due and len(self.done_s) < self.load.prompts:
            self.now_s, _, act = heapq.heappop(self._due)
            act()
            self._settle()
        if len(self.done_s) < self.load.prompts:
            raise RuntimeError(f"{self.load.name}: only {len(self.done_s)} prompts arrived")
        return sorted(self.done_s.values())

    # ------------------------------------------------------------ the workers

    def _pack_all(self) -> None:
        for transfer_id in self._missing:
            self._pack(transfer_id)

    def _pack(self, transfer_id: int) -> None:
        slots, granted = self._assigned, self._grants
        while (
            slots
            and granted[transfer_id]
            and self.now_s >= 0
            and self._packed[transfer_id] < self.load.tokens
        ):
            use, start = slots.popleft(), self._packed[transfer_id]
            granted[transfer_id] -= 1
            tokens = min(self.tokens_per_slot, self.load.tokens - start)
            self._packed[transfer_id] += tokens
            byte_count = tokens * GEOMETRY.token_bytes
            segment = Segment(use.slot, use.generation, start, tokens, byte_count)
            filled = Filled(transfer_id, [segment])
            self._after(byte_count / MOVE_BYTES_PER_S + HOP_S, partial(self._to_source, filled))

    def _unpack(self, event: Arrived) -> None:
        tokens = sum(segment.token_count for segment in event.segments)
        slots = [SlotUse(segment.slot, segment.generation) for segment in event.segments]

        def unpacked() -> None:
            self._missing[event.transfer_id] -= tokens
            self._after(HOP_S, lambda: self._to_destination(Freed(slots)))
            if self._missing[event.transfer_id] == 0:
                self.done_s[event.transfer_id] = self.now_s
                self._after(HOP_S, lambda: self._to_destination(Commit(event.transfer_id)))

        self._after(tokens * GEOMETRY.token_bytes / MOVE_BYTES_PER_S, unpacked)

    # ------------------------------------------------------------ the machines

    def _to_source(self, command: OpenSend | SendReady | Filled) -> None:
        self.source.on_command(command, self.now_s)

    def _to_destination(self, command: OpenReceive | Freed | Commit) -> None:
        self.destination.on_command(command, self.now_s)

    def _settle(self) -> None:
        for machine in (self.source, self.destination):
            machine.settle(self.now_s)
        out = self.destination.outbox
        for address in out.connects:
            self.destination.receiver.source_ready(address, self.now_s)
        out.connects.clear()
        to_source, out.to_sources = out.to_sources, []
        for _, message in to_source:
            self._after(
                HOP_S,
                partial(self._notify_source, message),
            )
        arrived, out.to_worker = out.to_worker, []
        for event in arrived:
            if isinstance(event, Arrived):
                self._after(HOP_S, partial(self._unpack, event))
        out = self.source.outbox
        writes, out.writes = out.writes, []
        for write in writes:
            self.link_free_s = max(self.link_free_s, self.now_s) + POST_S
            self.link_free_s += write.byte_count / LINK_BYTES_PER_S
            self._after(
                self.link_free_s - self.now_s,
                partial(self._written, write.write_id),
            )
        reports, out.to_destinations = out.to_destinations, []
        for _, report in reports:
            self._after(HOP_S, partial(self._notify_destination, report))
        events, out.to_worker = out.to_worker, []
        for event in events:
            if isinstance(event, SendSlots | SendGranted):
                self._after(HOP_S, partial(self._assign, event))

    def _notify_source(self, message: PeerMessage) -> None:
        self.source.on_destination(DESTINATION, message, self.slots, self.now_s)

    def _notify_destination(self, message: PeerMessage) -> None:
        self.destination.on_source(SOURCE, message, self.now_s)

    def _written(self, write_id: int) -> None:
        self.source.sender.write_done(write_id, self.now_s)

    def _assign(self, event: SendSlots | SendGranted) -> None:
        if isinstance(event, SendGranted):
            self._grants[event.transfer_id] += event.segments
        else:
            self._assigned.extend(event.slots)
        self._pack_all()

    def _after(self, delay_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.now_s + delay_s, next(self._numbers), act))


def main() -> None:
    title = f"ms from the step's end to the unpacked KV, {STAGING_BYTES >> 20} MiB of staging on each side"
    table = Table(title=title)
    table.add_column("load (tokens)")
    for slot_bytes in SLOT_BYTES:
        table.add_column(f"{STAGING_BYTES // slot_bytes} × {slot_bytes >> 20} MiB", justify="right")
    for load in LOADS:
        cells = []
        for slot_bytes in SLOT_BYTES:
            done_s = SlotPair(STAGING_BYTES // slot_bytes, slot_bytes, load).run()
            shown_s = done_s if len(done_s) == 1 else [done_s[len(done_s) // 2], done_s[-1]]
            cells.append(" / ".join(f"{one_s * 1e3:.2f}" for one_s in shown_s))
        table.add_row(load.name, *cells)
    Console().print(table)
    Console().print("Many prompts: the median's / the last one's.")


if __name__ == "__main__":
    main()
