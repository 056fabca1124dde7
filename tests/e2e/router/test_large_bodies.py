"""Bodies that are prepared beside the router's event loop, and what comes before a body, on a real router."""

import json
import os
import signal
import socket

import psutil

from services.protocol.messages import Prefill
from tests.e2e.router.harness import DEADLINE_S, Cluster, open_request, until

LARGE = {"prompt": "Hello " * 150, "user": "u" * 500, "unknown": "x" * 20_000, "max_tokens": 3}


def preparers(cluster: Cluster) -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process(cluster.router.process.pid).children()
    return found


def is_dead(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def outcome(cluster: Cluster, name: str) -> float:
    with cluster.router.http() as http:
        lines = http.get("/metrics").text.splitlines()
    found = [line for line in lines if line.startswith(f'baton_requests_total{{outcome="{name}"}}')]
    return float(found[0].split()[1]) if found else 0.0


def test_a_large_body_is_answered_like_a_small_one(cluster: Cluster) -> None:
    small = {name: value for name, value in LARGE.items() if name != "unknown"}
    with cluster.router.http() as http:
        answers = [http.post("/v1/completions", json=body).json() for body in (small, LARGE)]
        refused = http.post("/v1/completions", json={**LARGE, "temperature": 9})
    for answer in answers:
        answer.pop("id"), answer.pop("created")
    assert answers[0] == answers[1] and answers[0]["usage"]["prompt_tokens"] > 150
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "temperature"
    first, second = cluster.prefill.wait_for(Prefill, 2)
    assert first.work.prompt == second.work.prompt
    with cluster.router.http() as http:
        text = "Hello you " * 8000
        made = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
        assert made["count"] == len(made["tokens"]) and "".join(made["token_strs"]) == text
        tokens = http.post("/detokenize", json={"tokens": made["tokens"][:15_000]}).json()["prompt"]
        assert text.startswith(tokens) and len(tokens) > 10_000


def test_a_client_may_leave_while_its_body_is_prepared(cluster: Cluster) -> None:
    with cluster.router.http() as http:
        assert http.post("/v1/completions", json=LARGE).status_code == 200
    before = outcome(cluster, "disconnected")
    for process in preparers(cluster):
        process.suspend()
    try:
        leaving = [open_request(cluster.router, LARGE) for _ in range(3)]
        cluster.prefill.forget()
        with cluster.router.http() as http:
            assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 200
        for one in leaving:
            one.close()
        until(lambda: outcome(cluster, "disconnected") == before + 3, "three clients that left")
    finally:
        for process in preparers(cluster):
            process.resume()
    with cluster.router.http() as http:
        assert http.post("/v1/completions", json=LARGE).status_code == 200
    assert len(cluster.prefill.wait_for(Prefill, 2)) == 2, "nothing was computed for those who left"


def test_a_preparer_that_is_killed_is_replaced(cluster: Cluster) -> None:
    with cluster.router.http() as http:
        assert http.post("/v1/completions", json=LARGE).status_code == 200
        killed = preparers(cluster)
        for process in killed:
            os.kill(process.pid, signal.SIGKILL)
        until(lambda: all(is_dead(one) for one in killed), "they are dead")
        assert http.post("/v1/completions", json=LARGE).status_code == 200


def _connect(cluster: Cluster) -> socket.socket:
    host, port = cluster.router.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=DEADLINE_S)


def _until(connection: socket.socket, mark: bytes) -> bytes:
    got = b""
    while mark not in got:
        part = connection.recv(1 << 16)
        assert part, got
        got += part
    return got


def test_an_offer_to_upgrade_keeps_its_body(cluster: Cluster) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 3}).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    with _connect(cluster) as connection:
        for pieces in ([head + body], [head, body]):
            for piece in pieces:
                connection.sendall(piece)
                cluster.router.get("/version")  # the router has read it by then
            assert _until(connection, b'"cached_tokens"').startswith(b"HTTP/1.1 200 ")


def test_an_endless_head_is_cut_off(cluster: Cluster) -> None:
    with _connect(cluster) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx-a: " + b"y" * 100_000)
        got = _until(connection, b"}}")
        assert got.startswith(b"HTTP/1.1 431 ") and b'"code":"head_too_large"' in got
        assert connection.recv(1) == b""
