"""`baton serve MODEL_DIR`: a whole system on this host."""

import asyncio
from pathlib import Path

import typer

from deploy.errors import UserError
from deploy.launcher import run_directory
from deploy.launcher.children import child_specs, worker_endpoints
from deploy.launcher.control import control_server
from deploy.launcher.launcher import Launcher
from deploy.launcher.output import Screen
from deploy.launcher.preflight import checked_slots
from deploy.launcher.readiness import Welcome, claim_port
from deploy.launcher.scaling import Host, Scaling
from deploy.settings.api_keys import api_keys
from deploy.settings.options import ServeSettings
from deploy.settings.web_origins import allowed_origins
from router.config import RouterConfigError
from router.prepare.generation_config import SamplingDefaults, sampling_defaults
from services.memory.measure import gpu_count


async def _serve(launcher: Launcher, scaling: Scaling, control: Path) -> int:
    async with control_server(control, scaling.scale):
        return await launcher.run()


def checked_defaults(settings: ServeSettings) -> SamplingDefaults:
    """Raises UserError for a generation_config.json that cannot be obeyed."""
    try:
        return sampling_defaults(settings.model_dir, settings.generation_config)
    except RouterConfigError as error:
        raise UserError(str(error)) from None


def run(settings: ServeSettings) -> None:
    device, slots, model = checked_slots(settings)
    defaults = checked_defaults(settings)
    keys = api_keys(settings.api_key, settings.api_key_file)
    allowed_origins(settings.allowed_origins)  # the router's, but said before anything starts
    port = claim_port(settings.host, settings.port)
    model_name = settings.served_model_name or settings.model_dir.resolve().name
    welcome = Welcome(settings.host, port, model_name, keys[0] if keys else None)
    screen = Screen()
    for note in model.notes:
        screen.say(f"warning: {note}")
    screen.say(defaults.describe())
    for directory in run_directory.sweep():
        screen.say(f"removed {directory.name}, left by a launcher that is gone")
    run_dir = run_directory.create()
    try:
        run_directory.write_workers(run_dir, worker_endpoints(slots, run_dir))
        specs = child_specs(settings, slots, device, run_dir, port)
        launcher = Launcher(specs, run_dir, settings.drain_timeout, welcome, screen)
        gpus = gpu_count() if device == "cuda" else 0
        scaling = Scaling(launcher, Host(settings, device, gpus, run_dir, welcome), slots)
        code = asyncio.run(_serve(launcher, scaling, run_directory.control_socket(run_dir, port)))
    finally:
        run_directory.remove(run_dir)
    raise typer.Exit(code)
