"""When something was broken: from a fault to the next time at which the whole cluster is seen to be well."""

from dataclasses import dataclass, field

INFINITE = float("inf")


@dataclass(slots=True)
class Outages:
    """Times by `time.monotonic`."""

    _any: list[list[float]] = field(default_factory=list)
    _router: list[list[float]] = field(default_factory=list)

    @property
    def lasts(self) -> bool:
        return bool(self._any) and self._any[-1][1] == INFINITE

    def begin(self, at_s: float, router_dies: bool) -> None:
        for spans in [self._any, self._router] if router_dies else [self._any]:
            if not spans or spans[-1][1] != INFINITE:
                spans.append([at_s, INFINITE])

    def end(self, at_s: float) -> None:
        for spans in (self._any, self._router):
            if spans and spans[-1][1] == INFINITE:
                spans[-1][1] = at_s

    def any_since(self, began_s: float) -> bool:
        """Whether an outage lasts, or has ended since."""
        return bool(self._any) and self._any[-1][1] >= began_s

    def router_since(self, began_s: float) -> bool:
        """The same of those in which the router was killed."""
        return bool(self._router) and self._router[-1][1] >= began_s
