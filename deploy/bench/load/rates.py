"""The loads of a run, one for each rate, from its settings."""

import math
from dataclasses import dataclass

from deploy.bench.load.arrivals import Kind, arrival_times
from deploy.bench.load.errors import LoadError
from deploy.bench.load.options import LoadSettings
from deploy.bench.load.plan import (
    PlannedLoad,
    RequestTemplate,
    Sizes,
    make_load,
    sampled_sizes,
    trace_sizes,
    trace_times,
)
from deploy.bench.load.prompts import Prompts
from deploy.bench.load.traces import TracedRequest, TraceError, read_trace
from deploy.errors import UserError

DEFAULT_RATE = 1.0


@dataclass(frozen=True, slots=True)
class Rates:
    """The loads of a run. `rates` holds None where a trace goes at its own speed."""

    settings: LoadSettings
    trace: tuple[TracedRequest, ...]
    rates: tuple[float | None, ...]

    def load(self, index: int, ask: RequestTemplate, max_model_len: int | None) -> PlannedLoad:
        """The load of rate `index`. Raises UserError if there is none to send."""
        settings, rate = self.settings, self.rates[index]
        low, high = settings.token_ids
        prompts = Prompts(settings.seed, index, low, high)
        try:
            if rate is None or settings.arrivals == "trace":
                count = self._trace_count(rate)
                times_s = trace_times(self.trace[:count], rate)
            else:
                count = settings.warm_up + self._measured(rate)
                kind: Kind = "gamma" if settings.arrivals == "gamma" else "poisson"
                times_s = arrival_times(kind, rate, count, settings.burstiness, settings.seed)
            return make_load(
                times_s,
                self._sizes(count),
                prompts,
                ask,
                warm_up=settings.warm_up,
                max_model_len=max_model_len,
                shrink=settings.shrink,
            )
        except LoadError as error:
            raise UserError(f"{'--trace' if self.trace else '--input-tokens'}: {error}") from None

    def _measured(self, rate: float) -> int:
        return self.settings.requests or max(1, math.ceil(rate * self.settings.seconds))

    def _trace_count(self, rate: float | None) -> int:
        """With its own times: warm-up and what follows; at its own speed, as far as `seconds` go."""
        settings = self.settings
        if rate is not None or settings.requests is not None:
            wanted = settings.warm_up + (settings.requests or self._measured(rate or DEFAULT_RATE))
            if wanted > len(self.trace):
                raise LoadError(
                    f"it has {len(self.trace)} requests, and {wanted} are wanted with those that warm up"
                )
            return wanted
        if len(self.trace) <= settings.warm_up:
            raise LoadError(f"it has {len(self.trace)} requests, and {settings.warm_up} of them warm up")
        end_s = self.trace[settings.warm_up].at_s + settings.seconds
        return sum(one.at_s < end_s for one in self.trace)

    def _sizes(self, count: int) -> list[Sizes]:
        if not self.trace:
            return sampled_sizes(
                self.settings.input_tokens, self.settings.output_tokens, count, self.settings.seed
            )
        if count > len(self.trace):
            raise LoadError(
                f"it has {len(self.trace)} requests, and {count} are wanted with those that warm up"
            )
        return trace_sizes(self.trace[:count], self.settings.shrink)


MOST_TRACE_REQUESTS = 1_000_000


def rates_of(settings: LoadSettings) -> Rates:
    """The loads that settings ask for.

    Raises UserError where settings do not go together, or the trace cannot be read.
    """
    if settings.trace is None:
        if settings.arrivals == "trace":
            raise UserError("--arrivals trace: --trace is missing, the file that has them")
        if settings.shrink != 1:
            raise UserError("--shrink: it divides a trace's lengths, and there is no --trace")
        return Rates(settings, (), settings.rates or (DEFAULT_RATE,))
    try:
        trace = tuple(read_trace(settings.trace, MOST_TRACE_REQUESTS))
    except TraceError as error:
        raise UserError(f"--trace: {error}") from None
    if settings.rates is None and settings.arrivals != "trace":
        raise UserError(f"--rates is missing: --arrivals {settings.arrivals} needs it; or --arrivals trace")
    return Rates(settings, trace, settings.rates or (None,))
