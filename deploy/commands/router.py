"""`baton router MODEL_DIR --worker ...`: the HTTP API in front of workers."""

from deploy.errors import UserError
from deploy.launcher.child import child_of_launcher, log_to_stderr
from deploy.settings.api_keys import api_keys
from deploy.settings.options import RouterSettings
from deploy.settings.planning import check_model_dir
from deploy.settings.values import DNS_SCHEME
from deploy.settings.web_origins import allowed_origins


def run(settings: RouterSettings) -> None:
    check_model_dir(settings.model_dir)
    if not settings.worker and settings.workers_file is None:
        raise UserError("--worker, --workers-file: one of them is needed, to know who computes")
    names = tuple(one for one in settings.worker if one.startswith(DNS_SCHEME))
    file = settings.workers_file
    if file is not None and not file.parent.is_dir():
        raise UserError(f"--workers-file: {file.parent} is not a directory; the file itself may come later")
    from kvtransfer.errors import TransferConfigError
    from router.config import RouterConfig, RouterConfigError
    from router.process import run as run_router

    try:
        config = RouterConfig(
            workers=tuple(one for one in settings.worker if one not in names),
            worker_names=names,
            workers_file=settings.workers_file,
            model_dir=settings.model_dir,
            served_model_name=settings.served_model_name or settings.model_dir.resolve().name,
            generation_config=settings.generation_config,
            host=settings.host,
            port=settings.port,
            api_keys=api_keys(settings.api_key, settings.api_key_file),
            keyless_probes=settings.keyless_probes,
            allowed_origins=allowed_origins(settings.allowed_origins),
            key_dir=settings.key_dir,
            request_timeout_s=settings.request_timeout,
            max_body_bytes=settings.max_body_bytes,
            max_choices=settings.max_choices,
            max_prompts=settings.max_prompts,
            max_total_choices=settings.max_total_choices,
            max_running=settings.max_running,
            worker_timeout_s=settings.worker_timeout,
            max_retries=settings.max_retries,
            ttft_slo_s=settings.ttft_slo,
            max_kv_load=settings.max_kv_load,
            stall_timeout_s=settings.stall_timeout,
            upload_timeout_s=settings.upload_timeout,
            keep_alive_timeout_s=settings.keep_alive_timeout,
            drain_timeout_s=settings.drain_timeout,
        )
        log_to_stderr()
        with child_of_launcher(settings.parent_pid, settings.run_dir, settings.drain_timeout):
            run_router(config)
    except (RouterConfigError, TransferConfigError) as error:
        raise UserError(str(error)) from None
