"""One system under the loads of all rates, one after the other."""

import asyncio
from collections.abc import Callable

import msgspec

from deploy.load.busy import busy_shares, worker_times
from deploy.load.drive import drive
from deploy.load.exposed import exposed_buckets, exposed_ms
from deploy.load.plan import Ask
from deploy.load.rates import Rates, limits_of
from deploy.load.statistics import RateFigures, figures_of
from deploy.load.target import ServedModel, Target

Show = Callable[[RateFigures], None]


async def measure(
    target: Target, model: ServedModel, rates: Rates, gpus: int, show: Show
) -> list[RateFigures]:
    """Figures of every rate, each given to `show` when it is known. Raises UserError if a load cannot be."""
    settings = rates.settings
    ask, limits = Ask(model.name, settings.temperature), limits_of(settings)
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
