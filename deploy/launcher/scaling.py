"""Workers of a running `baton serve` are started and drained, as `baton scale` asks.

1. Who joins and who leaves (scale_plan.py), and whether the GPUs have room: refused before anything happens.
2. Join: the transfer processes and workers start; the router reads them from its workers file, and gives
   them work as soon as they are ready. One that cannot live is taken back, with all that joined beside it.
3. Leave, highest number first: the router reads it there, gives a leaving worker nothing more, and drops it
   when its requests have ended. Then SIGTERM to the worker, and to its transfer processes after it; each
   within its share of the drain timeout. What has not ended by then goes on elsewhere, as after its death.

Where the new ones fit beside the leaving ones they join first, so that nothing is missing meanwhile.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deploy.errors import UserError
from deploy.launcher import run_directory
from deploy.launcher.children import WorkerSlot, worker_configs, worker_endpoints, worker_specs
from deploy.launcher.launcher import Child, Launcher
from deploy.launcher.readiness import SeenWorker, Welcome, seen_workers
from deploy.launcher.scale_plan import Scale, counted, plan_scale
from deploy.launcher.supervision import ChildKind, shutdown_stages
from deploy.settings.options import ServeSettings
from deploy.settings.planning import check_gpu_is_here, check_shared_gpus
from services.config import Device

_ASK_S = 0.1
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Host:
    """What was settled about this host when the system started."""

    settings: ServeSettings
    device: Device
    gpus: int
    run_dir: Path
    welcome: Welcome


class Scaling:
    def __init__(self, launcher: Launcher, host: Host, slots: list[WorkerSlot]) -> None:
        self._launcher, self._host = launcher, host
        self._slots = list(slots)
        self._changing = False
        stages = shutdown_stages(host.settings.drain_timeout)
        self._grace_s = {stage.kind: stage.grace_s for stage in stages}

    async def scale(self, wanted: Scale, say: Say) -> None:
        """Starts and drains workers, and returns when that is done. Raises UserError where it cannot be, or
        was interrupted."""
        if self._changing:
            raise UserError("another change is under way; try again when it has ended")
        self._changing = True
        try:
            await self._scale(wanted, say)
        finally:
            self._changing = False

    async def _scale(self, wanted: Scale, say: Say) -> None:
        plan = plan_scale(self._host.settings, self._slots, wanted, self._host.gpus)
        self._check([*plan.stays, *plan.joins])
        join_first = True
        try:
            self._check([*self._slots, *plan.joins])
        except UserError:
            join_first = False
        if plan.joins and join_first:
            await self._join(plan.joins, say)
        for slot in plan.leaves:
            await self._leave(slot, say)
        if plan.joins and not join_first:
            await self._join(plan.joins, say)
        say(f"there are {counted(self._slots)} workers")

    def _check(self, slots: list[WorkerSlot]) -> None:
        """Raises UserError unless the GPUs have room for all the workers."""
        settings = self._host.settings
        if self._host.device == "cuda":
            for index in sorted({index for slot in slots for index in slot.device_indices}):
                check_gpu_is_here(index, settings.device_memory)
            check_shared_gpus(worker_configs(settings, slots), settings.device_memory)

    # ------------------------------------------------------------ joining

    async def _join(self, slots: list[WorkerSlot], say: Say) -> None:
        host = self._host
        children = self._launcher.add(worker_specs(host.settings, slots, host.device, host.run_dir))
        self._slots += slots
        self._list(self._slots)
        say(f"starting {', '.join(slot.name for slot in slots)}")
        try:
            await self._until_ready(slots, children, say)
        except UserError:
            if not self._launcher.stopping.is_set():
                self._slots = [slot for slot in self._slots if slot not in slots]
                self._list(self._slots)
                for slot in slots:
                    await self._dismiss(slot)
            raise
        for child in children:
            child.on_trial = False

    async def _until_ready(self, slots: list[WorkerSlot], children: list[Child], say: Say) -> None:
        waits = dict(zip(worker_endpoints(slots, self._host.run_dir), slots, strict=True))
        while waits:
            for child in children:
                if child.given_up:
                    raise UserError(child.given_up)
            seen = await self._seen() or {}
            for endpoint in [one for one in waits if one in seen and seen[one].state == "ready"]:
                say(f"{waits.pop(endpoint).name} is ready")
            if waits:
                await self._pause()

    # ------------------------------------------------------------ leaving

    async def _leave(self, slot: WorkerSlot, say: Say) -> None:
        self._list([one for one in self._slots if one != slot])
        say(f"{slot.name} is leaving")
        (endpoint,) = worker_endpoints([slot], self._host.run_dir)
        end_s = time.monotonic() + self._grace_s[ChildKind.ROUTER]
        while (seen := await self._seen()) is None or endpoint in seen:
            if time.monotonic() > end_s:
                say(f"{slot.name} has not ended its requests in {self._grace_s[ChildKind.ROUTER]:.1f} s")
                break
            await self._pause()
        self._slots.remove(slot)
        await self._dismiss(slot)
        say(f"{slot.name} has left")

    async def _dismiss(self, slot: WorkerSlot) -> None:
        await self._launcher.dismiss([slot.name], self._grace_s[ChildKind.WORKER])
        await self._launcher.dismiss(slot.transfer_names, self._grace_s[ChildKind.TRANSFER])

    # ------------------------------------------------------------ the router

    def _list(self, slots: list[WorkerSlot]) -> None:
        run_directory.write_workers(self._host.run_dir, worker_endpoints(slots, self._host.run_dir))

    async def _seen(self) -> dict[str, SeenWorker] | None:
        return await asyncio.to_thread(seen_workers, self._host.welcome)

    async def _pause(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._launcher.stopping.wait(), _ASK_S)
        if self._launcher.stopping.is_set():
            raise UserError("the system is being stopped")
