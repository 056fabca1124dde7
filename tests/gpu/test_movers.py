"""Transfer processes with device memory, once for every mover: data, deaths, and two that do not fit.

Both processes may use one GPU; what needs two, or a library that is not here, is skipped with the reason.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtransfer.buffer.cuda import CudaDevice
from kvtransfer.movers.registry import registered_movers
from services.memory.measure import gpu_facts
from tests.e2e.cluster import wait_until
from tests.e2e.transfer_pair import (
    GEOMETRY,
    SLOT_BYTES,
    SLOTS,
    TransferPair,
    Worker,
    content_of,
    drive,
)

TOKENS = 700
"""Several times what the slots hold."""
MOVERS = {mover.name: mover for mover in registered_movers()}
GPU_PAIRS = ((0, 0), (0, 1), (1, 0))


@pytest.fixture(scope="module")
def device() -> Iterator[CudaDevice]:
    device = CudaDevice(0)
    yield device
    device.close()


class GpuWorker(Worker):
    """Packs and unpacks in its transfer process's device memory."""

    def __init__(self, directory: Path, name: str, epoch: int, device: CudaDevice) -> None:
        super().__init__(directory, name, epoch)
        self._device = device
        self._mapped: int | None = None
        self.map_staging()

    def map_staging(self) -> None:
        """Again after the transfer process was restarted."""
        self.unmap_staging()
        handle = self.client.attached.cuda_ipc_handle
        assert handle is not None
        self._mapped = self._device.import_memory(handle)

    def unmap_staging(self) -> None:
        if self._mapped is not None:
            self._device.unmap(self._mapped)
            self._mapped = None

    def write_slot(self, slot: int, data: bytes) -> None:
        assert self._mapped is not None
        self._device.write(self._mapped + slot * self.client.slot_bytes, data)

    def read_slot(self, slot: int, byte_count: int) -> bytes:
        assert self._mapped is not None
        return self._device.read(self._mapped + slot * self.client.slot_bytes, byte_count)

    def close(self) -> None:
        self.unmap_staging()
        self.client.close()


def require(device: CudaDevice, mover: str, gpus: tuple[int, int]) -> None:
    """Skips what this host cannot do."""
    count = len(device.visible())
    if max(gpus) >= count:
        pytest.skip(f"needs two GPUs, there is {count}")
    if gpus[0] != gpus[1] and mover == "cuda_ipc" and not device.can_access(1):
        pytest.skip("no peer access between GPU 0 and 1")
    if mover == "nccl" and gpus[0] == gpus[1]:
        pytest.skip("NCCL takes no two processes on one GPU")
    if (missing := MOVERS[mover].missing()) is not None:
        pytest.skip(missing)


class Both:
    """A sending and a receiving side with the same mover."""

    def __init__(
        self,
        directory: Path,
        device: CudaDevice,
        mover: str,
        gpus: tuple[int, int],
        slot_bytes: int = SLOT_BYTES,
    ) -> None:
        self.pair = TransferPair(directory)
        self._device, self._mover, self._gpus, self._slot_bytes = device, mover, gpus, slot_bytes
        self.start("prefill")
        self.start("decode")
        self.prefill = GpuWorker(directory, "prefill", 11, device)
        self.decode = GpuWorker(directory, "decode", 12, device)

    def start(self, name: str) -> None:
        gpu = self._gpus[0 if name == "prefill" else 1]
        self.pair.start(name, "cuda", gpu, self._mover, self._slot_bytes)

    def move(self, transfer_id: int, tokens: int = TOKENS) -> None:
        content = content_of(tokens, transfer_id)
        self.decode.receive(transfer_id, self.prefill, tokens)
        self.prefill.send(transfer_id, content)
        both = [self.prefill, self.decode]
        drive(both, lambda: transfer_id in self.prefill.committed, f"commit of {transfer_id}")
        assert self.decode.got[transfer_id] == content

    def all_free(self, *workers: Worker) -> None:
        for worker in workers:
            worker.client.last_stats = None
        drive(list(workers), lambda: all(w.all_free() for w in workers), "every slot is free again")

    def close(self) -> None:
        self.prefill.close()
        self.decode.close()
        self.pair.close()


@pytest.fixture
def both(request: pytest.FixtureRequest, device: CudaDevice) -> Iterator[Both]:
    mover, gpus = request.param
    require(device, mover, gpus)
    with tempfile.TemporaryDirectory(prefix="baton-") as directory:
        sides = Both(Path(directory), device, mover, gpus)
        yield sides
        sides.close()


def cases(*gpu_pairs: tuple[int, int]) -> pytest.MarkDecorator:
    values = [(mover, gpus) for mover in MOVERS for gpus in gpu_pairs]
    names = [f"{mover}-gpu{source}-to-gpu{target}" for mover, (source, target) in values]
    return pytest.mark.parametrize("both", values, ids=names, indirect=True)


@cases(*GPU_PAIRS)
def test_data_arrives_whole_and_nothing_is_left(both: Both) -> None:
    assert both.prefill.client.attached.mover == both.decode.client.attached.mover
    for transfer_id in (1, 2, 3):
        both.move(transfer_id)
    both.all_free(both.prefill, both.decode)
    stats = both.prefill.client.last_stats
    assert stats is not None and stats.moved_bytes == 3 * TOKENS * GEOMETRY.token_bytes
    assert stats.device_bytes is None or stats.device_bytes > SLOT_BYTES
    assert both.pair.terminate("prefill") == 0
    assert both.pair.terminate("decode") == 0


