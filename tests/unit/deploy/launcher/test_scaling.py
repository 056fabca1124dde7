"""Orders for more and fewer workers: who is started and ended, in which order, and what is taken back."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.errors import UserError
from deploy.launcher import run_directory, scaling
from deploy.launcher.children import ChildSpec, worker_endpoints, worker_slots
from deploy.launcher.launcher import Child
from deploy.launcher.readiness import SeenWorker, Welcome
from deploy.launcher.scale_plan import Scale
from deploy.launcher.scaling import Host, Scaling
from deploy.settings.options import ServeSettings
from tests.patience import patient

DEADLINE_S = patient(30.0)


class System:
    """A launcher whose workers are ready, or gone, as soon as the router can know."""

    def __init__(self, run_dir: Path, gpus: int, **settings: Any) -> None:
        device: Any = "cuda" if gpus else "cpu"
        self.settings = ServeSettings(model_dir=Path("/srv/m"), device=device, **settings)
        self.run_dir = run_dir
        self.stopping = asyncio.Event()
        self.done: list[str] = []
        self.told: list[str] = []
        self.refuses: set[str] = set()
        self.holds: set[str] = set()
        """Workers that the router does not part with."""
        slots = worker_slots(self.settings, gpus)
        self.list_at_start = worker_endpoints(slots, run_dir)
        run_directory.write_workers(run_dir, self.list_at_start)
        host = Host(self.settings, device, gpus, run_dir, Welcome("127.0.0.1", 1, "m"))
        self.scaling = Scaling(self, host, slots)  # type: ignore[arg-type]

    # -- the launcher

    def add(self, specs: list[ChildSpec]) -> list[Child]:
        self.done.append("+ " + " ".join(spec.name for spec in specs))
        children = [Child(spec, 0, on_trial=True) for spec in specs]
        for child in children:
            if child.spec.name in self.refuses:
                child.given_up = f"{child.spec.name} refused its configuration: no"
        return children

    async def dismiss(self, names: list[str], grace_s: float) -> None:
        self.done.append("- " + " ".join(names))

    # -- the router

    def listed(self) -> list[str]:
        return (self.run_dir / "workers").read_text().split()

    def seen(self, welcome: Welcome) -> dict[str, SeenWorker]:
        held = {f"ipc://{self.run_dir}/{name}" for name in self.holds}
        return {one: SeenWorker("ready", False) for one in {*self.listed(), *held}}

    async def order(self, *counts: int | None) -> None:
        await asyncio.wait_for(self.scaling.scale(Scale(*counts), self.told.append), DEADLINE_S)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., System]:
    monkeypatch.setattr(scaling, "check_gpu_is_here", lambda index, memory: None)

    def build(gpus: int = 0, **settings: Any) -> System:
        system = System(tmp_path, gpus, **settings)
        monkeypatch.setattr(scaling, "seen_workers", system.seen)
        return system

    return build


def test_new_ones_start_and_the_highest_leave(make: Callable[..., System]) -> None:
    system = make()
    asyncio.run(system.order(2, 2))
    assert system.done == ["+ prefill-1-transfer decode-1-transfer prefill-1 decode-1"]
    assert [one.rpartition("/")[2] for one in system.listed()] == [
        "prefill-0",
        "decode-0",
        "prefill-1",
        "decode-1",
    ]
    assert system.told[-1] == "there are 2 prefill, 2 decode workers"
    system.done.clear()
    asyncio.run(system.order(1, None))
    assert system.done == ["- prefill-1", "- prefill-1-transfer"]
    assert "prefill-1" not in " ".join(system.listed())
    asyncio.run(system.order(1, 2))
    assert system.told[-1] == "there are 1 prefill, 2 decode workers"
    assert len(system.done) == 2, "nothing was to be changed"


def test_what_does_not_fit_a_gpu_is_refused_before_anything_starts(make: Callable[..., System]) -> None:
    system = make(gpus=1, mem_fraction=0.3, device_memory=141 << 30)
    with pytest.raises(UserError) as caught:
        asyncio.run(system.order(3, 1))
    assert "prefill-0, decode-0, prefill-1, prefill-2 share GPU 0 and together take" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert system.done == []
    assert system.listed() == system.list_at_start


def test_where_both_do_not_fit_the_leaving_ones_go_first(make: Callable[..., System]) -> None:
    memory = {"mem_fraction": 0.3, "device_memory": 141 << 30}
    system = make(gpus=1, prefill=2, decode=1, **memory)
    asyncio.run(system.order(1, 2))
    assert [one[0] for one in system.done] == ["-", "-", "+"]
    roomy = make(gpus=2, prefill=2, decode=1, **memory)
    asyncio.run(roomy.order(1, 2))
    assert [one[0] for one in roomy.done] == ["+", "-", "-"]


def test_one_that_cannot_live_is_taken_back_with_what_joined_beside_it(make: Callable[..., System]) -> None:
    system = make()
    system.refuses = {"decode-1"}
    with pytest.raises(UserError, match="decode-1 refused its configuration: no"):
        asyncio.run(system.order(2, 2))
    assert system.done[1:] == ["- prefill-1", "- prefill-1-transfer", "- decode-1", "- decode-1-transfer"]
    assert system.listed() == system.list_at_start
    system.refuses.clear()
    asyncio.run(system.order(1, 2))
    assert system.told[-1] == "there are 1 prefill, 2 decode workers"


def test_a_worker_that_does_not_get_free_is_ended_when_its_time_is_over(make: Callable[..., System]) -> None:
    system = make(decode=2, drain_timeout=0.0)
    system.holds = {"decode-1"}
    asyncio.run(system.order(1, 1))
    assert "decode-1 has not ended its requests in 2.0 s" in system.told
    assert system.done == ["- decode-1", "- decode-1-transfer"]


def test_a_second_order_and_one_at_the_end_are_refused(make: Callable[..., System]) -> None:
    system = make(decode=2)
    system.holds = {"decode-1"}

    async def both() -> None:
        first = asyncio.create_task(system.order(1, 1))
        while not system.told:  # noqa: ASYNC110  (the other order's first word)
            await asyncio.sleep(0)
        with pytest.raises(UserError, match="another change is under way"):
            await system.order(1, 3)
        system.stopping.set()
        with pytest.raises(UserError, match="the system is being stopped"):
            await first

    asyncio.run(both())
    assert system.done == []
