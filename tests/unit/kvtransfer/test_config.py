"""Bad settings are named; two processes that do not fit give the reason; a death is distinguished from a
silence."""

import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvtransfer.config import TransferConfig
from kvtransfer.errors import MoverUnavailable, TransferConfigError
from kvtransfer.messages import KvGeometry
from kvtransfer.movers.nixl import prepare_environment
from kvtransfer.movers.select import select_mover
from kvtransfer.peers.handshake import PEER_VERSION, mismatch
from kvtransfer.peers.probe import IncarnationProbe
from kvtransfer.protocol.peer_messages import PeerHello
from tests.ports import free_port

CONFIG = TransferConfig(name="t", listen="ipc:///d/w", peer_listen="ipc:///d/p", staging_socket=Path("/d/s"))
GEOMETRY = KvGeometry("m", 4, 2, 8, "float32")
HELLO = PeerHello(PEER_VERSION, 1, None, "nixl/cpu", GEOMETRY, 16, 4096, "a", b"", 0, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("slots", 1),
        ("slots", 1 << 20),
        ("slot_bytes", 0),
        ("slot_bytes", 1000),
        ("staging_socket", None),
        ("share", 0.0),
        ("share", 1.5),
        ("transfer_timeout_s", 0.0),
        ("transfer_timeout_s", float("nan")),
        ("peer_timeout_s", -1.0),
        ("heartbeat_s", 3.0),
    ],
)
def test_bad_settings_are_named(field: str, value: Any) -> None:
    with pytest.raises(TransferConfigError, match=field):
        replace(CONFIG, **{field: value})


def test_binding_every_interface_needs_an_address_to_tell_peers() -> None:
    with pytest.raises(TransferConfigError, match="advertise"):
        replace(CONFIG, peer_listen="tcp://*:7000")


def test_an_unknown_mover_names_the_flag() -> None:
    with pytest.raises(MoverUnavailable, match="--mover carrier-pigeon"):
        select_mover(replace(CONFIG, mover="carrier-pigeon"), "a", None, None)


def test_the_users_transports_are_left_alone() -> None:
    environment = {"UCX_TLS": "rc"}
    prepare_environment(environment, same_host=True)
    assert environment == {"UCX_TLS": "rc", "UCX_NET_DEVICES": "lo"}
    environment = {}
    prepare_environment(environment, same_host=False)
    assert environment == {}


@pytest.mark.parametrize(
    ("field", "theirs"),
    [
        ("version", {"version": "baton-kv/0"}),
        ("model_digest", {"geometry": msgspec.structs.replace(GEOMETRY, model_digest="other")}),
        ("layers", {"geometry": msgspec.structs.replace(GEOMETRY, layers=5)}),
        ("kv_heads", {"geometry": msgspec.structs.replace(GEOMETRY, kv_heads=1)}),
        ("head_dim", {"geometry": msgspec.structs.replace(GEOMETRY, head_dim=9)}),
        ("dtype", {"geometry": msgspec.structs.replace(GEOMETRY, dtype="float16")}),
        ("dtype", {"geometry": msgspec.structs.replace(GEOMETRY, dtype="float8_e4m3fn")}),
        ("mover", {"mover": "nixl/cuda"}),
    ],
)
def test_what_does_not_fit_is_named(field: str, theirs: dict[str, Any]) -> None:
    reason = mismatch(HELLO, msgspec.structs.replace(HELLO, epoch=2, **theirs))
    assert reason is not None and reason.startswith(f"{field} differs")


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        ((0, 1), (1, 2), None),
        ((1, 2), (0, 1), None),
        ((1, 2), (1, 2), None),
        ((0, 2), (1, 2), "rank: 0 of 2 here and 1 of 2 there share no head"),
        ((0, 1), (0, 4), "tp: 1 here and 4 there do not both divide 2 KV heads"),
    ],
)
def test_ranks_that_share_heads_fit(ours: tuple[int, int], theirs: tuple[int, int], says: str | None) -> None:
    here = msgspec.structs.replace(HELLO, rank=ours[0], tp=ours[1])
    there = msgspec.structs.replace(HELLO, epoch=2, rank=theirs[0], tp=theirs[1], slot_bytes=2048)
    assert mismatch(here, there) == says


def test_fitting_peers_and_oneself() -> None:
    assert mismatch(HELLO, msgspec.structs.replace(HELLO, epoch=2, slots=3)) is None
    assert mismatch(HELLO, HELLO) is not None


def asked(probe: IncarnationProbe) -> bool:
    """Twice: over TCP the first call only starts to ask."""
    return probe.proves_death() or probe.proves_death()


def test_silence_is_no_death_a_refused_connection_is() -> None:
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listener:
        path = f"{directory}/s"
        probe = IncarnationProbe(f"ipc://{path}")
        assert asked(probe)  # Nothing there at all.
        listener.bind(path)
        listener.listen(1)
        assert not asked(probe)
        listener.close()
        assert asked(probe)
        probe.close()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        probe = IncarnationProbe(f"tcp://127.0.0.1:{listener.getsockname()[1]}#key")
        assert not asked(probe)
        listener.close()
        probe = IncarnationProbe(probe_endpoint := f"tcp://127.0.0.1:{free_port()}")
        assert asked(probe), probe_endpoint
        assert not asked(IncarnationProbe("tcp://some.name:7000"))  # Looking a name up could block.
        probe.close()


def test_the_pure_modules_need_neither_sockets_nor_tensors() -> None:
    program = (
        "import sys, kvtransfer.protocol.machine, kvtransfer.peers.handshake, kvtransfer.movers.loopback\n"
        "bad = {'torch', 'zmq', 'nixl_cu13', 'services', 'router'} & set(sys.modules)\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    assert done.returncode == 0