@cases((0, 0), (0, 1))
def test_both_ways_at_once(both: Both) -> None:
    contents = {transfer_id: content_of(300, transfer_id) for transfer_id in range(1, 9)}
    sides = [both.prefill, both.decode]
    for transfer_id, content in contents.items():
        source, target = sides if transfer_id % 2 else reversed(sides)
        target.receive(transfer_id, source, 300)
        source.send(transfer_id, content)
    drive(sides, lambda: len(both.prefill.committed | both.decode.committed) == 8, "all committed")
    got = both.prefill.got | both.decode.got
    assert {transfer_id: bytes(data) for transfer_id, data in got.items()} == contents


@cases((0, 0), (0, 1))
@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_a_killed_side_is_survived_and_replaced(both: Both, victim: str) -> None:
    both.move(1)
    both.prefill.paused = True  # Grants are out, and slots are assigned: the middle of a transfer.
    both.decode.receive(2, both.prefill, TOKENS)
    both.prefill.send(2, content_of(TOKENS, 2))
    drive([both.prefill, both.decode], lambda: _granted(both.decode) > 0, "slots are granted")
    both.pair.kill(victim)
    killed = both.prefill if victim == "prefill" else both.decode
    survivor = both.decode if victim == "prefill" else both.prefill
    both.start(victim)
    drive(
        [both.prefill, both.decode],
        lambda: bool(killed.lost) and killed.client.ready and 2 in survivor.aborted,
        "the survivor notices, the other is attached to the next incarnation",
    )
    both.prefill.paused = False
    killed.map_staging()
    both.all_free(both.prefill, both.decode)
    both.move(3)


def settled_bytes() -> int:
    """What is taken of the GPU once it has been the same for a second: the driver frees a dead process's
    memory some time after its end."""
    seen: list[int] = []

    def settled() -> bool:
        seen.append(gpu_facts(0).used_bytes)
        return len(seen) > 20 and len(set(seen[-20:])) == 1

    wait_until("the GPU's memory settles", settled)
    return seen[-1]


def test_killed_destinations_leave_no_memory_behind(device: CudaDevice) -> None:
    """A survivor's mapping keeps a dead peer's buffer taken: with the peer forgotten it has to be free.
    Nothing else may use the GPU meanwhile."""
    require(device, "cuda_ipc", (0, 0))
    slot_bytes = 16 << 20
    used_bytes = []
    with tempfile.TemporaryDirectory(prefix="baton-") as directory:
        sides = Both(Path(directory), device, "cuda_ipc", (0, 0), slot_bytes)
        try:
            for transfer_id in (1, 2):
                sides.move(transfer_id)
                sides.decode.unmap_staging()
                sides.decode.lost.clear()
                sides.pair.kill("decode")
                drive([sides.prefill], lambda: _peers(sides.prefill) == 0, "the survivor forgets its peer")
                used_bytes.append(settled_bytes())
                sides.start("decode")
                both: list[Worker] = [sides.prefill, sides.decode]
                drive(
                    both,
                    lambda: bool(sides.decode.lost) and sides.decode.client.ready,
                    "the next incarnation",
                )
                sides.decode.map_staging()
        finally:
            sides.close()
    assert used_bytes[1] < used_bytes[0] + SLOTS * slot_bytes // 2, "each death left its buffer behind"


def _granted(worker: Worker) -> int:
    stats = worker.client.last_stats
    return 0 if stats is None else stats.counts.granted


def _peers(worker: Worker) -> int | None:
    stats = worker.client.last_stats
    return None if stats is None else stats.peers


def test_two_movers_refuse_each_other_by_name(device: CudaDevice) -> None:
    require(device, "nixl", (0, 0))
    with tempfile.TemporaryDirectory(prefix="baton-") as directory:
        pair = TransferPair(Path(directory))
        try:
            pair.start("prefill", "cuda", 0, "cuda_ipc")
            pair.start("decode", "cuda", 0, "nixl")
            prefill = GpuWorker(pair.directory, "prefill", 11, device)
            decode = GpuWorker(pair.directory, "decode", 12, device)
            decode.receive(1, prefill, 4)
            prefill.send(1, content_of(4, 1))
            drive([prefill, decode], lambda: 1 in decode.aborted, "refused")
            assert "mover differs" in decode.aborted[1]
            assert "cuda_ipc" in decode.aborted[1] and "nixl" in decode.aborted[1]
            prefill.close()
            decode.close()
        finally:
            pair.close()


def test_nccl_on_one_gpu_is_refused_with_the_way_out(device: CudaDevice) -> None:
    if (missing := MOVERS["nccl"].missing()) is not None:
        pytest.skip(missing)
    with tempfile.TemporaryDirectory(prefix="baton-") as directory:
        sides = Both(Path(directory), device, "nccl", (0, 0))
        try:
            sides.decode.receive(1, sides.prefill, 4)
            sides.prefill.send(1, content_of(4, 1))
            drive([sides.prefill, sides.decode], lambda: 1 in sides.decode.aborted, "refused")
            assert "--mover cuda_ipc" in sides.decode.aborted[1]
        finally:
            sides.close()
