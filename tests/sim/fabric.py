"""The wire that data takes: the shipped loopback mover, whose writes land when the world says so.

A landing is where a staging buffer is really touched, so here is checked that nobody writes into a slot that
was not granted for it, in that very generation.
"""

from collections.abc import Callable
from dataclasses import dataclass

from kvtransfer.movers.base import Handle, PieceOfWrite, Progress
from kvtransfer.movers.loopback import LoopbackFabric, LoopbackMover
from kvtransfer.protocol.machine import TransferMachine
from kvtransfer.protocol.slots import Direction, SlotState
from tests.sim.kernel import Process, Violation, World

DEAD_DATA_S = 0.15
"""For how long what a dead process had posted may still land; below the quarantine's own allowance."""


@dataclass(eq=False)
class _Landing:
    mover: "SimMover"
    peer: str
    pieces: list[PieceOfWrite]
    generations: list[int]


class Fabric:
    """`fate()` draws how long a write takes and how it ends; None: never by itself."""

    def __init__(self, world: World, parted_until_s: Callable[[Process, Process], float]) -> None:
        self.world, self._parted_until_s = world, parted_until_s
        self.loopback = LoopbackFabric(automatic=False)
        self.fate: Callable[[], tuple[float | None, Progress]] = lambda: (0.0005, Progress.DONE)
        self.corrupt: Callable[[], bool] = lambda: False
        self.movers: dict[str, SimMover] = {}
        self._landings: dict[Handle, _Landing] = {}

    def post(self, handle: Handle, landing: _Landing) -> None:
        delay_s, progress = self.fate()
        self._landings[handle] = landing
        if delay_s is not None:
            self.world.after(delay_s, lambda: self._land(handle, progress))

    def stop(self, mover: "SimMover", peer: str | None = None, within_s: float | None = None) -> None:
        """The connection is cut, or the process dead: its data stops, at once or in a moment."""
        concerned = [
            handle
            for handle, landing in self._landings.items()
            if landing.mover is mover and peer in (None, landing.peer)
        ]
        for handle in concerned:
            if within_s is None or self.world.rng.random() < 0.5:
                del self._landings[handle]
            else:
                at_s = self.world.rng.uniform(0.0, within_s)
                self.world.after(at_s, lambda handle=handle: self._land(handle, Progress.DONE))
        if within_s is not None:
            self.world.after(within_s, lambda: self._forget(mover))

    def _forget(self, mover: "SimMover") -> None:
        self.stop(mover)
        self.loopback.buffers.pop(mover.agent_name, None)

    def _land(self, handle: Handle, progress: Progress) -> None:
        landing = self._landings.get(handle)
        if landing is None:
            return
        mover, target = landing.mover, self.movers.get(landing.peer)
        if target is not None:
            until_s = self._parted_until_s(mover.owner, target.owner)
            if until_s > self.world.now_s:
                self.world.at(until_s, lambda: self._land(handle, progress))
                return
        del self._landings[handle]
        self.loopback.fate = lambda peer, pieces: progress
        if target is None or landing.peer not in self.loopback.buffers:
            self.loopback.posted[handle].progress = Progress.FAILED
        else:
            self._check(landing, target)
            self.loopback.step(handle)
            if progress is Progress.DONE and self.corrupt():
                self.world.note(mover.owner.name, "data damaged on the way")
                self.loopback.buffers[landing.peer][landing.pieces[0].remote_offset + 3] ^= 0x40
        self.world.note(mover.owner.name, "write", (landing.peer, progress.value))
        mover.owner.wake()

    def _check(self, landing: _Landing, target: "SimMover") -> None:
        pool = target.machine.pool
        for piece, generation in zip(landing.pieces, landing.generations, strict=True):
            slot = piece.remote_offset // target.slot_bytes
            holder = pool.holder(slot)
            where = f"slot {slot} of {landing.peer}, generation {generation}"
            if holder is None or holder.direction is not Direction.RECEIVE:
                raise Violation(f"a write lands in {where}: nobody expects one")
            if holder.generation != generation:
                raise Violation(f"a write lands in {where}: it is in generation {holder.generation} now")
            if holder.state is SlotState.FILLED:
                raise Violation(f"a write lands in {where}: it is being read")


class SimMover(LoopbackMover):
    """Its process gives it the buffer (`buffer`) and the transfer machine (`machine`) once they are there."""

    machine: TransferMachine

    def __init__(self, fabric: Fabric, agent_name: str, size_bytes: int, slot_bytes: int) -> None:
        super().__init__(fabric.loopback, agent_name, memoryview(bytearray(size_bytes)))
        self._sim, self.slot_bytes = fabric, slot_bytes
        owner = fabric.world.running
        if owner is None:
            raise Violation("a mover is made outside of a process")
        self.owner: Process = owner
        fabric.movers[agent_name] = self

    def serve(self, machine: TransferMachine, buffer: memoryview) -> None:
        self.machine = machine
        self._fabric.buffers[self.agent_name] = self._buffer = buffer

    def post(self, peer: str, pieces: list[PieceOfWrite]) -> Handle:
        handle = super().post(peer, pieces)
        granted = {
            mine.slot: theirs.generation
            for write in self.machine.sender._writes.values()
            for mine, theirs in zip(write.local, write.remote, strict=True)
        }
        generations = [granted[piece.local_offset // self.slot_bytes] for piece in pieces]
        self._sim.post(handle, _Landing(self, peer, pieces, generations))
        return handle

    def remove_peer(self, peer: str) -> None:
        super().remove_peer(peer)
        self._sim.stop(self, peer)

    def close(self) -> None:
        super().close()
        self._sim.stop(self)
        self._sim.movers.pop(self.agent_name, None)

    def die(self) -> None:
        """The process is dead: nobody reaches its buffer, and what it had posted stops in a moment."""
        self._sim.movers.pop(self.agent_name, None)
        self._sim.stop(self, within_s=DEAD_DATA_S)
