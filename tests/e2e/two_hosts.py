"""Two hosts in one machine: network namespaces joined by a cable (wire.py) that can be cut, slow and lossy.

The first host has the prefill worker, the second the decode worker and the router. They talk over TCP with
CURVE keys, and KV goes over TCP by NIXL. Whatever happens, processes and namespaces are gone afterwards.
"""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.e2e.cluster import READY_DEADLINE_S, Accounts, wait_until
from tests.e2e.wire import NAMESPACES, enter
from tests.patience import patient

DEVICE = "cable"
ADDRESSES = {"prefill": "10.77.0.1", "decode": "10.77.0.2"}
HTTP_PORT, WORKER_PORT, PEER_PORT = 8000, 7000, 7001
MTU_BYTES = 9000
BACK_OFF_S = 0.5
OWN_NAMESPACE = Path("/proc/self/ns/net")


class NoNamespaces(Exception):
    """This machine lets nobody make network namespaces and TAP devices; the message says what failed."""


def ip(*arguments: str) -> str:
    """Raises NoNamespaces."""
    try:
        return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as error:
        raise NoNamespaces("there is no `ip` command") from error
    except subprocess.CalledProcessError as error:
        raise NoNamespaces(f"ip {' '.join(arguments)}: {error.stderr.strip()}") from error


def sweep() -> None:
    """Removes the hosts of test runs that were killed, and what still runs on them."""
    for path in NAMESPACES.glob("baton-*-*"):
        if not psutil.pid_exists(int(path.name.split("-")[1])):
            for pid in ip("netns", "pids", path.name).split():
                psutil.Process(int(pid)).kill()
            ip("netns", "delete", path.name)


