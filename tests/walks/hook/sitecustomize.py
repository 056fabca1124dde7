"""Notes which functions of the code base are called, while SIGUSR1 has it switched on.

Python imports this by itself in every process that has this folder on its path: `python -m tests.walks`
starts a whole system so. A process answers SIGUSR2 by writing its list to a file of `WALKS_DIRECTORY`.
"""

import os
import signal
import sys
import threading
from pathlib import Path

PACKAGES = ("router", "services", "kvtransfer", "deploy")


class Recorder:
    def __init__(self, tree: str, directory: Path) -> None:
        self.prefixes = tuple(f"{tree}/{package}/" for package in PACKAGES)
        self.cut = len(tree) + 1
        self.directory = directory
        self.codes: set[object] = set()

    def __call__(self, frame: object, event: str, argument: object) -> None:
        if event == "call":
            self.codes.add(frame.f_code)  # type: ignore[attr-defined]

    def start(self, number: int, frame: object) -> None:
        self.codes.clear()
        threading.setprofile_all_threads(self) if sys.version_info >= (3, 12) else sys.setprofile(self)

    def dump(self, number: int, frame: object) -> None:
        sys.setprofile(None)
        codes = [code for code in self.codes if code.co_filename.startswith(self.prefixes)]  # type: ignore[attr-defined]
        functions = sorted(f"{code.co_filename[self.cut :]} {code.co_qualname}" for code in codes)
        done = self.directory / f"{os.getpid()}.txt"
        part = done.with_suffix(".part")
        part.write_text("\n".join(functions))
        part.rename(done)


if "WALKS_DIRECTORY" in os.environ:
    recorder = Recorder(os.environ["WALKS_TREE"], Path(os.environ["WALKS_DIRECTORY"]))
    signal.signal(signal.SIGUSR1, recorder.start)
    signal.signal(signal.SIGUSR2, recorder.dump)
