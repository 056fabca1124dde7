"""The engine of one worker rank: weights, the KV pool, one forward pass a step, and the pool's copies.

Life cycle, in this order, each step once:

1. `Engine(config, model)`      nothing is allocated
2. `load(progress)`             weights
3. `measure_activations()`      one worst-case forward, before the pool takes the rest
4. `allocate_pool(pages)`       the pool
5. `launch`, `copy_pages`, `pack`, `unpack`   for as long as the worker lives

Everything runs on the caller's thread, which waits for the device only where it collects a step. On a GPU
steps are queued on one stream and copies between pages and slots on another (copies.py): a step is done when
its `Launched` says so, a pack or an unpack when its `Copy` does, which comes before a slot is handed over.
"""

import os
from collections.abc import Callable, Sequence
from enum import Enum

import torch
from torch import Tensor

from kvtransfer.messages import KvGeometry
from services.config import WorkerConfig
from services.engine.attention.plan import CPU_LIMITS, CUDA_LIMITS
from services.engine.batch import Row, RowResult
from services.engine.decode_graphs import DecodeGraphs
from services.engine.errors import EngineStateError
from services.engine.events import ALL_QUEUED_STEPS, StartAfter
from services.engine.host_copy import fill_pinned_pool
from services.engine.kv.copies import Copy, CopyStream
from services.engine.kv.layout import KvLayout
from services.engine.kv.pool import KvPool
from services.engine.kv.run_table import SlotRun
from services.engine.kv.segments import SlotBuffer
from services.engine.launched import Launched
from services.engine.models.kv_scales import kv_scales
from services.engine.models.layers import Decoder
from services.engine.models.model_config import ModelConfig
from services.engine.models.parameters import Parameters
from services.engine.models.sharding import rank_shape
from services.engine.models.stored_tensors import model_digest
from services.engine.models.weights import fill_dummy, load_safetensors
from services.engine.ops.fp8 import FP8
from services.engine.ops.launch_cache import compiling_ahead, warn_if_slow
from services.engine.ops.processors import processors
from services.engine.peak_memory import ALLOCATOR_SLACK_BYTES, peak_bytes
from services.engine.precision import check_capability
from services.engine.profile_run import (
    mixed_steps,
    profile_rows,
    sample_rows,
    small_chunks,
    without_logprobs,
)
from services.engine.rank_group import RankGroup
from services.engine.step_events import StepEvents
from services.engine.steps import PROMPT_LOGPROB_ROWS, Steps

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class EngineState(Enum):
    NEW = "new"
    LOADED = "loaded"
    SERVING = "serving"


TRANSITIONS: dict[EngineState, EngineState | None] = {
    EngineState.NEW: EngineState.LOADED,
    EngineState.LOADED: EngineState.SERVING,
    EngineState.SERVING: None,
}


