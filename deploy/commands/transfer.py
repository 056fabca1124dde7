"""`baton transfer`: the transfer process of one worker."""

from deploy.errors import UserError
from deploy.launcher.child import child_of_launcher, log_to_stderr
from deploy.settings.options import TransferSettings
from deploy.settings.planning import resolve_device, resolve_slot_bytes

SHUTDOWN_GRACE_S = 5.0


def run(settings: TransferSettings) -> None:
    from kvtransfer.config import TransferConfig
    from kvtransfer.errors import TransferConfigError
    from kvtransfer.process import run as run_transfer

    device = resolve_device(settings.device)
    try:
        config = TransferConfig(
            name=settings.name,
            listen=settings.listen,
            peer_listen=settings.peer_listen,
            staging_socket=settings.staging_socket,
            advertise=settings.advertise,
            device=device,
            device_index=settings.device_index,
            slots=settings.staging_slots,
            slot_bytes=resolve_slot_bytes(settings.staging_slot_bytes, device),
            mover=settings.mover,
            checksum=settings.checksum,
            key_dir=settings.key_dir,
            transfer_timeout_s=settings.transfer_timeout,
            peer_timeout_s=settings.peer_timeout,
        )
        log_to_stderr()
        with child_of_launcher(settings.parent_pid, settings.run_dir, SHUTDOWN_GRACE_S):
            run_transfer(config)
    except TransferConfigError as error:
        raise UserError(str(error)) from None
