"""Clients that ask without pause, retry what is refused, and compare whatever ends."""

import asyncio
import time
from random import Random

import httpx

from tests.chaos.client import Answer, BadAnswer, Refused, ask
from tests.chaos.outages import Outages
from tests.chaos.reference import difference
from tests.chaos.report import Report
from tests.chaos.requests import Plan
from tests.patience import patient

CLIENTS = 10
END_S = patient(90.0)
"""A request that has no end by then never gets one: above every time-out of the cluster that is in use."""
REFUSED_S = patient(180.0)
"""A request that is refused for longer finds a cluster that does not come back."""
LONGEST_WAIT_S = 1.0
"""A client would wait for `retry-after`; more requests in an outage are worth more here."""
NOT_READ_S = 0.1


class Load:
    """`open` holds the streams that are being read, so that a kill knows whom it met."""

    def __init__(
        self, url: str, plans: list[Plan], right: dict[int, Answer], outages: Outages, report: Report
    ) -> None:
        self._url, self._plans, self._right = url, plans, right
        self._outages, self._report = outages, report
        self._met: list[tuple[float, str, bool, list[Answer]]] = []
        self._ended = asyncio.Event()
        self._answered = 0
        self.open: list[Answer] = []
        self.warm = asyncio.Event()
        """Set once as many requests have ended as there are clients."""

    async def run(self, seed: str) -> None:
        """Returns once `end` was called and every request has ended."""
        self._ended.clear()
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=self._url, timeout=None, limits=limits) as http:
            await asyncio.gather(*(self._client(http, Random(f"{seed} {one}")) for one in range(CLIENTS)))
        for number, (at_s, what, spared, streams) in enumerate(self._met, 1):
            next_s = self._met[number][0] if number < len(self._met) else float("inf")
            pauses = _pauses(at_s, streams)
            self._report.pauses_s[what] += [pause_s for pause_s, _ in pauses]
            if spared:
                self._report.spared_s[what] += [pause_s for pause_s, end_s in pauses if end_s < next_s]
        self._met.clear()

    def end(self) -> None:
        self._ended.set()

    def meet(self, at_s: float, what: str, spared: bool) -> None:
        """A fault happens now; `spared`: what it takes away has another of its kind beside it."""
        self._met.append((at_s, what, spared, [one for one in self.open if one.arrivals_s]))

    async def _client(self, http: httpx.AsyncClient, random: Random) -> None:
        while not self._ended.is_set():
            await self._until_answered(http, random.choice(self._plans))

    async def _until_answered(self, http: httpx.AsyncClient, plan: Plan) -> None:
        began_s = time.monotonic()
        while (wait_s := await self.attempt(http, plan)) is not None:
            if time.monotonic() - began_s > REFUSED_S:
                self._report.violate("endless", f"plan {plan.number} was refused for {REFUSED_S:g} s")
                return
            await asyncio.sleep(wait_s)

    async def attempt(self, http: httpx.AsyncClient, plan: Plan) -> float | None:
        """Seconds to wait before the next attempt; None if there is nothing more to try."""
        answer = Answer(0)
        began_s = time.monotonic()
        self.open.append(answer)
        try:
            async with asyncio.timeout(END_S):
                await ask(http, plan, answer)
        except TimeoutError:
            self._report.violate("endless", f"plan {plan.number} has no end after {END_S:g} s")
        except Refused as refusal:
            return self._refused(plan, refusal, began_s)
        except BadAnswer as error:
            self._report.violate("failed", f"plan {plan.number}: {error}")
        except httpx.TransportError as error:
            return self._disconnected(plan, error, began_s)
        else:
            self._compare(plan, answer)
        finally:
            self.open.remove(answer)
        return None

    def _compare(self, plan: Plan, answer: Answer) -> None:
        self._report.requests += 1
        self._answered += 1
        if self._answered == CLIENTS:
            self.warm.set()
        self._report.cancelled += answer.cut
        self._report.invalid += plan.expect_status != 200
        wrong = difference(plan, answer, self._right.get(plan.number))
        if wrong is not None:
            self._report.violate("wrong", f"plan {plan.number}: {wrong}")

    def _refused(self, plan: Plan, refusal: Refused, began_s: float) -> float | None:
        if not self._outages.any_since(began_s):
            self._report.violate("failed", f"plan {plan.number}: {refusal}, and every worker was there")
            return None
        self._report.refused += 1
        return min(refusal.retry_after_s, LONGEST_WAIT_S)

    def _disconnected(self, plan: Plan, error: httpx.TransportError, began_s: float) -> float | None:
        if not self._outages.router_since(began_s):
            self._report.violate("failed", f"plan {plan.number}: {error!r}, and the router was there")
            return None
        if isinstance(error, httpx.ConnectError):
            self._report.unreachable += 1
        else:
            self._report.cut += 1
        return LONGEST_WAIT_S / 4


def _pauses(at_s: float, streams: list[Answer]) -> list[tuple[float, float]]:
    """How long each stream that the fault met stood still, and when it went on. Those of another worker, or
    that had all they wanted, are told by their next event: it comes at once, or never."""
    found = []
    for stream in streams:
        before = [one for one in stream.arrivals_s if one <= at_s]
        after = [one for one in stream.arrivals_s if one > at_s]
        if before and after and after[0] - at_s > NOT_READ_S:
            found.append((after[0] - before[-1], after[0]))
    return found
