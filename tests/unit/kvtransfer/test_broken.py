"""A transfer process whose device has failed ends at once, without asking the driver anything more."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.patience import patient

ROOT = Path(__file__).parents[3]
PROGRAM = """
import sys
from pathlib import Path
from kvtransfer import process
from kvtransfer.config import TransferConfig
from kvtransfer.errors import MoverBroken

class Broken(process.TransferProcess):
    def serve(self):
        raise MoverBroken("copies do not end")
    def close(self):
        print("the driver is asked to let go", flush=True)

process.TransferProcess = Broken
directory = Path(sys.argv[1])
process.run(TransferConfig(
    name="t", listen=f"ipc://{directory}/w", peer_listen=f"ipc://{directory}/p",
    staging_socket=directory / "s", slots=2, slot_bytes=4096,
))
print("went on", flush=True)
"""


def test_it_ends_without_an_orderly_shutdown() -> None:
    with tempfile.TemporaryDirectory(prefix="baton-") as directory:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, directory],
            env=environment,
            capture_output=True,
            text=True,
            timeout=patient(60),
            check=False,
        )
    assert (done.returncode, done.stdout) == (1, "")
    assert "t ends: copies do not end" in done.stderr
