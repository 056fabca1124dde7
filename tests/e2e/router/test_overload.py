"""More than can be served: refused early, and nobody waits for somebody who does not read."""

import json
import socket
from pathlib import Path

import pytest

from services.protocol.messages import Cancel, Prefill, StartDecode
from tests.e2e.router.harness import DEADLINE_S, Cluster, Router, open_request, small_cluster, until
from tests.fake_worker import Script
from tests.patience import patient

LONG = [39] * 1000


def unread_stream(router: Router, max_tokens: int) -> socket.socket:
    """A client with room for very little, which has asked for much more and reads nothing."""
    host, port = router.url.removeprefix("http://").split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(DEADLINE_S)
    client.connect((host, int(port)))
    body = json.dumps({"prompt": "a", "stream": True, "n": 8, "max_tokens": max_tokens}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client


def test_a_slow_reader_delays_nobody_and_gets_everything(cluster: Cluster) -> None:
    cluster.use(Script(answers=[LONG]))
    with unread_stream(cluster.router, 900) as slow:
        cluster.decode.wait_for(StartDecode)
        for _ in range(3):
            answer = cluster.router.client().completions.create(model="tiny", prompt="b", max_tokens=5)
            assert answer.choices[0].finish_reason == "length"
        received = b""
        while b"[DONE]" not in received:
            part = slow.recv(1 << 16)
            assert part, received[-500:]
            received += part
    assert received.count(b'"finish_reason":"length"') == 8
    assert len(received) > 1 << 19, "more than the buffers on the way hold"


def test_who_does_not_read_is_cut_off_and_who_would_wait_too_long_is_refused(
    model_dir: Path, tmp_path: Path
) -> None:
    with small_cluster(model_dir, tmp_path, stall_timeout_s=1.0, ttft_slo_s=1e-6) as cluster:
        cluster.use(Script(answers=[LONG], decode_limit=900))
        with unread_stream(cluster.router, 1000):
            cluster.decode.wait_for(StartDecode)
            until(lambda: cluster.decode.of(Cancel), "the workers are told")
            until(cluster.router.at_rest, "a router at rest")
        # That stream taught the router what a prompt takes. One that comes alone is taken all the same.
        cluster.use(Script(hold_prefill=True))
        waiting = open_request(cluster.router, {"prompt": "a"})
        cluster.prefill.wait_for(Prefill, 2)
        with cluster.router.http() as http:
            refused = http.post("/v1/completions", json={"prompt": "b"})
        assert refused.status_code == 429
        assert "the first token would take about" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) >= 1
        assert len(cluster.prefill.of(Prefill)) == 2
        waiting.close()
        until(cluster.router.at_rest, "a router at rest")


def test_pages_and_open_requests_are_bounded(model_dir: Path, tmp_path: Path) -> None:
    with small_cluster(model_dir, tmp_path, max_kv_load=0.01, max_running=3) as cluster:
        cluster.use(Script(hold_prefill=True))
        waiting = open_request(cluster.router, {"prompt": [5] * 30})
        cluster.prefill.wait_for(Prefill)
        host, port = cluster.router.url.removeprefix("http://").split(":")
        with cluster.router.http() as http:
            refused = http.post("/v1/completions", json={"prompt": [5] * 30})
            assert refused.status_code == 429
            assert "would fill the KV cache" in refused.json()["error"]["message"]
            unfinished = [socket.create_connection((host, int(port))) for _ in range(2)]
            for one in unfinished:
                one.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{")

            def refusal() -> str:
                # One that comes before those two are read is refused for what it says, and does not wait.
                answer = http.post("/v1/completions", json={"prompt": []})
                if answer.status_code == 400:
                    return ""
                assert answer.status_code == 429 and "retry-after" in answer.headers
                return str(answer.json()["error"]["message"])

            until(lambda: "3 requests are open" in refusal(), "bodies that do not end count")
            assert http.get("/health").status_code == 200
            for one in unfinished:
                one.close()
        waiting.close()
        until(cluster.router.at_rest, "a router at rest")
        cluster.use(Script())

        def served() -> bool:
            with cluster.router.http() as http:
                return http.post("/v1/completions", json={"prompt": [5], "max_tokens": 1}).status_code == 200

        until(served, "room again")


def test_who_sends_too_slowly_is_cut_off(model_dir: Path, tmp_path: Path) -> None:
    """A body, a head, and nothing at all that do not come to their end; a second request on one connection;
    and a body that nobody waits for. A request that is answered meanwhile is not touched."""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n"
    unknown = head.replace(b"/v1/completions", b"/nowhere")
    whole = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    limits = {"upload_timeout_s": patient(0.5), "keep_alive_timeout_s": patient(0.5)}
    with small_cluster(model_dir, tmp_path, **limits) as cluster:
        cluster.use(Script(hold_prefill=True))
        waiting = open_request(cluster.router, {"prompt": "a"})
        cluster.prefill.wait_for(Prefill)
        host, port = cluster.router.url.removeprefix("http://").split(":")
        sent = {"body": head + b"{", "head": head[:30], "none": b"", "second": whole + head[:30]}
        sent["unread"] = unknown + b"{"
        clients = {}
        for name, data in sent.items():
            clients[name] = socket.create_connection((host, int(port)), timeout=DEADLINE_S)
            clients[name].sendall(data)
        got = {name: _to_end(one) for name, one in clients.items()}
        assert got["none"] == b""
        for name in ("body", "head", "second"):
            assert b"HTTP/1.1 408 " in got[name] and b'"code":"upload_too_slow"' in got[name], got[name]
            assert b"connection: close" in got[name]
        assert got["second"].startswith(b"HTTP/1.1 200 ")
        assert got["unread"].startswith(b"HTTP/1.1 404 ") and b" 408 " not in got["unread"]
        waiting.settimeout(0.0)
        with pytest.raises(BlockingIOError):
            waiting.recv(1)
        waiting.close()
        until(cluster.router.at_rest, "a router at rest")


def _to_end(connection: socket.socket) -> bytes:
    with connection:
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))
