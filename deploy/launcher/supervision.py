"""When a dead child is started again, and in which order the living ones are stopped. Pure: time and
randomness come in as arguments."""

from dataclasses import dataclass
from enum import Enum

CONFIGURATION_ERROR = 2
"""Exit code of a process that refuses its settings: starting it again cannot help."""
_LEAST_GRACE_S = 2.0


class ChildKind(Enum):
    """What a child is; the order in which kinds start."""

    TRANSFER = "transfer"
    WORKER = "worker"
    ROUTER = "router"


@dataclass(frozen=True, slots=True)
class Restart:
    delay_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    reason: str


@dataclass(slots=True)
class RestartPolicy:
    """Exponential back-off of one child: doubles from `base_s` to `cap_s`, jittered by half, and starts
    anew once a life lasted `healthy_s`. Gives up on a refused configuration in the first life, and on
    `first_attempts` lives in a row before any lasted."""

    base_s: float = 0.5
    cap_s: float = 30.0
    healthy_s: float = 30.0
    first_attempts: int = 5
    failures: int = 0
    lives: int = 0
    lasted: bool = False

    def on_exit(self, code: int, lived_s: float, jitter: float) -> Restart | GiveUp:
        """What to do about an exit nobody asked for. `jitter` is uniform in [0, 1)."""
        self.lives += 1
        if lived_s >= self.healthy_s:
            self.failures, self.lasted = 0, True
        if self.lives == 1 and code == CONFIGURATION_ERROR:
            return GiveUp("refused its configuration")
        self.failures += 1
        if not self.lasted and self.failures >= self.first_attempts:
            return GiveUp(f"ended {self.failures} times in a row without ever lasting {self.healthy_s:g} s")
        full_s = min(self.cap_s, self.base_s * 2.0 ** min(self.failures - 1, 32))
        return Restart(full_s * (0.5 + 0.5 * jitter))


@dataclass(frozen=True, slots=True)
class StopStage:
    """These kinds get SIGTERM together, and SIGKILL if they are still there after `grace_s`."""

    kind: ChildKind
    grace_s: float


def shutdown_stages(drain_timeout_s: float) -> tuple[StopStage, ...]:
    """The router first, because it drains the requests; then the workers, which by then have none; then
    the transfer processes, which must outlive their workers' last commits. All within the timeout, except
    that each gets enough to clean up."""
    return (
        StopStage(ChildKind.ROUTER, max(_LEAST_GRACE_S, drain_timeout_s * 0.7)),
        StopStage(ChildKind.WORKER, max(_LEAST_GRACE_S, drain_timeout_s * 0.2)),
        StopStage(ChildKind.TRANSFER, max(_LEAST_GRACE_S, drain_timeout_s * 0.1)),
    )


def drain_of(kind: ChildKind, drain_timeout_s: float) -> float:
    """The drain timeout that a child gets by flag: a little less than the launcher waits before SIGKILL."""
    grace_s = next(stage.grace_s for stage in shutdown_stages(drain_timeout_s) if stage.kind is kind)
    return min(drain_timeout_s, grace_s * 0.9)
