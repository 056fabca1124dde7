"""Who is started with which command line: parsed back, it is what was asked for."""

from pathlib import Path

import pytest

from deploy.errors import UserError
from deploy.launcher.children import child_specs, worker_configs, worker_endpoints, worker_slots
from deploy.launcher.supervision import ChildKind
from deploy.settings.options import RouterSettings, ServeSettings, TransferSettings, WorkerSettings
from deploy.settings.planning import check_shared_gpus
from services.config import WorkerConfig
from tests.unit.deploy.commandline import parse

RUN_DIR = Path("/run/baton-1-1")


def serve(**changes: object) -> ServeSettings:
    return ServeSettings(model_dir=Path("/srv/m"), **changes)  # type: ignore[arg-type]


def names(settings: ServeSettings) -> list[str]:
    return [slot.name for slot in worker_slots(settings, 0)]


def test_who_there_is() -> None:
    assert names(serve()) == ["prefill-0", "decode-0"]
    assert names(serve(prefill=1, decode=3)) == ["prefill-0", "decode-0", "decode-1", "decode-2"]
    assert names(serve(unified=2)) == ["unified-0", "unified-1"]
    assert names(serve(unified=1, prefill=1, decode=1)) == ["prefill-0", "decode-0", "unified-0"]


@pytest.mark.parametrize("changes", [{"prefill": 0}, {"decode": 0}, {"unified": 1, "prefill": 1}])
def test_one_without_the_other_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(UserError, match="must be at least 1 when there are"):
        worker_slots(serve(**changes), 0)


def test_gpus_go_round() -> None:
    slots = worker_slots(serve(prefill=2, decode=3), 2)
    assert [slot.device_index for slot in slots] == [0, 1, 0, 1, 0]


def test_command_lines_say_what_was_asked_for() -> None:
    settings = serve(
        prefill=1,
        decode=2,
        dtype="bfloat16",
        mem_fraction=0.4,
        request_timeout=77.5,
        max_body_bytes=1 << 16,
        max_choices=3,
        max_running=9,
        device_memory=3 << 30,
        max_model_len=512,
        page_size=32,
        kv_dtype="fp8",
        quantization="fp8",
        staging_slots=8,
        staging_slot_bytes=4096,
        checksum=True,
        transfer_timeout=44.5,
        peer_timeout=3.5,
        worker_timeout=2.5,
        max_retries=7,
        prefix_cache=False,
        api_key=("a", "b"),
        api_key_file=Path("/keys"),
        max_prompts=4,
        max_total_choices=5,
        ttft_slo=2.5,
        max_kv_load=1.5,
        stall_timeout=7.0,
        upload_timeout=8.0,
        generation_config="none",
        keep_alive_timeout=9.0,
        keyless_probes=True,
        allowed_origins=("https://a.b,http://c:1", "http://d"),
        served_model_name="tales",
        drain_timeout=20.0,
        slo_itl_ms=12.5,
    )
    slots = worker_slots(settings, 0)
    specs = child_specs(settings, slots, "cpu", RUN_DIR, 4321)
    assert [spec.kind for spec in specs] == [ChildKind.TRANSFER] * 3 + [ChildKind.WORKER] * 3 + [
        ChildKind.ROUTER
    ]
    assert len({spec.name for spec in specs}) == len(specs)
    transfers = [parse(list(spec.arguments)) for spec in specs[:3]]
    workers = [parse(list(spec.arguments)) for spec in specs[3:6]]
    router = parse(list(specs[6].arguments))
    for transfer, worker in zip(transfers, workers, strict=True):
        assert isinstance(transfer, TransferSettings)
        assert isinstance(worker, WorkerSettings)
        assert worker.transfer == (transfer.listen,)
        assert (transfer.staging_slots, transfer.staging_slot_bytes, transfer.checksum) == (8, 4096, True)
        assert (transfer.transfer_timeout, transfer.peer_timeout) == (44.5, 3.5)
        assert (worker.staging_slots, worker.staging_slot_bytes) == (8, 4096)
        assert (worker.dtype, worker.mem_fraction, worker.device_memory) == ("bfloat16", 0.4, 3 << 30)
        assert (worker.max_model_len, worker.page_size, worker.prefix_cache) == (512, 32, False)
        assert (worker.kv_dtype, worker.quantization) == ("fp8", "fp8")
        assert worker.slo_itl_ms == 12.5
        assert worker.drain_timeout < settings.drain_timeout
        assert worker.run_dir == transfer.run_dir == RUN_DIR
    assert isinstance(router, RouterSettings)
    assert router.workers_file == RUN_DIR / "workers"
    assert worker_endpoints(slots, RUN_DIR) == [worker.listen for worker in workers]
    assert (router.port, router.host, router.served_model_name) == (4321, "127.0.0.1", "tales")
    assert (router.request_timeout, router.max_body_bytes) == (77.5, 1 << 16)
    assert (router.max_choices, router.max_running) == (3, 9)
    assert (router.max_prompts, router.max_total_choices) == (4, 5)
    assert (router.ttft_slo, router.max_kv_load) == (2.5, 1.5)
    assert (router.stall_timeout, router.upload_timeout, router.keep_alive_timeout) == (7.0, 8.0, 9.0)
    assert router.generation_config == "none" and router.keyless_probes
    assert router.allowed_origins == settings.allowed_origins
    assert router.api_key_file == Path("/keys")
    assert (router.worker_timeout, router.max_retries) == (2.5, 7)
    assert not {"a", "b"} & set(specs[6].arguments), "keys are not for everybody to see"
    assert specs[6].secrets == (("BATON_API_KEY", "a,b"),)
    endpoints = [getattr(t, name) for t in transfers for name in ("listen", "peer_listen", "staging_socket")]
    assert len(set(endpoints)) == 9


