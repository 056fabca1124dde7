"""`baton worker MODEL_DIR --role ...`: one worker process."""

import logging
import sys
from collections.abc import Callable
from typing import cast

from deploy.errors import UserError
from deploy.launcher.child import child_of_launcher, log_to_stderr
from deploy.settings.options import WorkerSettings
from deploy.settings.planning import check_gpu_is_here, check_model_dir, checked_plan, worker_config
from services.engine.models.model_config import read_model_config
from services.protocol.messages import Role

log = logging.getLogger(__name__)


def run(settings: WorkerSettings) -> None:
    role = cast(Role, settings.role)
    check_model_dir(settings.model_dir)
    if role != "unified" and len(settings.transfer) != settings.tp:
        raise UserError(
            f"--transfer: a {role} worker needs the endpoint of each rank's transfer process: "
            f"{settings.tp}, not {len(settings.transfer)}"
        )
    config = worker_config(
        settings,
        name=settings.name or role,
        role=role,
        listen=settings.listen,
        transfers=settings.transfer if role != "unified" else (),
        device_index=settings.device_index,
        staging_slots=settings.staging_slots,
        staging_slot_bytes=settings.staging_slot_bytes,
        slo_itl_ms=settings.slo_itl_ms,
        max_queue=settings.max_queue,
        prefix_cache=settings.prefix_cache,
        drain_timeout_s=settings.drain_timeout,
        key_dir=settings.key_dir,
    )
    if config.device == "cuda":
        for rank in range(config.tp):
            check_gpu_is_here(config.device_index + rank, settings.device_memory)
    log_to_stderr()
    with child_of_launcher(settings.parent_pid, settings.run_dir, settings.drain_timeout):
        checked_plan(config, settings.device_memory)
        if settings.parent_pid is None:  # a launcher says it once for all its workers
            for note in read_model_config(config.model_dir).notes:
                log.warning("%s", note)
        from kvtransfer.errors import TransferConfigError
        from services.engine.errors import CheckpointError
        from services.engine.kv.staging_view import StagingError
        from services.engine.precision import PrecisionError
        from services.memory.plan import DoesNotFit
        from services.tensor_parallel.rank_pool import RankError
        from services.worker import run as run_worker

        try:
            run_worker(config, progress(settings.parent_pid is not None or sys.stderr.isatty()))
        except (CheckpointError, DoesNotFit, PrecisionError, StagingError, TransferConfigError) as error:
            raise UserError(str(error)) from None
        except RankError as error:
            print(f"baton: error: {error}", file=sys.stderr)
            raise SystemExit(1) from None


def progress(in_place: bool) -> Callable[[int, int], None]:
    """What shows that `done` of `total` weights are loaded.

    `in_place`: a bar that ends in a carriage return until it is complete, for a terminal, or a launcher,
    which overwrites or thins it out. Else, as in a log file, only its last line.
    """

    def show(done: int, total: int) -> None:
        if done < total and not in_place:
            return
        percent = 100 * done // max(1, total)
        bar = "#" * (percent // 5)
        end = "\n" if done >= total else "\r"
        print(f"loading weights [{bar:<20}] {percent} %", end=end, file=sys.stderr, flush=True)

    return show
