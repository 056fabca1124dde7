"""Which mover a transfer process uses, decided from facts about its host. Pure: facts and movers come in.

`auto` goes through the movers in the order of preference, and takes the first that works and reaches every
peer; what it passes over stands in a warning, with the reason. Whatever is forced is taken or refused, never
replaced. Both ends choose for themselves; that they chose the same is compared when they greet.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvtransfer.config import AUTO
from kvtransfer.errors import MoverUnavailable
from kvtransfer.movers.spec import HostFacts, MoverSpec


@dataclass(frozen=True, slots=True)
class MoverChoice:
    mover: MoverSpec
    warning: str | None = None
    """Why this is slower than it might be, or does not reach all, and which flag or setting changes that."""


def choose_mover(wanted: str, facts: HostFacts, movers: Sequence[MoverSpec]) -> MoverChoice:
    """`movers` are all there are, the most preferred first. Raises MoverUnavailable, naming what is missing
    and the flag, if nothing that is allowed works."""
    if wanted == AUTO:
        return _choose_automatically(facts, movers)
    mover = next((mover for mover in movers if mover.name == wanted), None)
    if mover is None:
        known = ", ".join([AUTO, *(mover.name for mover in movers)])
        raise MoverUnavailable(f"--mover {wanted}: not known, must be one of {known}")
    why = _why_not(mover, facts)
    if why is not None:
        raise MoverUnavailable(f"--mover {wanted}: {why}; {_alternatives(facts, movers)}")
    return MoverChoice(mover, _warning([mover.unreachable(facts), mover.drawback(facts)]))


def _choose_automatically(facts: HostFacts, movers: Sequence[MoverSpec]) -> MoverChoice:
    reasons: list[str | None] = []
    for mover in movers:
        if not mover.automatic(facts):
            continue
        why = _why_not(mover, facts) or mover.unreachable(facts)
        if why is None:
            return MoverChoice(mover, _warning([*reasons, mover.drawback(facts)]))
        reasons.append(f"not {mover.name}: {why}")
    raise MoverUnavailable(f"--mover {AUTO}: nothing here can move KV: {_warning(reasons)}")


def _why_not(mover: MoverSpec, facts: HostFacts) -> str | None:
    return mover.why_not(facts) or facts.missing.get(mover.name)


def _warning(reasons: Sequence[str | None]) -> str | None:
    return "; ".join(reason for reason in reasons if reason) or None


def _alternatives(facts: HostFacts, movers: Sequence[MoverSpec]) -> str:
    usable = [f"--mover {mover.name}" for mover in movers if _why_not(mover, facts) is None]
    return f"here would work: {', '.join(usable)}" if usable else "no other mover works here"
