"""One system under the loads of all rates, one after the other."""

import asyncio
from collections.abc import Callable

import msgspec

from deploy.bench.load.drive import drive
from deploy.bench.load.plan import RequestTemplate
from deploy.bench.load.rates import Rates
from deploy.bench.load.target import ServedModel, Target
from deploy.bench.serving.busy import busy_shares, worker_times
from deploy.bench.serving.exposed import exposed_buckets, exposed_ms
from deploy.bench.serving.statistics import RateFigures, figures_of, limits_of

Show = Callable[[RateFigures], None]


async def measure(
    target: Target, model: ServedModel, rates: Rates, gpus: int, show: Show
) -> list[RateFigures]:
    """Figures of every rate, each given to `show` when it is known. Raises UserError if a load cannot be."""
    settings = rates.settings
    ask, limits = RequestTemplate(model.name, settings.temperature), limits_of(settings)
    found: list[RateFigures] = []
    for index in range(len(rates.rates)):
        load = await asyncio.to_thread(rates.load, index, ask, model.max_model_len)
        before = await asyncio.to_thread(worker_times, target)
        buckets = await asyncio.to_thread(exposed_buckets, target)
        driven = await drive(target, load, settings.timeout)
        busy = busy_shares(before, await asyncio.to_thread(worker_times, target))
        exposed = exposed_ms(buckets, await asyncio.to_thread(exposed_buckets, target))
        figures = figures_of(driven.outcomes, load, rates.rates[index], limits, gpus, driven.cpu_share)
        found.append(msgspec.structs.replace(figures, busy=busy, exposed_kv_ms=exposed))
        show(found[-1])
    return found
