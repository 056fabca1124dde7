"""A whole cluster of transfer processes in one thread: real state machines, writes and loopback mover;
simulated workers, connections and clock. Every step checks what must hold at all times."""

import random
from collections import deque
from dataclasses import dataclass, field

from kvtransfer.buffer.region import Region
from kvtransfer.messages import (
    Abort,
    Aborted,
    Arrived,
    Commit,
    Event,
    Filled,
    Freed,
    KvGeometry,
    OpenReceive,
    OpenSend,
    Segment,
    SendCommitted,
    SendConfirmed,
    SendGranted,
    SendReady,
    SendSlots,
    SlotUse,
    TransferAddress,
)
from kvtransfer.movers.base import PieceOfWrite, Progress
from kvtransfer.movers.loopback import LoopbackFabric, LoopbackMover
from kvtransfer.peers.writes import Writes
from kvtransfer.protocol.limits import TransferLimits
from kvtransfer.protocol.machine import TransferCommand, TransferMachine
from kvtransfer.protocol.peer_messages import PeerMessage
from kvtransfer.protocol.slots import Direction, SlotState

GEOMETRY = KvGeometry("model", 1, 1, 2, "float16")
TOKEN_BYTES = GEOMETRY.token_bytes
TOKENS_PER_SLOT = 4
SLOT_BYTES = TOKENS_PER_SLOT * TOKEN_BYTES


def limits(slots: int) -> TransferLimits:
    return TransferLimits.of(GEOMETRY, slots, SLOT_BYTES, share=0.5, transfer_timeout_s=60.0)


def token_content(transfer_id: int, token: int) -> bytes:
    return random.Random(transfer_id * 1_000_003 + token).randbytes(TOKEN_BYTES)


