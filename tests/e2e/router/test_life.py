"""Workers that come and go, keys, deadlines, overload, draining: each with a cluster of its own."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import openai
import pytest

from services.protocol.messages import Cancel, Generate, Prefill, StartDecode
from tests.e2e.router.harness import DEADLINE_S, START, open_request, running_router, small_cluster, until
from tests.fake_worker import FakeWorker, Script
from tests.patience import patient


@pytest.mark.parametrize("how", ["connection closed", "silent"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_waits_for_its_lost_worker_to_come_back(
    model_dir: Path, tmp_path: Path, how: str, stream: bool
) -> None:
    timeout_s = patient(0.5 if how == "silent" else 60.0)
    with small_cluster(model_dir, tmp_path, worker_timeout_s=timeout_s) as cluster:
        cluster.use(Script(answers=[[39, 40, 41, 42]], decode_limit=1))
        connection = open_request(cluster.router, {"prompt": "a", "stream": stream, "max_tokens": 4})
        cluster.decode.wait_for(StartDecode)
        until(lambda: cluster.router.get("/cluster")["router"]["phases"].get("decoding"), "decoding")
        if how == "silent":
            cluster.decode.mute = True
        else:
            cluster.decode.stop()
        until(lambda: cluster.router.get("/cluster")["router"]["phases"].get("queued"), "a waiting request")
        assert not cluster.router.ready()
        with pytest.raises(openai.InternalServerError) as caught:
            cluster.router.client().completions.create(model="tiny", prompt="a")
        assert caught.value.status_code == 503
        if how == "silent":
            cluster.decode.stop()
        cluster.use(Script(answers=[[39, 40, 41, 42]]))
        with FakeWorker(cluster.decode.endpoint, "decode", cluster.script, epoch=2):
            received = b""
            end = b"[DONE]" if stream else b"completion_tokens"
            while end not in received:
                part = connection.recv(1 << 16)
                assert part, received
                received += part
            assert b"error" not in received and received.count(b'"finish_reason":"length"') == 1
            connection.close()
            until(cluster.router.at_rest, "a router at rest")
        first, again = cluster.prefill.wait_for(Prefill, 2)
        assert again.work.request_id != first.work.request_id
        assert again.work.prompt == [*first.work.prompt, 39, 40]
        assert (again.work.output_tokens, again.work.sampling) == (2, first.work.sampling)
        with cluster.router.http() as http:
            assert 'baton_migrations_total{reason="decode_lost"} 1.0' in http.get("/metrics").text


def test_a_new_epoch_on_the_same_connection_ends_the_old_life(model_dir: Path, tmp_path: Path) -> None:
    with small_cluster(model_dir, tmp_path) as cluster:
        cluster.use(Script(hold_prefill=True))
        connection = open_request(cluster.router, {"prompt": "a"})
        first = cluster.prefill.wait_for(Prefill)[0]
        cluster.use(Script())
        cluster.prefill.epoch = 2
        received = b""
        while b"completion_tokens" not in received:
            part = connection.recv(1 << 16)
            assert part, received
            received += part
        connection.close()
        assert cluster.decode.wait_for(Cancel)[0].request_id == first.work.request_id
        assert len(cluster.prefill.wait_for(Prefill, 2)) == 2
        until(cluster.router.ready, "a greeted new life")


def test_without_retries_a_lost_worker_is_an_error(model_dir: Path, tmp_path: Path) -> None:
    with small_cluster(model_dir, tmp_path, max_retries=0) as cluster:
        cluster.use(Script(decode_limit=1))
        connection = open_request(cluster.router, {"prompt": "a"})
        cluster.decode.wait_for(StartDecode)
        until(lambda: cluster.router.get("/cluster")["router"]["phases"].get("decoding"), "decoding")
        cluster.decode.stop()
        received = b""
        while b"worker_lost" not in received:
            part = connection.recv(1 << 16)
            assert part, received
            received += part
        assert b" 503 " in received and b"retry-after" in received and b"x-should-retry: false" in received
        connection.close()
        until(cluster.router.at_rest, "a router at rest")


def test_a_refused_router_says_why(model_dir: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    endpoint = f"ipc://{tmp_path}/u"
    with (
        FakeWorker(endpoint, "unified", Script(refuse="another version")),
        running_router(model_dir, [endpoint]) as router,
    ):
        worker = until(
            lambda: [one for one in router.get("/cluster")["workers"] if one["connection"] == "refused"],
            "a refusal",
        )[0]
        assert worker["message"] == "another version"
        assert not router.ready()


def test_a_unified_worker_and_draining_workers(model_dir: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    endpoint = f"ipc://{tmp_path}/u"
    script = Script(answers=[[39, 40, 41]])
    with FakeWorker(endpoint, "unified", script) as worker, running_router(model_dir, [endpoint]) as router:
        until(router.ready, "a ready router")
        stream = router.client(strict=False).completions.create(model="tiny", prompt="a", n=2, stream=True)
        assert [choice.finish_reason for chunk in stream for choice in chunk.choices].count("length") == 2
        assert len(worker.wait_for(Generate)) == 1
        worker.script.state = "draining"
        until(lambda: not router.ready(), "a router without a worker that takes work")


def test_keys_are_asked_for_everywhere_but_for_health_and_the_page(model_dir: Path, tmp_path: Path) -> None:
    with small_cluster(model_dir, tmp_path, api_keys=["sk-one", "sk-two"]) as cluster:
        bare = httpx.Client(base_url=cluster.router.url, timeout=DEADLINE_S)
        with bare:
            assert bare.get("/health").status_code == 200
            # The page is where a key is entered, and holds nothing that a key would guard.
            page = bare.get("/")
            assert page.status_code == 200 and 'id="key"' in page.text
            assert bare.get("/favicon.ico").status_code == 204
            for path in (
                "/index.html",
                "/ready",
                "/metrics",
                "/cluster",
                "/memory",
                "/v1/models",
                "/version",
                "/nothing",
            ):
                for value in (None, "Bearer", "Bearer sk-onf", "Basic sk-one", "Bearer sk-one2"):
                    headers = {} if value is None else {"authorization": value}
                    answer = bare.get(path, headers=headers)
                    assert answer.status_code == 401, (path, value)
                    assert answer.json()["error"]["code"] == "invalid_api_key"
            answer = bare.get("/v1/models", headers={"authorization": "Bearer sk-two"})
            assert answer.status_code == 200
        for key in ("sk-one", "sk-two", "sk-one"):
            cluster.router.api_key = key
            cluster.router.client().completions.create(model="tiny", prompt="a", max_tokens=1)
        salts = [prefill.work.salt for prefill in cluster.prefill.wait_for(Prefill, 3)]
        assert salts[0] == salts[2] != salts[1]
        assert all(len(salt) == 32 for salt in salts)


def test_a_deadline_frees_the_workers(model_dir: Path, tmp_path: Path) -> None:
    with small_cluster(model_dir, tmp_path, request_timeout_s=0.3) as cluster:
        cluster.use(Script(hold_decode=True))
        with cluster.router.http() as http:
            answer = http.post("/v1/completions", json={"prompt": "a"})
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        cluster.prefill.wait_for(Cancel)
        cluster.decode.wait_for(Cancel)


def test_too_much_at_once_is_refused(model_dir: Path, tmp_path: Path) -> None:
    with small_cluster(model_dir, tmp_path, max_running=2, retry_after_s=3) as cluster:
        cluster.use(Script(hold_prefill=True))
        connection = open_request(cluster.router, {"prompt": ["a", "b"]})
        cluster.prefill.wait_for(Prefill, 2)
        with cluster.router.http() as http:
            answer = http.post("/v1/completions", json={"prompt": "a"})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
        connection.close()
        until(cluster.router.at_rest, "a router at rest")


def test_a_drain_lets_what_runs_finish_and_refuses_the_rest(model_dir: Path, tmp_path: Path) -> None:
    with small_cluster(model_dir, tmp_path, drain_timeout_s=60.0) as cluster:
        cluster.use(Script(answers=[[39, 40, 41]], hold_prefill=True))
        bodies: list[str] = []

        def ask() -> None:
            with cluster.router.http() as http:
                bodies.append(http.post("/v1/completions", json={"prompt": "a"}).text)

        asking = threading.Thread(target=ask)
        asking.start()
        work = cluster.prefill.wait_for(Prefill)[0].work
        os.kill(cluster.router.process.pid, signal.SIGTERM)
        with cluster.router.http() as http:
            until(
                lambda: http.get("/ready").json().get("error", {}).get("code") == "draining",
                "a draining router",
            )
            assert http.get("/health").status_code == 200
            refused = http.post("/v1/completions", json={"prompt": "b"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert cluster.router.process.poll() is None
        cluster.prefill.act(lambda: cluster.prefill.prefill(work) and None)
        asking.join(DEADLINE_S)
        assert json.loads(bodies[0])["choices"][0]["finish_reason"] == "length"
        assert cluster.router.process.wait(DEADLINE_S) == 0


def test_a_drain_out_of_time_ends_what_is_left_with_an_error(model_dir: Path, tmp_path: Path) -> None:
    with small_cluster(model_dir, tmp_path, drain_timeout_s=0.2) as cluster:
        cluster.use(Script(decode_limit=1))
        connection = open_request(cluster.router, {"prompt": "a", "stream": True})
        cluster.decode.wait_for(StartDecode)
        os.kill(cluster.router.process.pid, signal.SIGTERM)
        received = b""
        while part := connection.recv(1 << 16):
            received += part
        assert b'"code":"draining"' in received
        assert b"[DONE]" not in received
        connection.close()
        cluster.decode.wait_for(Cancel)
        assert cluster.router.process.wait(DEADLINE_S) == 0


def test_a_bad_start_is_one_message(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    given = {
        "workers": [f"ipc://{tmp_path}/x"],
        "model_dir": str(tmp_path),
        "served_model_name": "m",
        "port": 0,
    }
    done = subprocess.run([sys.executable, "-c", START, json.dumps(given)], capture_output=True, text=True)
    assert done.returncode != 0
    assert f"RouterConfigError: {tmp_path} has no tokenizer: looked for tokenizer.json" in done.stderr


def test_a_router_that_was_stopped_reads_before_it_judges(model_dir: Path, tmp_path: Path) -> None:
    """Its workers were not silent; only it was not listening."""
    with small_cluster(model_dir, tmp_path, worker_timeout_s=patient(0.5)) as cluster:
        cluster.use(Script(answers=[[39, 40, 41, 42]], hold_decode=True))
        connection = open_request(cluster.router, {"prompt": "a", "max_tokens": 4})
        join = cluster.decode.wait_for(StartDecode)[0]
        pid = cluster.router.process.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            threading.Event().wait(patient(1.5))  # longer than the timeout: that is what is tested
            for worker in (cluster.prefill, cluster.decode):
                worker.say([worker.status(None)])
            until(lambda: not (cluster.prefill.busy or cluster.decode.busy), "both have said so")
        finally:
            os.kill(pid, signal.SIGCONT)
        work = cluster.decode.work_of(join.request_id)
        cluster.decode.act(lambda: cluster.decode.decode(work, join.first_tokens))
        received = b""
        while b"completion_tokens" not in received:
            part = connection.recv(1 << 16)
            assert part, received
            received += part
        connection.close()
        assert cluster.prefill.of(Prefill) == cluster.prefill.wait_for(Prefill)
        with cluster.router.http() as http:
            assert "baton_migrations_total{" not in http.get("/metrics").text