class Cable:
    """Between the two hosts."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._answered()

    def delay(self, seconds: float) -> None:
        """One way."""
        self._say(f"delay {seconds}")

    def loss(self, share: float) -> None:
        self._say(f"loss {share}")

    def cut(self) -> None:
        """Frames vanish. The hosts are not told, as with a switch between them."""
        self._say("cut")

    def join(self) -> None:
        self._say("join")

    def mend(self) -> None:
        self.join()
        self.delay(0.0)
        self.loss(0.0)

    def carried_bytes(self) -> int:
        """Of all frames that were delivered so far, both ways."""
        return int(self._say("count"))

    def _say(self, line: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._answered()

    def _answered(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise NoNamespaces(f"the cable ended with code {self._process.wait(patient(20))}")
        return answer


class TwoHosts(Accounts):
    """Use it as a context manager: inside, the calling thread and what it starts are on the second host.

    Raises NoNamespaces where that cannot be. The rest are flags of processes of that kind.
    """

    def __init__(
        self,
        model_dir: Path,
        directory: Path,
        *,
        transfer: tuple[str, ...] = (),
        worker: tuple[str, ...] = (),
        router: tuple[str, ...] = (),
        revives: bool = False,
    ) -> None:
        """`revives`: what dies is started again after `BACK_OFF_S`, as a service manager would."""
        super().__init__(f"http://127.0.0.1:{HTTP_PORT}")
        self.model_dir, self.directory = model_dir, directory
        self._flags = {"transfer": transfer, "worker": worker, "router": router}
        self._keys = directory / "keys"
        self._stack = ExitStack()
        self._revives, self._ending = revives, threading.Event()
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(self.http.close)
            sweep()
            names = {role: f"baton-{os.getpid()}-{role}" for role in ADDRESSES}
            self._names = names
            for role, name in names.items():
                ip("netns", "add", name)
                stack.callback(ip, "netns", "delete", name)
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "tuntap", "add", "dev", DEVICE, "mode", "tap")
                ip("-n", name, "address", "add", f"{ADDRESSES[role]}/24", "dev", DEVICE)
            self.cable = stack.enter_context(_cable(names["prefill"], names["decode"]))
            for name in names.values():
                ip("-n", name, "link", "set", DEVICE, "mtu", str(MTU_BYTES), "up")
            stack.enter_context(_inside(names["decode"]))
            stack.callback(self._end)
            baton = [sys.executable, "-m", "deploy"]
            subprocess.run([*baton, "keys", str(self._keys)], check=True, capture_output=True)
            for role in ADDRESSES:
                (self.directory / role).mkdir(mode=0o700)
                self.start(f"{role}-transfer")
            for name in (*ADDRESSES, "router"):
                self.start(name)
            if self._revives:
                stack.enter_context(self._reviving())
            wait_until("both hosts serve", self.is_ready, READY_DEADLINE_S)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            print("\n".join(self.log_lines()))
        self._stack.close()

    def start(self, name: str) -> None:
        """The process of that name: `prefill`, `decode-transfer`, `router` and the like."""
        role = "decode" if name == "router" else name.split("-")[0]
        command = ["ip", "netns", "exec", self._names[role], sys.executable, "-m", "deploy"]
        kept = {key: value for key, value in os.environ.items() if not key.startswith("BATON_")}
        # Namespaces hide nothing but the network: without this, KV would go through shared memory.
        kept |= {"OMP_NUM_THREADS": "1", "UCX_TLS": "tcp,self", "UCX_NET_DEVICES": DEVICE}
        with (self.directory / f"{name}.log").open("ab") as log:
            self._started[name] = subprocess.Popen(
                [*command, *self._arguments(name, role)], stdout=log, stderr=subprocess.STDOUT, env=kept
            )

    def unplug(self, role: str) -> None:
        """The host knows that its device is down: it can reach nobody, and says so to who tries."""
        ip("-n", self._names[role], "link", "set", DEVICE, "down")

    def plug(self, role: str) -> None:
        ip("-n", self._names[role], "link", "set", DEVICE, "up")

    def processes(self) -> list[psutil.Process]:
        """Those that run."""
        found = []
        for process in list(self._started.values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(process.pid))
        return found

    def log_lines(self) -> list[str]:
        logs = {name: self.directory / f"{name}.log" for name in self._started}
        return [
            f"[{name}] {line}"
            for name, path in logs.items()
            for line in path.read_text(errors="replace").splitlines()
        ]

    def stop(self) -> None:
        """SIGTERM to all, each of which must then end well."""
        self._ending.set()
        self._end()
        codes = {name: process.returncode for name, process in self._started.items()}
        assert set(codes.values()) == {0}, f"exit codes {codes}"

    @contextmanager
    def _reviving(self) -> Iterator[None]:
        watching = threading.Thread(target=self._revive, daemon=True)
        watching.start()
        try:
            yield
        finally:
            self._ending.set()
            watching.join()

    def _revive(self) -> None:
        while not self._ending.wait(BACK_OFF_S):
            for name, process in list(self._started.items()):
                if process.poll() is not None:
                    self.start(name)

    def _arguments(self, name: str, role: str) -> list[str]:
        sockets, address = self.directory / role, ADDRESSES[role]
        if name == "router":
            workers = [f"--worker=tcp://{one}:{WORKER_PORT}" for one in ADDRESSES.values()]
            named = ["--port", str(HTTP_PORT), "--served-model-name", "tiny", "--key-dir", str(self._keys)]
            return ["router", str(self.model_dir), *workers, *named, *self._flags["router"]]
        common = ["--name", name, "--device", "cpu", "--key-dir", str(self._keys)]
        if name.endswith("-transfer"):
            listen = ["--listen", f"ipc://{sockets}/t", "--staging-socket", f"{sockets}/s"]
            peers = ["--peer-listen", f"tcp://{address}:{PEER_PORT}", "--checksum"]
            return ["transfer", *common, *listen, *peers, *self._flags["transfer"]]
        listen = ["--listen", f"tcp://{address}:{WORKER_PORT}", "--transfer", f"ipc://{sockets}/t"]
        memory = ["--dtype", "float32", "--mem-fraction", "0.1"]
        model = [str(self.model_dir), "--role", role]
        return ["worker", *model, *common, *listen, *memory, *self._flags["worker"]]

    def _end(self) -> None:
        """The router first, which waits for what runs."""
        for name in sorted(self._started, key=lambda name: name != "router"):
            process = self._started[name]
            process.terminate()
            try:
                process.wait(patient(20))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(patient(20))


@contextmanager
def _cable(first: str, second: str) -> Iterator[Cable]:
    command = [sys.executable, "-m", "tests.e2e.wire", first, second, DEVICE, "1"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Cable(process)
    finally:
        process.kill()
        process.communicate()


@contextmanager
def _inside(namespace: str) -> Iterator[None]:
    outside = Path(f"/proc/self/fd/{os.open(OWN_NAMESPACE, os.O_RDONLY)}")
    enter(NAMESPACES / namespace)
    try:
        yield
    finally:
        enter(outside)
        os.close(int(outside.name))
