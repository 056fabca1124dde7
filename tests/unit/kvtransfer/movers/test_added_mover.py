"""A mover is one file: with `added/memcpy.py` beside the others, every place that names movers knows it."""

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvtransfer import movers
from kvtransfer.config import TransferConfig
from kvtransfer.errors import MoverError, MoverUnavailable
from kvtransfer.movers.choice import choose_mover
from kvtransfer.movers.registry import mover_choices, registered_movers
from kvtransfer.movers.spec import HostFacts
from kvtransfer.process import TransferProcess
from services.memory.estimate import contexts, transfer_context_bytes
from tests.e2e.transfer_pair import SLOT_BYTES, SLOTS, Worker, content_of, drive
from tests.patience import patient

ADDED = Path(__file__).parent / "added"
SHIPPED = ["cuda_ipc", "nixl", "nccl"]
HELP = """
import sys
from kvtransfer import movers
movers.__path__.append(sys.argv.pop(1))
from deploy.cli import main
main()
"""


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file lies in the movers' folder."""
    monkeypatch.setattr(movers, "__path__", [*movers.__path__, str(ADDED)])


def config(directory: Path, name: str, mover: str = "memcpy") -> TransferConfig:
    return TransferConfig(
        name=name,
        listen=f"ipc://{directory}/{name}.worker",
        peer_listen=f"ipc://{directory}/{name}.peers",
        staging_socket=directory / f"{name}.staging",
        slots=SLOTS,
        slot_bytes=SLOT_BYTES,
        mover=mover,
    )


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="baton-") as directory:
        yield Path(directory)


def test_without_the_file_nobody_knows_it(directory: Path) -> None:
    assert [mover.name for mover in registered_movers()] == SHIPPED
    with pytest.raises(MoverUnavailable, match="--mover memcpy: not known"):
        TransferProcess(config(directory, "a"))


@pytest.mark.usefixtures("added")
def test_it_is_chosen_by_name_and_by_preference() -> None:
    here = HostFacts("cpu", same_host=True)
    for wanted in ("memcpy", "auto"):
        assert choose_mover(wanted, here, registered_movers()).mover.name == "memcpy"
    away = choose_mover("auto", replace(here, device="cuda"), registered_movers())
    assert away.mover.name == "cuda_ipc" and away.warning == "not memcpy: it copies host memory"
    with pytest.raises(MoverUnavailable, match="here would work: --mover memcpy, --mover nixl"):
        choose_mover("nccl", here, registered_movers())


@pytest.mark.usefixtures("added")
def test_the_ledger_counts_what_it_costs() -> None:
    bare_bytes = contexts("cpu").transfer_bytes
    assert transfer_context_bytes("cpu", "memcpy") == bare_bytes + (3 << 20)
    assert transfer_context_bytes("cpu", "nixl") == bare_bytes


def test_nccl_costs_a_gibibyte_and_the_others_a_bare_context() -> None:
    assert transfer_context_bytes("cuda", "nccl") == 1 << 30
    bare_bytes = contexts("cuda").transfer_bytes
    assert transfer_context_bytes("cuda", "cuda_ipc") == transfer_context_bytes("cuda", "nixl") == bare_bytes


@pytest.mark.parametrize(
    ("arguments", "stream", "words"),
    [
        (["transfer", "--help"], "stdout", "auto, memcpy, cuda_ipc, nixl, nccl"),
        (
            ["serve", "MODEL", "--mover", "pigeon"],
            "stderr",
            "--mover: 'pigeon' is not one of auto, memcpy, cuda_ipc, nixl, nccl",
        ),
    ],
)
def test_the_command_line_offers_it(arguments: list[str], stream: str, words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP, str(ADDED), *arguments],
        capture_output=True,
        text=True,
        timeout=patient(60),
        check=False,
    )
    shown = " ".join(getattr(done, stream).replace("│", " ").split())
    assert words in shown, done


@pytest.mark.usefixtures("added")
def test_two_transfer_processes_move_kv_by_it(directory: Path) -> None:
    processes = [TransferProcess(config(directory, name)) for name in ("prefill", "decode")]
    stop = threading.Event()

    def serve() -> None:
        while not stop.wait(0.001):
            for process in processes:
                process.step(time.monotonic())

    server = threading.Thread(target=serve)
    server.start()
    try:
        prefill, decode = Worker(directory, "prefill", 11), Worker(directory, "decode", 12)
        assert prefill.client.attached.mover == decode.client.attached.mover == "memcpy"
        content = content_of(100, seed=1)
        decode.receive(1, prefill, 100)
        prefill.send(1, content)
        drive([prefill, decode], lambda: 1 in prefill.committed, "the commit")
        assert decode.got[1] == content
        prefill.client.close()
        decode.client.close()
    finally:
        stop.set()
        server.join()
        for process in processes:
            process.close()


@pytest.mark.usefixtures("added")
def test_a_name_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (("second", "memcpy"), ("automatic", "auto")):
        folder = tmp_path / module
        folder.mkdir()
        (folder / f"{module}.py").write_text(
            "from kvtransfer.movers.spec import MoverSpec\n"
            f"MOVER = MoverSpec(name={name!r}, preference=0, build=print)\n"
        )
        with monkeypatch.context() as patched:
            patched.setattr(movers, "__path__", [*movers.__path__, str(folder)])
            with pytest.raises(MoverError, match=f"{name}, which is taken"):
                mover_choices()


def test_asking_for_names_loads_no_library_that_moves() -> None:
    program = (
        "import sys\nfrom kvtransfer.movers.registry import mover_choices\nmover_choices()\n"
        "print([name for name in ('torch', 'nixl_cu13', 'cuda', 'zmq') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=patient(60), check=True
    )
    assert done.stdout.strip() == "[]"
