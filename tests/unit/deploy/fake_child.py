"""Stands in for a process of the fleet: `fake_child.py BEHAVIOUR [ARGUMENTS]`."""

import http.server
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

LEDGER = {
    "device": "cpu",
    "device_bytes": 1000,
    "mem_fraction": 0.5,
    "entries": [
        {
            "process": "worker",
            "name": "weights",
            "inside": True,
            "planned_bytes": 400,
            "measured_bytes": 410,
            "note": "",
        }
    ],
    "budget_bytes": 500,
}


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = {"workers": [{"name": "fake-0", "role": "unified", "ledger": LEDGER}]}
        self.send_response(200 if self.path in ("/ready", "/memory") else 404)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def steady(name: str, log: str) -> None:
    """Lives until SIGTERM, which it writes down."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
    print(f"{name} is up", flush=True)
    ended.wait()
    with Path(log).open("a") as file:
        file.write(f"{name}\n")


def router(port: str, name: str, log: str) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(port)), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    steady(name, log)
    server.shutdown()
    server.server_close()


def stubborn() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("will not go", flush=True)
    threading.Event().wait()


def crash_once(marker: str, name: str, log: str) -> None:
    if not Path(marker).exists():
        Path(marker).touch()
        sys.exit(1)
    steady(name, log)


def refuse() -> None:
    print("baton: error: --port: no such port", file=sys.stderr)
    sys.exit(2)


def leave_a_child() -> None:
    """Ends at once; what it started does not."""
    subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"])
    sys.exit(1)


BEHAVIOURS = {
    "steady": steady,
    "router": router,
    "stubborn": stubborn,
    "crash-once": crash_once,
    "refuse": refuse,
    "leave-a-child": leave_a_child,
}

if __name__ == "__main__":
    BEHAVIOURS[sys.argv[1]](*sys.argv[2:])  # type: ignore[operator]
