"""The settings of the commands that put a load on a running system, or on one that they launch."""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from deploy.bench.load.lengths import Fixed, Lengths, parse_lengths
from deploy.settings.options import EngineSettings, MoverSettings, StagingSettings
from deploy.settings.schema import setting
from deploy.settings.values import choice, flag, integer, number, parse_api_key, path, seconds, text

_MOST_RATES = 32
_MOST_WORKERS = 32
_duration = seconds(0.1, 86400)
_deadline = seconds(1, 86400)
_positive_ms = number(0.001, 1e9)


def parse_rates(given: str) -> tuple[float, ...]:
    """`2,4,8`: different, and in rising order. Raises ValueError."""
    one = number(0.001, 1e6)
    rates = tuple(one(part.strip()) for part in given.split(","))
    if any(after <= before for before, after in itertools.pairwise(rates)):
        raise ValueError(f"{given!r}: rates must rise, like 2,4,8")
    if len(rates) > _MOST_RATES:
        raise ValueError(f"{len(rates)} rates; at most {_MOST_RATES} are allowed")
    return rates


@dataclass(frozen=True, slots=True)
class Layout:
    """How many workers of each role: pairs of prefill and decode, or unified ones."""

    prefill: int = 0
    decode: int = 0
    unified: int = 0

    @property
    def name(self) -> str:
        return f"{self.unified} unified" if self.unified else f"{self.prefill}P{self.decode}D"


def parse_layouts(given: str) -> tuple[Layout, ...]:
    """`1P1D,2P1D,2U`: different ones. Raises ValueError."""
    found: list[Layout] = []
    for part in given.split(","):
        match = re.fullmatch(r"(\d{1,2})P(\d{1,2})D|(\d{1,2})U", part.strip(), re.IGNORECASE | re.ASCII)
        counts = [int(count) for count in match.groups() if count is not None] if match else []
        if not counts or not all(1 <= count <= _MOST_WORKERS for count in counts):
            raise ValueError(
                f"{part!r} is not a layout like 2P1D or 3U, of 1 to {_MOST_WORKERS} workers a role"
            )
        layout = Layout(*counts) if len(counts) == 2 else Layout(unified=counts[0])
        if layout in found:
            raise ValueError(f"{part!r} is there twice")
        found.append(layout)
    return tuple(found)


def parse_token_ids(given: str) -> tuple[int, int]:
    """`LOW-HIGH`, both included. Raises ValueError."""
    low, dash, high = given.partition("-")
    if not (dash and low.isascii() and low.isdigit() and high.isascii() and high.isdigit()):
        raise ValueError(f"{given!r} is not a range of ids like 256-1023")
    if not int(low) < int(high) < 1 << 31:
        raise ValueError(f"{given!r}: the second id must be above the first and below 2147483648")
    return int(low), int(high)


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """What is sent, when, and what is made of it."""

    rates: tuple[float, ...] | None = setting(
        None, parse_rates, "Requests a second, one run for each: 2,4,8. (default: 1, or a trace's own)"
    )
    arrivals: str = setting(
        "poisson", choice("poisson", "gamma", "trace"), "gamma: bursty; trace: as --trace has them."
    )
    burstiness: float = setting(
        0.25, number(0.001, 1000), "Shape of gamma arrivals: 1 is Poisson, less is burstier."
    )
    trace: Path | None = setting(
        None, path, "Lengths, repetitions and times of an Azure CSV or a Mooncake JSONL, also gzipped."
    )
    shrink: int = setting(1, integer(1, 512), "Divide a trace's lengths by this, for a small model.")
    input_tokens: Lengths = setting(
        Fixed(1024), parse_lengths, "Prompt: 512, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA:MOST."
    )
    output_tokens: Lengths = setting(Fixed(128), parse_lengths, "Answer, written like --input-tokens.")
    seconds: float = setting(30.0, _duration, "How long measured requests arrive at each rate.")
    requests: int | None = setting(
        None, integer(1, 1_000_000), "Measured requests at each rate. (default: as many as --seconds take)"
    )
    warm_up: int = setting(10, integer(0, 100_000), "Requests before, at the same rate, that do not count.")
    seed: int = setting(0, integer(0, (1 << 31) - 1), "The same seed makes the same load.")
    token_ids: tuple[int, int] = setting((256, 1023), parse_token_ids, "Ids that prompts are sampled from.")
    temperature: float = setting(0.0, number(0, 2), "Of the answers.")
    slo_ttft_ms: float | None = setting(None, _positive_ms, "Most ms to the first token of a good request.")
    slo_tpot_ms: float | None = setting(None, _positive_ms, "Most ms for each token after the first.")
    slo_itl_ms: float | None = setting(None, _positive_ms, "Most ms between tokens, in 99 of 100 gaps.")
    timeout: float = setting(600.0, _deadline, "Seconds after which a request has failed.")
    out: Path | None = setting(None, path, "File for all figures, as JSON.")
    chart: Path | None = setting(None, path, "PNG of latency and goodput against the rate.")


@dataclass(frozen=True, kw_only=True)
class BenchServeSettings(LoadSettings):
    """Put a load on any OpenAI endpoint and report what its users would meet."""

    url: str = setting("http://127.0.0.1:8000", text, "Base address of the endpoint.")
    api_key: tuple[str, ...] = setting((), parse_api_key, "Bearer key, if the endpoint wants one.", many=True)
    model: str | None = setting(None, text, "Name of the model. (default: the first the endpoint names)")
    gpus: int = setting(1, integer(1, 4096), "GPUs behind the endpoint, for goodput per GPU.")


@dataclass(frozen=True, kw_only=True)
class LaunchedSettings(LoadSettings, StagingSettings, MoverSettings, EngineSettings):
    """What is launched to be measured, and the load on it."""

    prefix_cache: bool = setting(True, flag, "Reuse the KV of common prefixes.", switch=True)
    log: Path | None = setting(None, path, "File for what the systems print.")
    start_timeout: float = setting(600.0, _deadline, "Seconds that a system may take to be ready.")


@dataclass(frozen=True, kw_only=True)
class BenchPdSettings(LaunchedSettings):
    """Compare prefill and decode workers with as many unified ones, under the same load: which to take?"""

    prefill: int = setting(1, integer(1, _MOST_WORKERS), "Prefill workers.")
    decode: int = setting(1, integer(1, _MOST_WORKERS), "Decode workers.")
    margin: float = setting(0.05, number(0, 1), "Differences up to this share count as none.")


@dataclass(frozen=True, kw_only=True)
class BenchLayoutsSettings(LaunchedSettings):
    """Compare layouts of prefill, decode and unified workers under the same load: how many of which?"""

    layouts: tuple[Layout, ...] = setting(
        (Layout(1, 1), Layout(2, 1), Layout(1, 2), Layout(2, 2)),
        parse_layouts,
        "Like 1P1D,2P1D,4U: prefill and decode workers, or unified ones.",
    )