@pytest.mark.parametrize(
    ("device", "given", "prefill", "others"),
    [("cuda", None, 0.0, 25.0), ("cpu", None, 0.0, 0.0), ("cuda", 0.0, 0.0, 0.0), ("cpu", 40.0, 0.0, 40.0)],
)
def test_roles_that_decode_have_a_limit_between_tokens(
    device: str, given: float | None, prefill: float, others: float
) -> None:
    settings = serve(device=device, prefill=1, decode=1, unified=1, slo_itl_ms=given)
    configs = worker_configs(settings, worker_slots(settings, 1))
    limits = {config.role: config.slo_itl_ms for config in configs}
    assert limits == {"prefill": prefill, "decode": others, "unified": others}


def test_unified_workers_have_no_transfer_process() -> None:
    settings = serve(unified=1)
    specs = child_specs(settings, worker_slots(settings, 0), "cpu", RUN_DIR, 1)
    assert [spec.name for spec in specs] == ["unified-0", "router"]
    assert parse(list(specs[0].arguments)).transfer == ()


def test_a_rank_has_a_gpu_and_a_transfer_process() -> None:
    settings = serve(prefill_tp=2, decode=3, tp=1, staging_slot_bytes=4096)
    slots = worker_slots(settings, 4)
    assert [slot.device_indices for slot in slots] == [[0, 1], [2], [3], [0]]
    specs = child_specs(settings, slots, "cuda", RUN_DIR, 1)
    transfers = [parse(list(spec.arguments)) for spec in specs if spec.kind is ChildKind.TRANSFER]
    worker = parse(list(next(spec for spec in specs if spec.kind is ChildKind.WORKER).arguments))
    assert isinstance(worker, WorkerSettings)
    assert [one.device_index for one in transfers] == [0, 1, 2, 3, 0]
    assert [one.staging_slot_bytes for one in transfers] == [2048, 2048, 4096, 4096, 4096]
    assert (worker.tp, worker.device_index, worker.staging_slot_bytes) == (2, 0, 4096)
    assert worker.transfer == tuple(one.listen for one in transfers[:2])
    assert len({one.peer_listen for one in transfers} | {one.staging_socket for one in transfers}) == 10
    with pytest.raises(UserError, match="a prefill worker of 2 ranks needs 2 GPUs, and there are 1"):
        worker_slots(settings, 1)


def shared(mem_fraction: float, sharers: int = 2) -> list[WorkerConfig]:
    settings = serve(device="cuda", mem_fraction=mem_fraction, decode=sharers - 1)
    return worker_configs(settings, worker_slots(settings, 1))


def test_workers_on_one_gpu_must_fit_it_together() -> None:
    memory = 141 << 30
    check_shared_gpus(shared(0.45), memory)
    with pytest.raises(UserError) as caught:
        check_shared_gpus(shared(0.85), memory)
    text = str(caught.value)
    assert "prefill-0, decode-0 share GPU 0" in text
    most = float(text.partition("--mem-fraction ")[2].split()[0])
    check_shared_gpus(shared(most), memory)
    with pytest.raises(UserError):
        check_shared_gpus(shared(most + 0.02), memory)


def test_workers_on_gpus_of_their_own_are_not_checked_together() -> None:
    settings = serve(device="cuda", mem_fraction=0.9)
    check_shared_gpus(worker_configs(settings, worker_slots(settings, 2)), 141 << 30)
