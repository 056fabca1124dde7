"""`baton scale`: more or fewer workers for a running `baton serve`."""

from deploy.errors import UserError
from deploy.launcher import run_directory
from deploy.launcher.control import request_scale
from deploy.launcher.scale_plan import Scale
from deploy.settings.options import ScaleSettings


def run(settings: ScaleSettings) -> None:
    wanted = Scale(settings.prefill, settings.decode, settings.unified)
    if wanted == Scale():
        raise UserError("--prefill, --decode, --unified: say how many workers of at least one role")
    if settings.run_dir is not None:
        paths = run_directory.control_sockets_in(settings.run_dir)
        nobody = f"--run-dir: {settings.run_dir} is not the run directory of a launcher of yours"
    else:
        paths = run_directory.find_control_sockets(settings.port)
        nobody = f"--port: no `baton serve` of yours has port {settings.port} on this host"
    if not paths:
        raise UserError(nobody)
    for line in request_scale(paths, wanted):
        print(line, flush=True)
