"""What a run found, and the line that says it."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from math import ceil
from statistics import median

SHOWN = 20


@dataclass(slots=True)
class Report:
    """`violations` are of one of the kinds wrong, failed, endless, unrest, leak, left. By kind of
    fault, `pauses_s` is how long each stream that it met stood still, `spared_s` the same where it took one
    of several while all was well, and nothing else happened meanwhile, and `outages_s` the times from a fault
    that came alone to the next moment at which everything was seen ready."""

    seed: int
    left_out: int = 0
    """Requests of the seed that are not asked: rounding could change their answers."""
    requests: int = 0
    cancelled: int = 0
    invalid: int = 0
    cut: int = 0
    refused: int = 0
    unreachable: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    violations: list[tuple[str, str]] = field(default_factory=list)
    pauses_s: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    spared_s: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    outages_s: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    timeline: list[str] = field(default_factory=list)
    """What was done when."""
    evidence: list[str] = field(default_factory=list)
    """What was seen of a cluster that did not come to rest."""
    growth: list[str] = field(default_factory=list)

    def violate(self, kind: str, what: str) -> None:
        self.violations.append((kind, what))

    def count(self, *kinds: str) -> int:
        return sum(1 for kind, _ in self.violations if kind in kinds)

    def details(self) -> list[str]:
        """A line for each kind of fault, what each kind took, and each violation."""
        lines = [*self.growth, *self.evidence]
        if self.left_out:
            lines.append(f"{self.left_out} requests are left out: rounding could change their answers")
        for what in sorted(self.faults):
            pauses = _spread(self.pauses_s.get(what, []))
            outages = _spread(self.outages_s.get(what, []))
            count = self.faults[what]
            lines.append(f"{what}: {count}; streams stood still {pauses}; all ready again {outages}")
            if self.spared_s.get(what):
                spared = _spread(self.spared_s[what])
                lines.append(f"{what}, another being ready: streams stood still {spared}")
        if self.violations:
            lines += self.timeline
        lines += [f"violated: {kind}: {what}" for kind, what in self.violations[:SHOWN]]
        if len(self.violations) > SHOWN:
            lines.append(f"and {len(self.violations) - SHOWN} more violations")
        return lines

    def summary(self) -> str:
        pauses = self.pauses_s.get("kill decode", [])
        recovery = f"{median(pauses):.2f}/{max(pauses):.2f} s" if pauses else "none"
        faults = ", ".join(f"{name} {count}" for name, count in sorted(self.faults.items())) or "none"
        return (
            f"chaos: {self.requests} requests ({self.cancelled} cancelled, {self.invalid} invalid), "
            f"faults: {faults}; wrong {self.count('wrong')}, failed {self.count('failed', 'endless')}, "
            f"cut with the router {self.cut}, refused {self.refused}, unreachable {self.unreachable}, "
            f"not at rest {self.count('unrest')}, leaks {self.count('leak', 'left')}, "
            f"recovery p50/max {recovery}, seed {self.seed}"
        )


def _spread(values_s: list[float]) -> str:
    """How many, and p50/p99/max by the nearest rank."""
    if not values_s:
        return "0 times"
    ranked = sorted(values_s)
    p50_s, p99_s = (ranked[ceil(share * len(ranked)) - 1] for share in (0.5, 0.99))
    return f"{len(ranked)} times, p50/p99/max {p50_s:.2f}/{p99_s:.2f}/{ranked[-1]:.2f} s"