class Engine:
    """See the module's docstring for the order of calls; another order raises `EngineStateError`."""

    def __init__(self, config: WorkerConfig, model: ModelConfig, group: RankGroup | None = None) -> None:
        """`group`: the ranks that divide the model, each with an engine that is called alike."""
        self.config = config
        self.model = model
        self.group = group or RankGroup()
        self.device = (
            torch.device("cuda", config.device_index) if config.device == "cuda" else torch.device("cpu")
        )
        self.dtype = DTYPES[config.dtype]
        self.kv_dtype = FP8 if config.kv_dtype == "fp8" else self.dtype
        shape = rank_shape(model, self.group.size)
        self.layout = KvLayout(shape.layers, shape.kv_heads, config.page_size_tokens, shape.head_dim)
        self.limits = CUDA_LIMITS if config.device == "cuda" else CPU_LIMITS
        self.state = EngineState.NEW
        self._steps: Steps | None = None
        self._kv_scales: Tensor | None = None
        self._pool: KvPool | None = None
        self._copies: CopyStream | None = None
        self._step_events = StepEvents()
        self._graphs: DecodeGraphs | None = None
        self._geometry: KvGeometry | None = None
        if self.device.type == "cuda":
            check_capability(config, torch.cuda.get_device_capability(self.device))
            torch.cuda.set_device(self.device)
            warn_if_slow()
        else:
            torch.set_num_threads(max(1, cpu_threads() // self.group.size))

    # ------------------------------------------------------------ what a worker asks about the model

    @property
    def geometry(self) -> KvGeometry:
        """The KV's shape as it travels. Reads the weight files' headers once, for the digest."""
        if self._geometry is None:
            self._geometry = KvGeometry(
                model_digest=model_digest(
                    self.model, self.config.dtype, self.config.load_format, self.config.quantization
                ),
                layers=self.model.layers,
                kv_heads=self.model.kv_heads,
                head_dim=self.model.head_dim,
                dtype="float8_e4m3fn" if self.config.kv_dtype == "fp8" else self.config.dtype,
            )
        return self._geometry

    @property
    def page_bytes(self) -> int:
        return KvPool.page_bytes(self.layout, self.kv_dtype)

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self.model.eos_token_ids

    @property
    def max_model_len(self) -> int:
        """Tokens of one sequence: the configured limit, or what the checkpoint was made for."""
        return self.config.max_model_len or self.model.max_model_len

    # ------------------------------------------------------------ start

    @torch.inference_mode()
    def load(self, progress: Callable[[int, int], None]) -> int:
        """Allocate and fill the weights; returns their bytes. `progress(done_bytes, total_bytes)` is called
        as they come. Raises `CheckpointError`."""
        self._transition(EngineState.LOADED)
        specs = self.model.tensors
        parameters = Parameters(specs, self.dtype, self.device, self.config.quantization, self.group)
        shape = rank_shape(self.model, self.group.size)
        decoder = Decoder(shape, parameters)
        if self.config.load_format == "dummy":
            fill_dummy(parameters, progress)
        else:
            load_safetensors(self.model, parameters, progress)
        if self.config.kv_dtype == "fp8":
            with_stored = self.config.load_format != "dummy"
            self._kv_scales = kv_scales(shape, parameters, with_stored)
        # Products read weights before they wait for the kernels queued ahead of them (dependent_launch.py).
        self.synchronize()
        self._steps = Steps(decoder, self.layout, self.limits, self.config.max_batch)
        return parameters.byte_count

    @torch.inference_mode()
    def measure_activations(self) -> int:
        """Peak bytes beyond the weights of one forward at `max_chunk_tokens` and `max_batch`, sampling with
        every filter on. A few pages stand in for the pool; contexts as long as the model allows read them
        over and over. Only the first layers run: every further one reuses their memory."""
        if self.state is not EngineState.LOADED:
            raise EngineStateError(
                f"activations are measured between load and allocate_pool, not when {self.state}"
            )
        scratch = KvPool(self.layout, 4, self.kv_dtype, self.device, self._kv_scales)
        rows = profile_rows(
            self.config, self.layout, self.limits, scratch.pages, self.max_model_len, PROMPT_LOGPROB_ROWS
        )
        layers = self.model.layers_of_every_kind()

        copies = CopyStream(scratch, 1, self._step_events)
        slot = torch.empty(self.page_bytes, dtype=torch.uint8, device=self.device)
        buffer, run = SlotBuffer(slot, self.page_bytes), SlotRun([0], 0, 1, 0, range(self.layout.kv_heads))

        def launch_all(worst: list[Row]) -> None:
            """No request waits for kernels to be compiled; and the copies' stream keeps a little memory."""
            for step in (worst, *([row] for row in sample_rows())):
                self.steps.launch(step, scratch, layers=layers)
            for copy in (copies.pack, copies.unpack):
                copy([run], buffer, True, ALL_QUEUED_STEPS).wait()

        def work() -> None:
            if self.device.type == "cuda":
                with compiling_ahead():
                    launch_all(without_logprobs(rows))
                    self._warm_up(scratch, layers)
                self.steps.sampled.zero_()  # nothing was sampled
                torch.cuda.empty_cache()  # what that has cut into pieces
            launch_all(rows)
            self.synchronize()

        slack_bytes = ALLOCATOR_SLACK_BYTES if self.device.type == "cuda" else 0
        return peak_bytes(work, self.device) + slack_bytes

    def _warm_up(self, scratch: KvPool, layers: int) -> None:
        """Launch what requests can want and the worst case has not."""
        steps = [[chunk] for chunk in small_chunks(self.config, self.max_model_len)]
        steps += mixed_steps(self.config, self.layout.kv_heads, self.max_model_len, processors(self.device))
        for step in steps:
            self.steps.launch(step, scratch, layers=layers)
        if self.model.family.captures_graphs:
            self._decode_graphs(scratch).warm_up(layers)

    def allocate_pool(self, pages: int) -> int:
        """Allocate the KV pool, zeroed; returns its bytes."""
        self._transition(EngineState.SERVING)
        self._pool = KvPool(self.layout, pages, self.kv_dtype, self.device, self._kv_scales)
        self._copies = CopyStream(self._pool, self.config.staging_slots, self._step_events)
        fill_pinned_pool(self.device)
        return self._pool.byte_count

    @torch.inference_mode()
    def capture_graphs(self) -> int:
        """Record decode steps for every batch size of the ladder; returns the bytes they hold. 0 on a CPU,
        and for a family whose steps no graph can hold."""
        if self.device.type != "cuda" or not self.model.family.captures_graphs:
            return 0
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # what earlier work left behind would be used again unnoticed
        before_bytes = self.allocator_bytes()
        graphs = self._decode_graphs(self.pool)
        graphs.capture()
        self._graphs = graphs
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        return self.allocator_bytes() - before_bytes

    def _decode_graphs(self, pool: KvPool) -> DecodeGraphs:
        return DecodeGraphs(
            self.decoder, pool, self.layout, self.config.max_batch, self.max_model_len, self.steps.sampled
        )

    def cap_allocator(self, limit_bytes: int) -> None:
        """On a GPU, an allocation beyond `limit_bytes` fails here, rather than take what belongs to the
        staging buffer or to another process. On a CPU the kernel has no such cap for one heap."""
        if self.device.type == "cuda":
            total_bytes = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total_bytes), self.device)

    def allocator_bytes(self) -> int:
        """What the device's allocator holds for this process; 0 on a CPU: the kernel keeps the books."""
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0

    # ------------------------------------------------------------ steps

    @torch.inference_mode()
    def launch(self, rows: list[Row]) -> Launched:
        """Queue one forward over all rows, prefill chunks and decode tokens mixed, and their draws. It waits
        neither for the device nor for a launch before; on a CPU all is done when it returns.

        A row may go on from a draw of the launch before this one, known to the host or not (`Row.drawn_by`).
        Raises `RowError` before anything is queued if a row names what does not exist.
        """
        pool = self.pool
        launched = self.steps.launch(rows, pool, self._graphs)
        if rows:
            self._step_events.add(launched.done)
        return launched

    def execute(self, rows: list[Row]) -> list[RowResult]:
        """`launch`, and wait for its results, which come in the rows' order."""
        return self.launch(rows).collect()

    # ------------------------------------------------------------ the pool's copies

    @torch.inference_mode()
    def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole pages, `(source, destination)` each. That has a number as a step has. Raises
        `SegmentError`."""
        self.pool.copy_pages(pairs)
        if pairs:
            self._step_events.add(self.copies.steps_event())

    @property
    def queued_step(self) -> int:
        """The number of the newest step, or copy of pages, that was queued; the first is number 1."""
        return self._step_events.queued

    def passed_step(self) -> int:
        """The number of the newest one that the device is done with. Does not wait for it."""
        return self._step_events.passed()

    @torch.inference_mode()
    def pack(
        self,
        runs: Sequence[SlotRun],
        buffer: SlotBuffer,
        with_checksums: bool,
        after: StartAfter,
    ) -> Copy:
        """Queue the gathering of runs of sequences' tokens into slots by one launch. No two runs may share a
        slot. Raises `SegmentError`."""
        return self.copies.pack(runs, buffer, with_checksums, after)

    @torch.inference_mode()
    def unpack(
        self,
        runs: Sequence[SlotRun],
        buffer: SlotBuffer,
        with_checksums: bool,
        after: StartAfter,
    ) -> Copy:
        """Queue the scattering of slots into sequences' pages likewise. Raises `SegmentError`."""
        return self.copies.unpack(runs, buffer, with_checksums, after)

    def fence(self, copy: Copy) -> None:
        """What is queued from now on waits for a pack or unpack, on the device: its pages are given away."""
        self.copies.fence(copy)

    def synchronize(self) -> None:
        """Wait for all that is queued. On a CPU nothing is."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Leave the group. Nothing may be launched any more. Idempotent.

        The graphs go first: NCCL does not let go of a communicator that one of them holds a sum of.
        """
        if self._graphs is not None:
            self.synchronize()
            self._graphs.close()
            self._graphs = None
        self.group.close()

    # ------------------------------------------------------------ state

    @property
    def steps(self) -> Steps:
        if self._steps is None:
            raise EngineStateError("load the weights first")
        return self._steps

    @property
    def decoder(self) -> Decoder:
        return self.steps.decoder

    @property
    def pool(self) -> KvPool:
        if self._pool is None:
            raise EngineStateError("allocate the pool first")
        return self._pool

    @property
    def copies(self) -> CopyStream:
        if self._copies is None:
            raise EngineStateError("allocate the pool first")
        return self._copies

    def _transition(self, target: EngineState) -> None:
        if TRANSITIONS[self.state] is not target:
            raise EngineStateError(f"engine is {self.state.value}: cannot become {target.value}")
        self.state = target


def cpu_threads() -> int:
    """Threads for the products on a CPU: what OMP_NUM_THREADS says, else half the cores this process may
    use, since a prefill and a decode worker usually share a host."""
    named = os.environ.get("OMP_NUM_THREADS", "")
    return int(named) if named.isdigit() and int(named) > 0 else max(1, len(os.sched_getaffinity(0)) // 2)
