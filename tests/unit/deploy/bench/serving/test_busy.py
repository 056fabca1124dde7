"""What a router says of its workers' time, and what is made of it; other servers say nothing."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from deploy.bench.load.target import target_of
from deploy.bench.serving.busy import WorkerTime, busy_shares, worker_times


def at(role: str, busy_s: float, uptime_s: float, pid: int = 1) -> WorkerTime:
    return WorkerTime(role, pid, busy_s, uptime_s)


def test_a_roles_share_is_the_mean_of_its_workers() -> None:
    before = {"p0": at("prefill", 1, 10), "d0": at("decode", 5, 10), "d1": at("decode", 0, 100)}
    after = {"d0": at("decode", 9, 18), "d1": at("decode", 2, 108), "p0": at("prefill", 3, 18)}
    assert busy_shares(before, after) == {"prefill": pytest.approx(0.25), "decode": pytest.approx(0.375)}
    assert list(busy_shares(before, after)) == ["prefill", "decode"]


def test_who_came_went_or_began_anew_does_not_count() -> None:
    before = {"gone": at("decode", 1, 10), "reborn": at("decode", 90, 100), "still": at("prefill", 1, 10)}
    after = {"new": at("decode", 1, 2), "reborn": at("decode", 1, 2, pid=2), "still": at("prefill", 1, 10)}
    assert busy_shares(before, after) == {}


@contextmanager
def answering(body: bytes, path: str = "/cluster") -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.path == path and self.headers.get("Authorization") == "Bearer key"
            self.send_response(200 if wanted else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_times_are_read_from_a_routers_account() -> None:
    counters = {"busy_seconds": 3.5, "uptime_seconds": 60.0, "steps": 4}
    status = {"name": "decode-0", "role": "decode", "pid": 77, "counters": counters}
    body = json.dumps({"workers": [{"status": None}, {"status": status}]}).encode()
    with answering(body) as url:
        assert worker_times(target_of(url, "key")) == {"decode-0": at("decode", 3.5, 60.0, pid=77)}
        assert worker_times(target_of(url, None)) == {}, "refused"


@pytest.mark.parametrize("body", [b"", b"[]", b'{"workers": 1}', b'{"workers": [{"status": {"name": 1}}]}'])
def test_another_server_tells_nothing(body: bytes) -> None:
    with answering(body) as url:
        assert worker_times(target_of(url, "key")) == {}
