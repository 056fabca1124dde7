"""NCCL's documented rules, without a GPU: a pair works when both ranks have joined, operations meet in order,
nothing moves before both sides have posted, and an abort ends one side's operations where they are."""

import ctypes
import threading
from dataclasses import dataclass, field

from kvtransfer.movers.nccl_library import UNIQUE_ID_BYTES, NcclError
from kvtransfer.movers.nccl_pair import RECEIVER, SENDER


@dataclass(eq=False)
class Operation:
    pieces: list[tuple[int, int]]
    over: bool = False
    landing: list[tuple[int, bytes]] = field(default_factory=list)
    """What has left the sender, and is not in the receiver's memory yet."""
    delay: int = 2


@dataclass(eq=False)
class Room:
    """What two ranks of one unique id share."""

    posted: dict[int, list[Operation]] = field(default_factory=dict)
    met: int = 0
    aborted: set[int] = field(default_factory=set)


@dataclass(eq=False)
class Event:
    behind: list[Operation] = field(default_factory=list)


class Wire:
    """The GPUs' work. `running` False keeps what both sides have posted from moving."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.rooms: dict[bytes, Room] = {}
        self.comms: dict[int, tuple[Room, int]] = {}
        self.running = True
        self.failing: set[int] = set()
        """Ranks whose communicators report an error."""
        self.refuse_joins = False

    def run(self) -> None:
        with self.lock:
            for room in self.rooms.values():
                self._run(room)

    def land(self, operation: Operation) -> None:
        """Asking after a receive lets it go on; it takes some questions."""
        with self.lock:
            if not operation.landing:
                return
            operation.delay -= 1
            if operation.delay <= 0:
                for target, data in operation.landing:
                    ctypes.memmove(target, data, len(data))
                operation.landing.clear()
                operation.over = True

    def _run(self, room: Room) -> None:
        sends, receives = room.posted.get(SENDER, []), room.posted.get(RECEIVER, [])
        while self.running and not room.aborted and room.met < min(len(sends), len(receives)):
            send, receive = sends[room.met], receives[room.met]
            sizes = [[size for _, size in operation.pieces] for operation in (send, receive)]
            assert sizes[0] == sizes[1], f"sends and receives do not match: {sizes}"
            for (source, size), (target, _) in zip(send.pieces, receive.pieces, strict=True):
                receive.landing.append((target, ctypes.string_at(source, size)))
            send.over = True
            room.met += 1


class FakeNccl:
    """One process' library."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.streams: dict[int, list[Operation]] = {}

    def unique_id(self) -> bytes:
        with self.wire.lock:
            unique_id = len(self.wire.rooms).to_bytes(UNIQUE_ID_BYTES, "big")
            self.wire.rooms[unique_id] = Room()
            return unique_id

    def join(self, unique_id: bytes, rank: int) -> int:
        with self.wire.lock:
            if self.wire.refuse_joins or unique_id not in self.wire.rooms:
                raise NcclError("ncclCommInitRankConfig: invalid argument")
            room = self.wire.rooms[unique_id]
            assert rank not in room.posted, "one process a rank"
            room.posted[rank] = []
            comm = len(self.wire.comms) + 1
            self.wire.comms[comm] = (room, rank)
            return comm

    def finished(self, comm: int) -> bool:
        with self.wire.lock:
            room, rank = self.wire.comms[comm]
            assert rank not in room.aborted, "used after its abort"
            if rank in self.wire.failing:
                raise NcclError("communicator: remote process exited or there was a network error")
            return len(room.posted) == 2

    def exchange(
        self, comm: int, rank: int, pieces: list[tuple[int, int]], stream: int, *, sends: bool
    ) -> bool:
        with self.wire.lock:
            assert self.finished(comm), "an operation before the last one was finished"
            room, joined_as = self.wire.comms[comm]
            assert rank == joined_as and sends == (rank == SENDER)
            operation = Operation(pieces)
            room.posted[rank].append(operation)
            self.streams.setdefault(stream, []).append(operation)
            self.wire._run(room)
            return len(room.posted[rank]) % 2 == 0  # Sometimes at once, sometimes not.

    def abort(self, comm: int) -> None:
        with self.wire.lock:
            room, rank = self.wire.comms[comm]
            room.aborted.add(rank)
            for operation in room.posted[rank]:
                operation.landing.clear()
                operation.over = True


class FakeStreams:
    """A device's streams and events, over the operations of one library."""

    def __init__(self, library: FakeNccl, uuid: str) -> None:
        self.uuid, self._library = uuid, library
        self._next = 1
        self.open_streams, self.open_events = 0, 0

    def new_stream(self) -> int:
        self._next += 1
        self.open_streams += 1
        return self._next

    def drop_stream(self, stream: int) -> None:
        self.open_streams -= 1

    def new_event(self) -> Event:
        self.open_events += 1
        return Event()

    def drop_event(self, event: Event) -> None:
        self.open_events -= 1

    def record(self, event: Event, stream: int) -> None:
        event.behind = list(self._library.streams.get(stream, []))

    def reached(self, event: Event) -> bool:
        for operation in event.behind:
            self._library.wire.land(operation)
        return all(operation.over for operation in event.behind)
