"""Sampling tokens at Qwen3's vocabulary in bfloat16, checked and timed: `python -m
deploy.bench.kernels.sample`.

Times are medians of CUDA graphs, of the kernels and beside them of their reference: a float64 sampler in
torch, with a sort if anything is filtered. Two kinds of logits: `peaked`, where 2000 tokens stand out of the
noise as words do (a Zipf law), and `flat`, nothing but noise, of which a nucleus is half the vocabulary.
Every shape is checked first: a token must be the one its chance falls on in float64, within 1e-5, and min-p
and top-k must keep exactly what the reference keeps. `--tune` also tries other sizes of a filtering program.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor

from deploy.bench.kernels.kernel_times import (
    graph_time_s,
)
from services.engine.sampling.sample_kernels import (
    best_tokens_kernel,
    sample_tokens_kernel,
    sample_tokens_reference,
)
from services.engine.sampling.top_k_top_p_threshold import lowest_kept_reference

VOCAB = 151936
BATCHES = (1, 64, 256)
CUDA = torch.device("cuda")
CLOSE = 1e-5
FILTERS: dict[str, dict[str, float]] = {
    "temperature": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "min-p 0.05": {"min_p": 0.05},
    "all": {"min_p": 0.01, "top_k": 50, "top_p": 0.9},
}
TUNINGS = ((16, 32, 4096), (8, 32, 4096), (8, 32, 2048), (16, 64, 4096), (16, 16, 4096), (8, 64, 4096))
"""Warps, runs a tile and candidates; the first is the default."""


@dataclass(frozen=True, slots=True)
class SampleResult:
    logits: str
    batch: int
    mode: str
    tuning: str
    kernel_us: float
    reference_us: float
    wrong: int
    kept_differs: int


def logits_of(kind: str, batch: int) -> Tensor:
    generator = torch.Generator(CUDA).manual_seed(batch)
    noise = torch.randn((batch, VOCAB), device=CUDA, generator=generator)
    if kind == "peaked":
        noise *= 2.5
        words = torch.rand((batch, VOCAB), device=CUDA, generator=generator).argsort(dim=-1)[:, :2000]
        zipf = 20 - 1.2 * torch.arange(1, 2001, device=CUDA).log()
        noise.scatter_(1, words, zipf.expand(batch, -1))
    return noise.to(torch.bfloat16)


def parameters_of(batch: int, top_k: float = 0, top_p: float = 1.0, min_p: float = 0.0) -> dict[str, Tensor]:
    generator = torch.Generator(CUDA).manual_seed(1)
    return {
        "temperature": torch.full((batch,), 0.8, device=CUDA),
        "top_k": torch.full((batch,), int(top_k), dtype=torch.int32, device=CUDA),
        "top_p": torch.full((batch,), top_p, device=CUDA),
        "min_p": torch.full((batch,), min_p, device=CUDA),
        "chance": torch.rand(batch, dtype=torch.float64, device=CUDA, generator=generator),
    }


def check(logits: Tensor, given: dict[str, Tensor], tokens: Tensor, lowest: Tensor) -> tuple[int, int]:
    """How many tokens are not those of their chance, or of a wrong kept set; and how many sets differ, which
    a nucleus may where its mass is within rounding of top_p."""
    scores = logits.float()
    settings = [given[name] for name in ("temperature", "top_k", "top_p", "min_p")]
    exact = lowest_kept_reference(scores, *settings)
    kept = scores >= lowest[:, None]
    differs = (kept != (scores >= exact[:, None])).any(dim=-1)
    scaled = (scores - scores.amax(dim=-1, keepdim=True)).double() / given["temperature"].double()[:, None]
    weights = scaled.exp().masked_fill(~kept, 0.0)
    upto = weights.cumsum(dim=-1) / weights.sum(dim=-1, keepdim=True)
    own = weights.gather(1, tokens[:, None])[:, 0]
    end = upto.gather(1, tokens[:, None])[:, 0]
    start, chance = end - own / weights.sum(dim=-1), given["chance"]
    right = (own > 0) & (start - CLOSE <= chance) & (chance <= end + CLOSE)
    right &= ~differs | (given["top_p"] < 1)
    return int((~right).sum()), int(differs.sum())


def measure(tune: bool) -> Iterator[SampleResult]:
    for kind in ("peaked", "flat"):
        for batch in BATCHES:
            logits = logits_of(kind, batch)
            rows = torch.arange(batch, dtype=torch.int32, device=CUDA)
            greedy = partial(best_tokens_kernel, logits, rows)
            wrong = int((greedy() != logits.argmax(dim=-1)).sum())
            argmax_us = 1e6 * graph_time_s([partial(torch.argmax, logits, dim=-1)] * 4)
            yield SampleResult(
                kind, batch, "greedy", "", 1e6 * graph_time_s([greedy] * 4), argmax_us, wrong, 0
            )
            for mode, settings in FILTERS.items():
                given = parameters_of(batch, **settings)
                filtered = bool(settings)
                reference = partial(sample_tokens_reference, logits, rows, **given, filtered=filtered)
                reference_us = 1e6 * graph_time_s([reference])
                for warps, tile_runs, candidates in TUNINGS if filtered and tune else TUNINGS[:1]:
                    lowest = torch.empty(batch, device=CUDA)
                    draw = partial(
                        sample_tokens_kernel,
                        *(logits, rows),
                        **given,
                        filtered=filtered,
                        lowest=lowest,
                        candidates=candidates,
                        tile_runs=tile_runs,
                        num_warps=warps,
                    )
                    wrong, differs = check(logits, given, draw(), lowest)
                    tuning = f"warps {warps} tile {tile_runs} candidates {candidates}" if filtered else ""
                    time_us = 1e6 * graph_time_s([draw] * 4)
                    yield SampleResult(kind, batch, mode, tuning, time_us, reference_us, wrong, differs)


def run(out: Path | None, tune: bool) -> int:
    """1. Check and time every shape; 2. write the results; 3. fail if a token was wrong."""
    if not torch.cuda.is_available():
        print("the benchmark of sampling needs an NVIDIA GPU", file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    results: list[SampleResult] = []
    with torch.inference_mode():
        for result in measure(tune):
            results.append(result)
            name = f"{result.logits} | batch {result.batch} | {result.mode} | {result.tuning}"
            print(
                f"{name:<76} {result.kernel_us:8.1f} us, reference {result.reference_us:9.1f} us, "
                f"{result.wrong} wrong, {result.kept_differs} kept otherwise",
                flush=True,
            )
    if out is not None:
        report = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "results": [asdict(result) for result in results],
        }
        out.write_text(json.dumps(report, indent=1))
    return 1 if any(result.wrong for result in results) else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.bench.kernels.sample", description=__doc__)
    parser.add_argument("--out", type=Path, help="file for all results as JSON")
    parser.add_argument("--tune", action="store_true", help="try other sizes of the filtering program")
    options = parser.parse_args()
    return run(options.out, options.tune)


if __name__ == "__main__":
    sys.exit(main())
