"""Where a launched system answers, whether it does, and a request to try."""

import http.client
import json
import shlex
import socket
import urllib.error
import urllib.request
from dataclasses import dataclass, field

from deploy.errors import UserError

_TIMEOUT_S = 2.0
_EVERYWHERE = ("0.0.0.0", "::", "")


@dataclass(frozen=True, slots=True)
class Welcome:
    host: str
    port: int
    model_name: str
    api_key: str | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """The router's address, as seen from this host."""
        host = "127.0.0.1" if self.host in _EVERYWHERE else self.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def text(self) -> str:
        """What the user sees at the start: the address and a request that works as it stands.

        A key is not shown but named, wherever it came from. The note has a line of its own: not every shell
        takes a comment at a command's end.
        """
        note, key = "", ""
        if self.api_key is not None:
            note, key = "# BATON_API_KEY: your key\n", ' -H "Authorization: Bearer $BATON_API_KEY"'
        url = shlex.quote(f"{self.url}/v1/chat/completions")
        messages = [{"role": "user", "content": "Hello!"}]
        body = shlex.quote(json.dumps({"model": self.model_name, "messages": messages}))
        return (
            f"serving {self.model_name} at {self.url}\n{note}"
            f"try: curl {url} -H 'Content-Type: application/json'{key} -d {body}"
        )


def is_ready(welcome: Welcome) -> bool:
    """Whether `/ready` answers 200."""
    request = urllib.request.Request(f"{welcome.url}/ready")
    if welcome.api_key is not None:
        request.add_header("Authorization", f"Bearer {welcome.api_key}")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False


@dataclass(frozen=True, slots=True)
class SeenWorker:
    """A worker as the router sees it. `state` is its own word; None while it has said nothing."""

    state: str | None
    leaving: bool


def seen_workers(welcome: Welcome) -> dict[str, SeenWorker] | None:
    """The router's workers by endpoint. None: the router does not answer."""
    request = urllib.request.Request(f"{welcome.url}/cluster")
    if welcome.api_key is not None:
        request.add_header("Authorization", f"Bearer {welcome.api_key}")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            workers = json.load(answer)["workers"]
        return {
            one["endpoint"]: SeenWorker((one["status"] or {}).get("state"), one["leaving"]) for one in workers
        }
    except (OSError, ValueError, LookupError, http.client.HTTPException):
        return None


def claim_port(host: str, port: int) -> int:
    """`port`, or a free one for 0. Raises UserError if it cannot be listened on."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"--host: {host!r} cannot be resolved: {error.strerror}") from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise UserError(f"--port: cannot listen on {host}:{port}: {error.strerror}") from None
        return int(probe.getsockname()[1])
