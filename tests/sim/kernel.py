"""The virtual machine room: one clock, one queue of events, processes that take turns on it.

Everything random comes from the world's generator, so a seed is a run. A process runs in *turns*, as the
real loops do: it is woken by a frame, a timer or a deadline, does what is there, and says when to come back.
A hung process takes no turn for a while; a crashed one loses everything and comes back as a new *life*.
"""

import heapq
from collections.abc import Callable
from random import Random

START_S = 1000.0
MOST_EVENTS = 100_000
"""Of one seed; a few thousand are usual."""
LogEntry = tuple[float, str, str, object]


class Violation(AssertionError):
    """Something that must hold at all times does not."""


class Crash(BaseException):
    """Ends the running process where it stands: in the middle of a turn, between two frames."""


class Gone(BaseException):
    """What was running is not any more: its process died while it slept."""


class World:
    """`events` counts what has happened; `log` tells it, oldest first."""

    def __init__(self, seed: int) -> None:
        self.seed, self.rng = seed, Random(seed)
        self.now_s = START_S
        self.events = 0
        self.log: list[LogEntry] = []
        self.processes: dict[str, Process] = {}
        self.running: Process | None = None
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0

    def note(self, who: str, what: str, detail: object = "") -> None:
        self.log.append((self.now_s, who, what, detail))

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._queue, (max(time_s, self.now_s), self._order, action))

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        self.at(self.now_s + delay_s, action)

    def run_until(self, end_s: float, done: Callable[[], bool] | None = None) -> bool:
        """All events up to `end_s`, in order; stops early once `done`. Whether it was done."""
        while self._queue and self._queue[0][0] <= end_s:
            self.now_s, _, action = heapq.heappop(self._queue)
            self.events += 1
            if self.events > MOST_EVENTS:
                raise Violation(f"{self.events} events, and no end")
            action()
            if done is not None and done():
                return True
        self.now_s = max(self.now_s, end_s)
        return done is not None and done()

    def sleep(self, seconds: float) -> None:
        """The running process waits; the others go on. Raises `Gone` if it does not wake up."""
        running, self.running = self.running, None
        assert running is not None, "only a process sleeps"
        incarnation, running.asleep = running.incarnation, True
        self.run_until(self.now_s + seconds)
        while running.incarnation == incarnation and running.alive and running.hung_until_s > self.now_s:
            self.run_until(running.hung_until_s)
        if running.incarnation != incarnation or not running.alive:
            raise Gone
        self.running, running.asleep = running, False

    def clock_s(self) -> float:
        """What the running process reads from its clock: each has its own origin."""
        return self.now_s + (self.running.offset_s if self.running is not None else 0.0)


class Process:
    """One process in its lives. Subclasses say what starting, a turn, dying and being at rest are."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.offset_s = world.rng.uniform(0.0, 1e5)
        self.incarnation = 0
        self.alive = False
        self.hung_until_s = 0.0
        self.crash_in = -1
        """How many more frames it sends before it dies; negative: as many as it likes."""
        self.asleep = False
        """In the middle of an action: no turn is taken meanwhile."""
        self._next_turn_s: float | None = None
        world.processes[name] = self

    # ------------------------------------------------------------ for subclasses

    def begin(self) -> None:
        """A new life starts."""

    def work(self) -> float | None:
        """One turn. Returns when the next is due at the latest, on the world's clock."""
        return None

    def die(self) -> None:
        """The life is over, without a farewell."""

    def check(self) -> None:
        """Raises Violation if what must hold after every turn does not."""

    def rest(self) -> str | None:
        """What is still held or open here; None at rest."""
        return None

    # ------------------------------------------------------------ life

    def start(self) -> None:
        if self.alive:
            return
        self.incarnation += 1
        self.alive, self.hung_until_s, self.crash_in, self._next_turn_s = True, 0.0, -1, None
        self.asleep = False
        self.world.note(self.name, "starts", self.incarnation)
        self._run(self.begin)
        self.wake()

    def crash(self, why: str = "crash") -> None:
        if not self.alive:
            return
        self.world.note(self.name, why, self.incarnation)
        self.alive = False
        self.die()

    def hang(self, seconds: float) -> None:
        if self.alive:
            self.world.note(self.name, "hangs", round(seconds, 3))
            self.hung_until_s = max(self.hung_until_s, self.world.now_s + seconds)

    def about_to_send(self) -> None:
        """Called for each frame."""
        if self.crash_in == 0:
            raise Crash
        self.crash_in -= 1

    def wake(self, time_s: float | None = None) -> None:
        """A turn is due, now or at `time_s`."""
        if not self.alive:
            return
        time_s = self.world.now_s if time_s is None else max(time_s, self.world.now_s)
        time_s = max(time_s, self.hung_until_s)
        if self._next_turn_s is None or time_s < self._next_turn_s:
            self._next_turn_s = time_s
            incarnation = self.incarnation
            self.world.at(time_s, lambda: self._due(incarnation, time_s))

    def _due(self, incarnation: int, time_s: float) -> None:
        if incarnation != self.incarnation or self._next_turn_s != time_s or not self.alive:
            return
        self._next_turn_s = None
        if self.asleep:
            return  # it takes one when it has slept
        if self.world.now_s < self.hung_until_s:
            self.wake(self.hung_until_s)
            return
        next_s = self._run(self.work)
        if self.alive and incarnation == self.incarnation:
            self.check()
            if next_s is not None:
                self.wake(next_s)

    def _run(self, action: Callable[[], float | None]) -> float | None:
        before, self.world.running = self.world.running, self
        try:
            return action()
        except Crash:
            self.crash("crashes while it sends")
            return None
        except Gone:
            return None
        finally:
            self.world.running = before
