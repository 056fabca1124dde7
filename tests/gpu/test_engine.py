"""The same engine on a GPU: tokens equal the CPU's in float32, moves and checksums agree between devices."""

from pathlib import Path

import pytest
import torch

from services.engine.kv.checksum import BLOCK_WORDS, checksum
from services.engine.peak_memory import peak_bytes
from services.protocol.messages import Sampling
from tests.checkpoints import FAMILIES, Family, make_checkpoint
from tests.engine.harness import (
    Sequence,
    new_engine,
    packed,
    prompt_of,
    run_ahead,
    run_together,
    start_engine,
    unpacked,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
SAMPLED = Sampling(max_tokens=1, seed=11, temperature=0.9, top_p=0.95, repetition_penalty=1.2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_as_on_the_cpu(family: Family, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path, seed=3, eos=False)
    outputs = []
    for device in ("cpu", "cuda"):
        engine = start_engine(tmp_path, device=device)
        sequences = [
            Sequence(prompt_of(23), list(range(9)), SAMPLED, chunk=7),
            Sequence(prompt_of(40), list(range(20, 34))),
        ]
        outputs.append(run_together(engine, sequences, 10))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_give_the_same_tokens(family: Family, tmp_path: Path) -> None:
    """Batches of one to five sequences that end at different times, so that graphs are left half empty."""
    make_checkpoint(family, tmp_path, seed=4, eos=False)
    outputs = []
    for device in ("cpu", "cuda"):
        engine = start_engine(tmp_path, device=device)
        held_bytes = engine.capture_graphs()
        assert (held_bytes > 0) == (device == "cuda" and engine.model.family.captures_graphs)
        first = 0
        sequences = []
        for length in (1, 7, 16, 23, 40):
            pages = list(range(first, first + 20))
            sequences.append(Sequence(prompt_of(length), pages, SAMPLED, chunk=7))
            first += 20
        for count, total in ((5, 6), (3, 12), (1, 18)):
            run_together(engine, sequences[:count], total)
        outputs.append([sequence.output for sequence in sequences])
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("graphs", [True, False])
def test_launches_ahead_give_the_same_tokens(graphs: bool, tmp_path: Path) -> None:
    """Twenty steps that name their tokens by draws against as many that know them: prompts in chunks beside
    decodes, then decodes alone, replayed as graphs or not, in batches that shrink from the front."""
    make_checkpoint("qwen3", tmp_path, seed=4, eos=False)
    engine = start_engine(tmp_path, device="cuda")
    if graphs:
        engine.capture_graphs()
    settings = [
        Sampling(max_tokens=1, seed=11, temperature=0.9, top_p=0.95, logprobs=3),
        Sampling(max_tokens=1, seed=12, temperature=0.0),
        Sampling(max_tokens=1, seed=13, temperature=1.0, top_k=20, min_p=0.02),
    ]
    outputs = []
    for run in (run_together, run_ahead):
        sequences = [
            Sequence(prompt_of(length), list(range(at * 20, at * 20 + 20)), settings[at % 3], chunk=7)
            for at, length in enumerate((1, 7, 16, 23, 40))
        ]
        for first, total in ((0, 6), (2, 13), (4, 20)):
            run(engine, sequences[first:], total)
        outputs.append([sequence.output for sequence in sequences])
    assert outputs[0] == outputs[1]
    assert [len(output) for output in outputs[0]] == [6, 6, 13, 13, 20]


def test_a_launch_waits_for_nothing(tmp_path: Path) -> None:
    """With the stream held up by a kernel that spins for a second or so, launches return while it runs. Once
    before it counts: kernels are compiled and memory is pinned at first use."""
    make_checkpoint("qwen3", tmp_path, seed=4, eos=False)
    engine = start_engine(tmp_path, device="cuda")
    engine.capture_graphs()
    sampled = Sampling(max_tokens=1, seed=11, temperature=0.9, top_p=0.95, logprobs=3, logit_bias={3: 1.0})
    old = Sequence(prompt_of(9), list(range(9)), sampled, chunk=5)
    run_ahead(engine, [old], 3)
    waited = []
    for first_page in (20, 40):
        fresh = Sequence(prompt_of(9), list(range(first_page, first_page + 9)), sampled, chunk=5)
        torch.cuda._sleep(2_000_000_000)  # cycles
        held = torch.cuda.Event()
        held.record()
        launches = [
            engine.launch([fresh.next_row()]),
            engine.launch([fresh.next_row(), old.next_row()]),
            engine.launch([fresh.row_after(0), old.row_after(1)]),
        ]
        engine.copy_pages([(first_page, 100)])
        waited.append(held.query())
        results = [launched.collect() for launched in launches]
        assert [len(result.sampled) for step in results for result in step] == [0, 1, 1, 1, 1]
        assert held.query()
        for step in results[1:]:
            old.take(step[1])
    assert not waited[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_segments_pass_between_devices(dtype: str, tmp_path: Path) -> None:
    make_checkpoint("qwen3", tmp_path, eos=False)
    gpu = start_engine(tmp_path, device="cuda", dtype=dtype)
    cpu = start_engine(tmp_path, dtype=dtype, page_size_tokens=16)
    sequence = Sequence(prompt_of(30), list(range(10)))
    sequence.take(gpu.execute([sequence.next_row()])[0])
    slot = torch.zeros(1 << 16, dtype=torch.uint8, device="cuda")
    byte_count, digest = packed(gpu, sequence.pages, 3, 27, slot, True)
    on_host = slot.cpu()
    assert checksum(on_host[:byte_count]) == digest
    unpacked(cpu, [4, 5], 3, 27, on_host, digest)
    again = torch.zeros(1 << 16, dtype=torch.uint8)
    assert packed(cpu, [4, 5], 3, 27, again, True) == (byte_count, digest)
    assert torch.equal(again, on_host)


@pytest.mark.parametrize("count", [5, 8 * BLOCK_WORDS, 24 * BLOCK_WORDS + 3])
def test_checksums_agree_between_devices(count: int) -> None:
    data = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert checksum(data) == checksum(data.cuda())


def test_activations_are_measured(tmp_path: Path) -> None:
    make_checkpoint("qwen3", tmp_path, eos=False)
    engine = new_engine(tmp_path, device="cuda")
    engine.load(lambda done_bytes, total_bytes: None)
    assert engine.measure_activations() > 0
    assert (
        peak_bytes(lambda: torch.ones(1 << 20, device="cuda").sum().item(), torch.device("cuda")) >= 4 << 20
    )


def test_an_allocation_beyond_the_cap_fails(tmp_path: Path) -> None:
    """The pool and all that steps take stay below it; what would pass it is refused, and nothing breaks."""
    make_checkpoint("qwen3", tmp_path, eos=False)
    engine = new_engine(tmp_path, device="cuda")
    engine.load(lambda done_bytes, total_bytes: None)
    engine.measure_activations()
    engine.allocate_pool(128)
    torch.cuda.empty_cache()
    limit_bytes = engine.allocator_bytes() + (256 << 20)
    engine.cap_allocator(limit_bytes)
    try:
        within = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(192 << 20, dtype=torch.uint8, device="cuda")
        assert engine.allocator_bytes() <= limit_bytes
        del within
        sequence = Sequence(prompt_of(30), list(range(10)))
        assert len(run_together(engine, [sequence], 5)[0]) == 5
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
