"""What goes wrong, sampled from the seed: each kind with a rate of its own, some seeds with none at all."""

from collections import Counter
from collections.abc import Sequence

from kvtransfer.movers.base import Progress
from tests.sim.kernel import Process, World
from tests.sim.network import Connection
from tests.sim.processes import RouterHost, TransferHost, WorkerHost
from tests.sim.seams import Seams

KEPT_FRAMES = 64
KINDS_OF_INJECTION = ("cut or changed", "repeated", "replayed", "reordered", "lost")
"""A worker and its transfer process are two ends of one UNIX socket: what is lost there is lost with it."""
KIND_NAMES: dict[type[Process], str] = {RouterHost: "router", WorkerHost: "worker", TransferHost: "transfer"}
KINDS = ("crash", "crash_sending", "hang", "terminate", "partition", "disconnect", "slow", "engine")
WEIGHTS = (3, 3, 3, 1, 2, 3, 1, 1)


class Faults:
    """`happened` counts them by kind."""

    def __init__(
        self, world: World, seams: Seams, any_at_all: bool, lossy: bool, hostile: str | None = None
    ) -> None:
        self.world, self.seams, self.any = world, seams, any_at_all
        self._hostile = hostile
        self.rng = rng = world.rng
        self.happened: Counter[str] = Counter()
        self._processes: Sequence[Process] = ()
        self._on = False
        self._write_failure = rng.choice((0.0, 0.0, 0.05))
        self._write_stall = rng.choice((0.0, 0.0, 0.02))
        self._write_late = rng.choice((0.0, 0.1, 0.4))
        self._corruption = rng.choice((0.0, 0.0, 0.05))
        self._repetition = rng.choice((0.0, 0.0, 0.05))
        self._replay = rng.choice((0.0, 0.0, 0.05))
        self._loss = 0.02 if lossy else 0.0
        self._old: list[tuple[str, bytes]] = []
        seams.fabric.fate = self._fate

    def plan(self, processes: Sequence[Process], within_s: float) -> None:
        self._processes = processes
        if not self.any:
            return
        self._on = True
        if self._hostile is not None:
            self.seams.network.damage = self._inject
            return
        self.seams.network.damage = self._damage
        self.seams.fabric.corrupt = self._corrupt
        for _ in range(self.rng.choice((0, 1, 1, 2, 4))):
            kind = self.rng.choices(KINDS, WEIGHTS)[0]
            self.world.after(self.rng.uniform(0.0, within_s), lambda kind=kind: self._happen(kind))

    def stop(self) -> None:
        """No more of them, and all that they did is undone."""
        self._on = False
        self.seams.network.heal()
        for process in self._processes:
            process.crash_in = -1
            process.hung_until_s = 0.0
            if isinstance(process, WorkerHost):
                process.engine.fail_steps = 0
            process.start()
            process.wake()

    # ------------------------------------------------------------ processes and connections

    def _happen(self, kind: str) -> None:
        if not self._on:
            return
        rng, victim = self.rng, self.rng.choice(self._processes)
        self.happened[kind] += 1
        back_s = rng.choice((0.01, 0.3, 2.0))
        if kind == "crash":
            victim.crash()
        elif kind == "crash_sending":
            victim.crash_in = rng.randint(0, 6)
        elif kind == "terminate" and isinstance(victim, WorkerHost | TransferHost):
            victim.terminate()
        elif kind == "hang":
            victim.hang(rng.choice((0.1, 1.0, 3.0, 7.0)))
        elif kind == "partition":
            one, other = rng.sample(self._processes, 2)
            self.world.note(one.name, "is parted from", other.name)
            self.seams.network.part(one.name, other.name, rng.choice((0.1, 1.0, 6.0)))
        elif kind in ("disconnect", "slow") and self.seams.network.connections:
            connection = rng.choice(list(self.seams.network.connections.values()))
            self.world.note(connection.link.owner.name, kind, connection.server.owner.name)
            if kind == "slow":
                connection.slow_until_s = self.world.now_s + 2.0
            else:
                self.seams.network.disconnect(connection, delivered=True)
        elif kind == "engine" and isinstance(victim, WorkerHost):
            victim.engine.fail_steps, victim.engine.fail_on_launch = 1, rng.random() < 0.5
        self._watch(back_s)

    def _watch(self, back_s: float) -> None:
        """Who is dead comes back after a while, as a launcher sees to it."""

        def back() -> None:
            for process in self._processes:
                process.start()

        self.world.after(back_s, back)
        self.world.after(back_s + 1.0, back)

    # ------------------------------------------------------------ frames

    def _damage(self, frame: bytes, connection: Connection, upward: bool) -> list[bytes]:
        """Between transfer processes frames may also be lost, repeated and said again much later."""
        ends = (connection.link.owner, connection.server.owner)
        if not self._on or not all(isinstance(end, TransferHost) for end in ends):
            return [frame]
        rng = self.rng
        # Of the same sender, in whatever life: who could say another's words could say anything.
        way = f"{connection.link.owner.name} {connection.server.endpoint} {upward}"
        arrived = [frame]
        if rng.random() < self._loss:
            self.happened["lost or damaged frame"] += 1
            arrived = [] if rng.random() < 0.5 else [damaged(frame, rng.randrange(1 << 30))]
        elif rng.random() < self._repetition:
            self.happened["repeated frame"] += 1
            arrived = [frame, frame]
        if rng.random() < self._replay:
            candidates = [old for known, old in self._old if known == way]
            if candidates:
                self.happened["replayed frame"] += 1
                arrived = [*arrived, rng.choice(candidates)]
        if self._replay:
            self._old = [*self._old[-KEPT_FRAMES:], (way, frame)]
        return arrived

    def _inject(self, frame: bytes, connection: Connection, upward: bool) -> list[bytes]:
        """At one boundary, in one direction, frames arrive that nobody has said like this."""
        ends = (connection.link.owner, connection.server.owner)
        names = [KIND_NAMES[type(end)] for end in (ends if upward else reversed(ends))]
        rng = self.rng
        if not self._on or " to ".join(names) != self._hostile:
            return [frame]
        way = f"{connection.identity.hex()} {upward}"
        self._old = [*self._old[-KEPT_FRAMES:], (way, frame)]
        if rng.random() < 0.75:
            return [frame]
        kind = rng.choice(KINDS_OF_INJECTION if "router" in names or len(set(names)) == 1 else ("repeated",))
        self.happened[kind] += 1
        old = rng.choice([one for known, one in self._old if known == way])
        return {
            "cut or changed": [damaged(frame, rng.randrange(1 << 30))],
            "repeated": [frame, frame],
            "replayed": [frame, old],
            "reordered": [frame, old] if old == frame else [old, frame],
            "lost": [],
        }[kind]

    # ------------------------------------------------------------ data

    def _fate(self) -> tuple[float | None, Progress]:
        rng = self.rng
        if not self._on:
            return rng.uniform(0.0001, 0.002), Progress.DONE
        draw = rng.random()
        if draw < self._write_stall:
            self.happened["write that hangs"] += 1
            return None, Progress.PENDING
        if draw < self._write_stall + self._write_failure:
            self.happened["write that fails"] += 1
            return rng.uniform(0.0, 0.01), Progress.FAILED
        if rng.random() < self._write_late:
            self.happened["write that is late"] += 1
            return rng.choice((0.05, 0.5, 2.5)) * rng.uniform(0.5, 1.5), Progress.DONE
        return rng.uniform(0.0001, 0.002), Progress.DONE

    def _corrupt(self) -> bool:
        checked = any(one.config.checksum for one in self._processes if isinstance(one, TransferHost))
        if not self._on or not checked or self.rng.random() >= self._corruption:
            return False
        self.happened["data damaged"] += 1
        return True


def damaged(frame: bytes, number: int) -> bytes:
    """A frame cut short, or with bits of one byte turned over."""
    if number % 2:
        return frame[: number % len(frame)]
    at = number // 2 % len(frame)
    return frame[:at] + bytes((frame[at] ^ (1 + number // 7 % 255),)) + frame[at + 1 :]
