"""What became of one request, and what its figures are. Pure."""

from dataclasses import dataclass, field

from deploy.bench.load.plan import Planned


@dataclass(slots=True)
class Outcome:
    """Times are seconds of one clock. One arrival is one read of the socket that brought text: `arrived_s[i]`
    is when, `chunks[i]` how many chunks it brought. `failure` is its kind, None for a request that got all
    its tokens."""

    planned: Planned
    scheduled_s: float
    started_s: float = 0.0
    ended_s: float = 0.0
    arrived_s: list[float] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)
    completion_tokens: int | None = None
    failure: str | None = None
    done: bool = False

    def end(self, now_s: float, failure: str | None) -> None:
        """Only the first end counts. An answer without all its tokens is a failure, however it ended."""
        if self.done:
            return
        self.done, self.ended_s, self.failure = True, now_s, failure
        if failure is None and not self.arrived_s:
            self.failure = "no text"
        elif failure is None and self.tokens < self.planned.output_tokens:
            self.failure = "too few tokens"

    @property
    def tokens(self) -> int:
        """The answer's tokens as the server counts them; without its count, one for each chunk."""
        return sum(self.chunks) if self.completion_tokens is None else self.completion_tokens

    @property
    def lag_s(self) -> float:
        """How late this client was by itself."""
        return self.started_s - self.scheduled_s

    @property
    def first_token_s(self) -> float:
        """Time to the first token from when the request was due, not sent: a client's lag is not hidden."""
        return self.arrived_s[0] - self.scheduled_s

    @property
    def second_token_s(self) -> float | None:
        """When the second chunk was there, None if there was one only."""
        if self.chunks[0] > 1:
            return self.first_token_s
        return self.arrived_s[1] - self.scheduled_s if len(self.arrived_s) > 1 else None

    @property
    def second_gap_s(self) -> float | None:
        """From the first chunk to the second: with a hand-over in between, all that it makes a user wait."""
        if self.chunks[0] > 1:
            return 0.0
        return self.arrived_s[1] - self.arrived_s[0] if len(self.arrived_s) > 1 else None

    @property
    def gaps_s(self) -> list[float]:
        """Between arrivals: what the user waits. Several tokens in one arrival are one gap, so that bundling
        cannot make the percentiles look better."""
        return [after - before for before, after in zip(self.arrived_s, self.arrived_s[1:], strict=False)]

    @property
    def per_token_s(self) -> float | None:
        """TPOT: from the first arrival to the last, for each token after the first."""
        if self.tokens < 2:
            return None
        return (self.arrived_s[-1] - self.arrived_s[0]) / (self.tokens - 1)

    @property
    def whole_s(self) -> float:
        return self.ended_s - self.scheduled_s

    def tokens_between(self, start_s: float, end_s: float) -> float:
        """Tokens that arrived in a window, each chunk counting for its share of the server's count."""
        chunks = sum(self.chunks)
        if not chunks:
            return 0.0
        inside = sum(
            count for at_s, count in zip(self.arrived_s, self.chunks, strict=True) if start_s <= at_s < end_s
        )
        return inside * self.tokens / chunks
