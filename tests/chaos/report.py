"""What a run found, and the line that says it."""

from collections import Counter
from dataclasses import dataclass, field
from statistics import median

SHOWN = 20


@dataclass(slots=True)
class Report:
    """`violations` are of one of the kinds wrong, failed, endless, unrest, leak, left. `pauses_s` is one
    list for each kill of a decode worker: how long each of its streams stood still."""

    seed: int
    requests: int = 0
    cancelled: int = 0
    invalid: int = 0
    cut: int = 0
    refused: int = 0
    unreachable: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    violations: list[tuple[str, str]] = field(default_factory=list)
    pauses_s: list[list[float]] = field(default_factory=list)
    growth: list[str] = field(default_factory=list)

    def violate(self, kind: str, what: str) -> None:
        self.violations.append((kind, what))

    def count(self, *kinds: str) -> int:
        return sum(1 for kind, _ in self.violations if kind in kinds)

    def details(self) -> list[str]:
        """A line for each kill of a decode worker that met streams, and for each violation."""
        lines = [*self.growth]
        lines += [
            f"decode worker killed: {len(pauses)} streams paused, p50 {median(pauses):.2f} s, "
            f"max {max(pauses):.2f} s"
            for pauses in self.pauses_s
            if pauses
        ]
        lines += [f"violated: {kind}: {what}" for kind, what in self.violations[:SHOWN]]
        if len(self.violations) > SHOWN:
            lines.append(f"and {len(self.violations) - SHOWN} more violations")
        return lines

    def summary(self) -> str:
        pauses = [pause for one in self.pauses_s for pause in one]
        recovery = f"{median(pauses):.2f}/{max(pauses):.2f} s" if pauses else "none"
        faults = ", ".join(f"{name} {count}" for name, count in sorted(self.faults.items())) or "none"
        return (
            f"chaos: {self.requests} requests ({self.cancelled} cancelled, {self.invalid} invalid), "
            f"faults: {faults}; wrong {self.count('wrong')}, failed {self.count('failed', 'endless')}, "
            f"cut with the router {self.cut}, refused {self.refused}, unreachable {self.unreachable}, "
            f"not at rest {self.count('unrest')}, leaks {self.count('leak', 'left')}, "
            f"recovery p50/max {recovery}, seed {self.seed}"
        )
