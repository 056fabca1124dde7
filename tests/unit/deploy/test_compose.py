"""The compose files against the Compose Specification's own schema, and their commands against our parser."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from deploy.settings.options import RouterSettings, TransferSettings, WorkerSettings
from deploy.settings.planning import resolve_slot_bytes
from kvtransfer.protocol.layout import rank_slot_bytes
from tests.unit.deploy.commandline import parse

ROOT = Path(__file__).parents[3]
SCHEMA = json.loads((ROOT / "tests/data/compose-spec.json").read_text())
FILES = ("compose.yaml", "compose.cpu.yaml", "compose.tp.yaml")
DRAIN_S = 30
_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


class _Loader(yaml.SafeLoader):
    """YAML as Compose reads it: `!reset` clears a value."""


_Loader.add_constructor("!reset", lambda loader, node: {})


def load(name: str) -> dict[str, Any]:
    text = (ROOT / "deploy" / name).read_text()
    content: dict[str, Any] = yaml.load(_VARIABLE.sub(_filled, text), _Loader)
    return content


def _filled(match: re.Match[str]) -> str:
    return "/srv/model" if match.group(2) == "?" else match.group(3) or ""


def laid_over(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """The services after the overlay: the keys we use replace those below, mappings merge."""
    merged = {name: dict(service) for name, service in base["services"].items()}
    for name, service in over["services"].items():
        merged[name].update(service)
    return merged


@pytest.mark.parametrize("name", FILES)
def test_valid_compose(name: str) -> None:
    errors = [f"{list(e.path)}: {e.message}" for e in Draft7Validator(SCHEMA).iter_errors(load(name))]
    assert errors == []


def test_the_schema_refuses_a_wrong_file() -> None:
    broken = load("compose.yaml")
    broken["services"]["router"]["stop_grace"] = "45s"
    assert list(Draft7Validator(SCHEMA).iter_errors(broken))


def commands() -> list[tuple[str, str, list[str]]]:
    found = []
    for file in FILES:
        for name, service in load(file)["services"].items():
            if service.get("command"):
                found.append((file, name, service["command"]))
    return found


@pytest.mark.parametrize(("file", "name", "command"), commands())
def test_commands_parse(file: str, name: str, command: list[str]) -> None:
    settings = parse(command)
    if name == "router":
        assert isinstance(settings, RouterSettings)
        assert settings.host == "0.0.0.0"
        assert len(settings.worker) == 2
    elif "transfer" in name:
        assert isinstance(settings, TransferSettings)
        assert settings.device == ("cpu" if "cpu" in file else "cuda")
    else:
        assert isinstance(settings, WorkerSettings)
        assert settings.role == name
        assert settings.drain_timeout == DRAIN_S


@pytest.mark.parametrize("overlay", [None, "compose.cpu.yaml"])
def test_processes_find_each_other(overlay: str | None) -> None:
    base = load("compose.yaml")
    services = laid_over(base, load(overlay) if overlay else {"services": {}})
    router = parse(services["router"]["command"])
    for role, gpu in (("prefill", 0), ("decode", 1)):
        worker = parse(services[role]["command"])
        transfer = parse(services[f"{role}-transfer"]["command"])
        assert worker.listen in router.worker
        assert worker.transfer == (transfer.listen,)
        assert worker.device == transfer.device
        if overlay is None:
            assert worker.device_index == transfer.device_index == gpu
            assert services[f"{role}-transfer-rdma"]["command"] == services[f"{role}-transfer"]["command"]


def test_ranks_find_their_transfer_processes() -> None:
    services = load("compose.tp.yaml")["services"]
    worker = parse(services["decode"]["command"])
    transfers = [parse(services[name]["command"]) for name in ("decode-transfer", "decode-transfer-1")]
    assert worker.transfer == tuple(transfer.listen for transfer in transfers)
    assert len(worker.transfer) == worker.tp == 2
    assert [transfer.device_index for transfer in transfers] == [worker.device_index, worker.device_index + 1]
    slot_bytes = resolve_slot_bytes(None, "cuda")
    assert {transfer.staging_slot_bytes for transfer in transfers} == {rank_slot_bytes(slot_bytes, 2)}


def test_what_gpu_processes_need() -> None:
    services = load("compose.yaml")["services"]
    for name in ("prefill", "decode", "prefill-transfer", "decode-transfer"):
        service = services[name]
        assert service["ipc"] == service["pid"] == service["network_mode"] == "service:namespaces"
        assert service["ulimits"]["memlock"] == -1
        assert service["cap_add"] == ["IPC_LOCK"]
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "device_ids": ["0", "1"], "capabilities": ["gpu"]}
        assert "profiles" not in service
    for name in ("prefill-transfer-rdma", "decode-transfer-rdma"):
        assert services[name]["profiles"] == ["rdma"]
        assert services[name]["devices"] == ["/dev/infiniband:/dev/infiniband"]


def test_ports_health_and_grace() -> None:
    content = load("compose.yaml")
    for service in content["services"].values():
        assert int(service["stop_grace_period"].removesuffix("s")) > DRAIN_S
        assert service["healthcheck"]["test"][0] == "CMD"
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert "mode=0700" in content["volumes"]["sockets"]["driver_opts"]["o"]


def test_cpu_overlay_asks_for_no_gpu() -> None:
    services = laid_over(load("compose.yaml"), load("compose.cpu.yaml"))
    for name in ("prefill", "decode", "prefill-transfer", "decode-transfer"):
        assert not services[name]["deploy"]
        assert services[name]["build"]["dockerfile"] == "docker/Dockerfile.cpu"


def test_images_run_as_somebody_else_than_root() -> None:
    for name in ("Dockerfile.cpu", "Dockerfile.cuda"):
        lines = (ROOT / "docker" / name).read_text().splitlines()
        assert "USER baton" in lines
        bases = [line.split()[1] for line in lines if line.startswith("FROM")]
        named = {line.split()[3] for line in lines if line.startswith("FROM") and " AS " in line}
        for base in bases:
            assert base in named or re.fullmatch(r"[\w./-]+:[\w.-]*\d+\.\d+\.\d+[\w.-]*", base), base
