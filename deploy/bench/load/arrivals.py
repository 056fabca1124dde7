"""When requests arrive, decided before any is sent: no arrival waits for an answer (an open loop). Pure.

With the same seed and kind the gaps of two rates are the same ones, stretched: what differs between two
rates of one run is the rate.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["poisson", "gamma"]
Seconds = NDArray[np.float64]


def arrival_times(kind: Kind, rate: float, count: int, burstiness: float, seed: int) -> Seconds:
    """`count` times in seconds, the first at 0 and the mean gap 1 / `rate` exactly, so that few requests make
    the rate that was asked for.

    `burstiness` is the shape of the gamma distribution that gaps are sampled from: their variance is
    1 / burstiness of the squared mean, so 1 is Poisson, and less is burstier. Poisson ignores it.
    """
    shape = burstiness if kind == "gamma" else 1.0
    gaps = np.random.default_rng(seed).gamma(shape, 1.0 / shape, count - 1)
    times = np.concatenate(([0.0], np.cumsum(gaps)))
    return times if count < 2 else times * ((count - 1) / times[-1] / rate)


def stretched(times_s: Seconds, rate: float) -> Seconds:
    """Recorded times, from 0 on, made slower or faster as a whole until their mean rate is `rate`.

    Raises ValueError if they all are the same: such a trace has no rate.
    """
    from_zero_s = times_s - times_s[:1]
    if len(times_s) < 2 or from_zero_s[-1] <= 0:
        raise ValueError("all its requests arrive at the same time, so that it has no rate to change")
    return from_zero_s * ((len(times_s) - 1) / float(from_zero_s[-1]) / rate)