@dataclass
class Outgoing:
    next_token: int = 0
    end_token: int = 0
    grants: int = 0

    @property
    def wanted_slots(self) -> int:
        return min(self.grants, -(-(self.end_token - self.next_token) // TOKENS_PER_SLOT))


@dataclass
class Incoming:
    missing: set[int]


class Node:
    """One transfer process with its worker."""

    def __init__(self, index: int, slots: int, fabric: LoopbackFabric) -> None:
        self.address = TransferAddress(f"ipc:///nowhere/{index}", 1000 + index)
        self.machine = TransferMachine(limits(slots))
        self.buffer = memoryview(bytearray(slots * SLOT_BYTES))
        self.agent = f"agent{index}"
        self.mover = LoopbackMover(fabric, self.agent, self.buffer)
        self.mover.register(Region(0, len(self.buffer)))
        self.writes = Writes(self.mover, self.machine.sender, SLOT_BYTES, 1e9, lambda *_: None)
        self.commands: deque[TransferCommand] = deque()
        self.events: deque[Event] = deque()
        self.outgoing: dict[int, Outgoing] = {}
        self.incoming: dict[int, Incoming] = {}
        self.assigned: deque[SlotUse] = deque()
        self.unread: deque[tuple[int, Segment]] = deque()
        self.committed: set[int] = set()
        self.received: set[int] = set()
        self.aborted: dict[int, str] = {}

    def slot(self, index: int) -> memoryview:
        return self.buffer[index * SLOT_BYTES : (index + 1) * SLOT_BYTES]

    def hear(self) -> None:
        """The worker takes one event."""
        event = self.events.popleft()
        if isinstance(event, SendConfirmed) and event.transfer_id in self.outgoing:
            self.outgoing[event.transfer_id].next_token = event.start_token
            self.outgoing[event.transfer_id].end_token = event.end_token
            self.commands.append(SendReady(event.transfer_id))
        elif isinstance(event, SendGranted):
            if event.transfer_id in self.outgoing:
                self.outgoing[event.transfer_id].grants += event.segments
        elif isinstance(event, SendSlots):
            self.assigned.extend(event.slots)
            self.return_unused()
        elif isinstance(event, Arrived):
            self.unread.extend((event.transfer_id, segment) for segment in event.segments)
        elif isinstance(event, SendCommitted):
            self.committed.add(event.transfer_id)
            self.drop_send(event.transfer_id)
        elif isinstance(event, Aborted):
            self.aborted[event.transfer_id] = event.reason
            self.drop_send(event.transfer_id)
            self.incoming.pop(event.transfer_id, None)

    def drop_send(self, transfer_id: int) -> None:
        self.outgoing.pop(transfer_id, None)
        self.return_unused()

    def return_unused(self) -> None:
        unused = len(self.assigned) - sum(one.wanted_slots for one in self.outgoing.values())
        if unused > 0:
            self.commands.append(Freed([self.assigned.pop() for _ in range(unused)]))

    def give_up(self, transfer_id: int) -> None:
        self.commands.append(Abort(transfer_id, "worker"))
        self.drop_send(transfer_id)
        self.incoming.pop(transfer_id, None)

    def pack(self, transfer_id: int, tokens: int) -> None:
        """The worker packs at most `tokens` tokens into one assigned slot."""
        outgoing = self.outgoing[transfer_id]
        count = min(tokens, outgoing.end_token - outgoing.next_token, TOKENS_PER_SLOT)
        if count < 1 or not self.assigned or not outgoing.grants:
            return
        use = self.assigned.popleft()
        outgoing.grants -= 1
        holder = self.machine.pool.holder(use.slot)
        assert holder is not None and holder.generation == use.generation, "packing into a foreign slot"
        assert holder.direction is Direction.SEND
        start = outgoing.next_token
        content = b"".join(token_content(transfer_id, start + i) for i in range(count))
        self.slot(use.slot)[: len(content)] = content
        outgoing.next_token += count
        segment = Segment(use.slot, use.generation, start, count, len(content))
        self.commands.append(Filled(transfer_id, [segment]))

    def unpack(self) -> None:
        """The worker reads one arrived segment; its content must be right, whatever has happened."""
        transfer_id, segment = self.unread.popleft()
        incoming = self.incoming.get(transfer_id)
        tokens = range(segment.start_token, segment.start_token + segment.token_count)
        expected = b"".join(token_content(transfer_id, token) for token in tokens)
        assert bytes(self.slot(segment.slot)[: segment.byte_count]) == expected
        self.commands.append(Freed([SlotUse(segment.slot, segment.generation)]))
        if incoming is None:
            return
        assert incoming.missing.issuperset(tokens), "a token arrived twice"
        incoming.missing.difference_update(tokens)
        if not incoming.missing:
            self.commit(transfer_id)

    def commit(self, transfer_id: int) -> None:
        del self.incoming[transfer_id]
        self.received.add(transfer_id)
        self.commands.append(Commit(transfer_id))


@dataclass
class Wire:
    """The connection of a receiver to a source."""

    connected: bool = False
    up: deque[PeerMessage] = field(default_factory=deque)
    """Receiver to source."""
    down: deque[PeerMessage] = field(default_factory=deque)


class Cluster:
    def __init__(self, nodes: int, slots: int, rng: random.Random) -> None:
        self.rng, self.now_s = rng, 0.0
        self.fabric = LoopbackFabric(fate=self._fate)
        self.nodes = [Node(index, slots, self.fabric) for index in range(nodes)]
        for node in self.nodes:
            for other in self.nodes:
                if other is not node:
                    region = Region(0, len(other.buffer))
                    node.mover.add_peer(other.agent, other.agent.encode(), region)
        self.wires: dict[tuple[int, int], Wire] = {}
        self.loss = self.duplication = self.write_failure = self.stall = 0.0
        self._next_id = 1

    def begin(self, source: int, target: int, start: int, end: int, deadline_s: float = 50.0) -> int:
        """Opens one transfer on both sides, in random order."""
        transfer_id = self._next_id
        self._next_id += 1
        sender, receiver = self.nodes[source], self.nodes[target]
        receiver.incoming[transfer_id] = Incoming(set(range(start, end)))
        receiver.commands.append(OpenReceive(transfer_id, sender.address, start, end, deadline_s))
        if start == end:
            receiver.commit(transfer_id)
        sender.outgoing[transfer_id] = Outgoing()
        sender.commands.append(OpenSend(transfer_id, deadline_s))
        return transfer_id

    def step(self) -> None:
        """One random thing happens somewhere."""
        node = self.rng.choice(self.nodes)
        action = self.rng.randrange(6)
        if action == 0 and node.commands:
            node.machine.on_command(node.commands.popleft(), self.now_s)
        elif action == 1 and node.events:
            node.hear()
        elif action == 2 and node.outgoing:
            node.pack(self.rng.choice(list(node.outgoing)), self.rng.randint(1, TOKENS_PER_SLOT))
        elif action == 3 and node.unread:
            node.unpack()
        elif action == 4 and self.wires:
            self._deliver(*self.rng.choice(list(self.wires)))
        elif action == 5:
            node.writes.poll(self.now_s)
        self._settle()

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        for node in self.nodes:
            node.machine.tick(self.now_s)
        self._settle()

    def cut(self, receiver: int, source: int) -> None:
        """The connection breaks; both sides notice, and whatever was under way is lost."""
        wire = self.wires[receiver, source]
        wire.connected = False
        wire.up.clear()
        wire.down.clear()
        sender, target = self.nodes[source], self.nodes[receiver]
        target.machine.receiver.source_lost(sender.address, "cut", self.now_s)
        sender.machine.sender.destination_lost(target.address.epoch, "cut", self.now_s)
        self._settle()

    def busy(self) -> bool:
        moving = any(wire.up or wire.down or not wire.connected for wire in self.wires.values())
        return moving or any(
            node.commands or node.events or node.unread or len(node.writes) for node in self.nodes
        )

    def at_rest(self) -> bool:
        return all(
            node.machine.pool.free == len(node.machine.pool)
            and node.machine.next_deadline_s() is None
            and not node.outgoing
            and not node.incoming
            for node in self.nodes
        )

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def finish(self) -> None:
        """No more faults: everything must come to rest, at the latest when all deadlines have passed."""
        self.loss = self.duplication = self.write_failure = self.stall = 0.0
        for _ in range(300):
            self.run(200)
            if self.at_rest() and not self.busy():
                return
            self.advance(1.0)
        states = [(node.machine.pool.counts(), node.machine.outbox.drops) for node in self.nodes]
        raise AssertionError(f"never at rest: {states}")

    # ------------------------------------------------------------ inner workings

    def _fate(self, peer: str, pieces: list[PieceOfWrite]) -> Progress:
        target = next(node for node in self.nodes if node.agent == peer)
        for piece in pieces:
            slot = piece.remote_offset // SLOT_BYTES
            holder = target.machine.pool.holder(slot)
            assert holder is not None and holder.direction is Direction.RECEIVE, "write into a free slot"
            assert holder.state in (SlotState.GRANTED, SlotState.QUARANTINED), "write into a used slot"
        draw = self.rng.random()
        if draw < self.write_failure:
            return Progress.FAILED
        return Progress.PENDING if draw < self.write_failure + self.stall else Progress.DONE

    def _deliver(self, receiver: int, source: int) -> None:
        wire = self.wires[receiver, source]
        sender, target = self.nodes[source], self.nodes[receiver]
        if not wire.connected:
            wire.connected = True
            target.machine.receiver.source_ready(sender.address, self.now_s)
            return
        queue = self.rng.choice((wire.up, wire.down))
        if not queue:
            return
        message = queue.popleft()
        if self.rng.random() < self.loss:
            return
        for _ in range(2 if self.rng.random() < self.duplication else 1):
            if queue is wire.up:
                slots = len(target.machine.pool)
                epoch = target.address.epoch
                sender.machine.on_destination(epoch, message, slots, self.now_s)
            else:
                target.machine.on_source(sender.address, message, self.now_s)

    def _settle(self) -> None:
        by_epoch = {node.address.epoch: index for index, node in enumerate(self.nodes)}
        for index, node in enumerate(self.nodes):
            node.machine.settle(self.now_s)
            out = node.machine.outbox
            for address in out.connects:
                self.wires.setdefault((index, by_epoch[address.epoch]), Wire())
            for write in out.writes:
                agent = self.nodes[by_epoch[write.destination]].agent
                node.writes.post(write, agent, self.now_s)
            for address, message in out.to_sources:
                wire = self.wires[index, by_epoch[address.epoch]]
                if wire.connected:
                    wire.up.append(message)
            for destination, message in out.to_destinations:
                wire = self.wires[by_epoch[destination], index]
                if wire.connected:
                    wire.down.append(message)
            node.events.extend(out.to_worker)
            out.connects, out.writes, out.to_worker = [], [], []
            out.to_sources, out.to_destinations = [], []
            counts = node.machine.pool.counts()
            total = counts.free + counts.granted + counts.filled + counts.quarantined
            assert total == len(node.machine.pool)
