"""Clients: each wants one prompt's continuations, knows the right ones, and sees exactly one end."""

from dataclasses import dataclass, field

from router.errors import ApiError
from router.routing.dispatcher import Dispatcher
from router.routing.routed_request import PromptRequest, RoutedRequest
from services.protocol.messages import PrefillDone, Sampling, Tokens
from tests.sim.engine import EOS, continuation
from tests.sim.kernel import Violation, World
from tests.sim.processes import RouterHost


@dataclass(frozen=True)
class Wish:
    """`stop_after[choice]` tokens end that choice on the client's side, as a stop string would;
    the client hangs up after `patience_s`."""

    prompt: list[int]
    seed: int
    max_tokens: int
    choices: int
    salt: bytes = b""
    stop_after: dict[int, int] = field(default_factory=dict)
    patience_s: float | None = None


class Client:
    """A `PromptOutput` of the router, and the output of each choice. `end` is None until the client has seen
    its end."""

    def __init__(self, world: World, name: str, router: RouterHost, wish: Wish) -> None:
        self.world, self.name, self.router, self.wish = world, name, router, wish
        self.end: str | None = None
        self.looks = True
        """Whether it compares what it gets."""
        self.error: ApiError | None = None
        self.got: list[list[int]] = [[] for _ in range(wish.choices)]
        self._right = [
            continuation(wish.prompt, choice, wish.seed, wish.max_tokens) for choice in range(wish.choices)
        ]
        self._going = set(range(wish.choices))
        self._requests: list[RoutedRequest] = []

    def ask(self) -> None:
        """Sends the request, or sees at once that the router is not there."""
        if not self.router.alive or self.router.dispatcher is None:
            self._end("refused")
            return
        self.router.on_death.append(lambda: self._end("router died") if self.end is None else None)
        self.router.call(self._submit)

    # ------------------------------------------------------------ what the router does for it

    def _submit(self, dispatcher: Dispatcher) -> None:
        wish = self.wish
        sampling = Sampling(max_tokens=wish.max_tokens, seed=wish.seed)
        prompt_request = PromptRequest(wish.prompt, sampling, wish.choices, wish.salt, self)
        try:
            self._requests = dispatcher.submit([prompt_request])
        except ApiError as error:
            self.error = error
            self._end("refused")
            return
        self.world.note(self.name, "asks", self._requests[0].work.request_id)
        self.router.loop.call_later(self.router.config.request_timeout_s, self._expire, dispatcher)
        if wish.patience_s is not None:
            self.router.loop.call_later(wish.patience_s, self._leave, dispatcher)

    def _expire(self, dispatcher: Dispatcher) -> None:
        if self.end is None:
            dispatcher.end(self._requests, ApiError(504, "out of time", code="deadline_exceeded"))
            self._require(self.end is not None, "is left without an end at its deadline")

    def _leave(self, dispatcher: Dispatcher) -> None:
        if self.end is None:
            self._end("left")
            dispatcher.end(self._requests)

    # ------------------------------------------------------------ PromptOutput

    @property
    def choices(self) -> "list[Client]":
        return [self] * self.wish.choices

    def on_prefilled(self, report: PrefillDone) -> None:
        self._require(self.end is None, f"hears of its prefill after it has {self.end}")

    def on_tokens(self, report: Tokens, now_s: float) -> bool:
        choice = report.choice
        self._require(self.end is None, f"gets tokens after it has {self.end}")
        self._require(choice in self._going, f"gets tokens of choice {choice}, which is over")
        got, right = self.got[choice], self._right[choice]
        got.extend(report.tokens)
        self._require(got == right[: len(got)], f"choice {choice} is {got}, must be {right}")
        over = len(got) == len(right) if self.looks else report.finish is not None
        self._require(
            (report.finish is not None) == over, f"choice {choice} ends as {report.finish} after {got}"
        )
        if over:
            expected = "stop" if got[-1] == EOS else "length"
            self._require(report.finish == expected, f"choice {choice} ends as {report.finish}")
        stops = len(got) >= self.wish.stop_after.get(choice, len(right) + 1)
        if over or stops:
            self._going.discard(choice)
            if not self._going:
                self._end("done")
        return not over and not stops

    def on_failed(self, error: ApiError) -> None:
        self._require(self.end is None, f"fails after it has {self.end}")
        self.error = error
        self._end("failed")

    # ------------------------------------------------------------ inner workings

    def _end(self, how: str) -> None:
        self._require(self.end is None, f"ends twice: {self.end}, {how}")
        self.end = how
        self.world.note(self.name, how, "" if self.error is None else str(self.error))

    def _require(self, holds: bool, what: str) -> None:
        if not holds and self.looks:
            raise Violation(f"{self.name} {what}")
