"""A request that has ended leaves nothing to the garbage collector, whose pauses every stream would feel.

The whole application in this process, with clients whose connections are played by hand.
"""

import asyncio
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import router.api.generate
from router.api.app import build_app
from router.api.generate import Service
from router.chat.chat_template import ChatTemplate
from router.config import RouterConfig
from router.openai.requests import BodyDecoder
from router.prepare.process_pool import ProcessPool
from router.prepare.request import Kit
from router.routing.dispatcher import Dispatcher
from router.routing.metrics import Metrics
from router.routing.routed_request import RetryBudget
from router.text.tokenizer import TextTokenizer
from services.protocol.client import ClientState, WorkerClient
from services.protocol.messages import (
    VERSION,
    DecodeStarted,
    Failed,
    Prefill,
    PrefillDone,
    Report,
    Request,
    Role,
    StartDecode,
    Tokens,
    WorkerHello,
    WorkerTransferAddress,
)
from services.protocol.worker_status import Ledger, PageUsage, Status
from tests.checkpoints import write_tokenizer

ENDPOINTS: dict[Role, str] = {"prefill": "ipc:///p", "decode": "ipc:///d"}


class PlayedWire:
    """Sends what a worker answers to each message, from the loop's next turn."""

    def __init__(self, client: WorkerClient, answer: Callable[[Request], list[Report]]) -> None:
        self._client, self._answer = client, answer

    def send(self, messages: list[Request]) -> bool:
        reports = [report for message in messages for report in self._answer(message)]
        if reports:
            asyncio.get_running_loop().call_soon(self._client._on_arrived, reports)
        return True

    def close(self) -> None:
        """There is nothing to close."""


def all_of_it(message: Request) -> list[Report]:
    match message:
        case Prefill(work):
            firsts = [Tokens(work.request_id, choice, [65]) for choice in work.choice_numbers]
            return [PrefillDone(work.request_id, 0.0, 0.0, 0), *firsts]
        case StartDecode(request_id, firsts):
            lasts = [Tokens(request_id, first.choice, [66], None, "length") for first in firsts]
            return [DecodeStarted(request_id, 0.0, 0.0, 1, 0), *lasts]
    return []


def only_the_first_tokens(message: Request) -> list[Report]:
    return all_of_it(message) if isinstance(message, Prefill) else []


def failures(message: Request) -> list[Report]:
    if isinstance(message, Prefill):
        return [Failed(message.work.request_id, "internal", "lost", True)]
    return []


def connect(client: WorkerClient, role: Role, answer: Callable[[Request], list[Report]]) -> None:
    address = WorkerTransferAddress(client.endpoint, 1)
    client._loop = asyncio.get_running_loop()
    client._connection = PlayedWire(client, answer)
    client._transition(ClientState.CONNECTING, "connecting")
    client.hello = WorkerHello(VERSION, role, role, 1, "m", 320, 1024, 1024, 16, 64, address)
    client._transition(ClientState.READY, "ready")
    client.status = Status(
        None, 1, role, role, "ready", 1, None, 0, 0, 0, 0, PageUsage(64, 64, 0, 0), None, 0.0, 0, 0, 0.0,
        0.0, {}, Ledger("cpu", 1, 0.5, []),
    )  # fmt: skip


class Client:
    """One HTTP request. `leaves`: it is gone once it has the first tokens."""

    def __init__(self, body: dict[str, Any], leaves: bool) -> None:
        self._body, self._leaves = json.dumps(body).encode(), leaves
        self._is_first = True
        self._begun, self._never = asyncio.Event(), asyncio.Event()
        self.statuses: list[int] = []
        self.written = b""

    async def receive(self) -> Any:
        if self._is_first:
            self._is_first = False
            return {"type": "http.request", "body": self._body, "more_body": False}
        await (self._begun if self._leaves else self._never).wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.statuses.append(message["status"])
        else:
            self.written += message["body"]
            self._begun.set()


STREAM = {"prompt": "a", "max_tokens": 2, "stream": True}


@pytest.mark.parametrize(
    ("body", "answer", "leaves", "ending"),
    [
        (STREAM, all_of_it, False, b"data: [DONE]\n\n"),
        ({"prompt": ["a", "b"], "n": 2, "max_tokens": 2}, all_of_it, False, b'"cached_tokens":0}}}'),
        (STREAM, only_the_first_tokens, True, b'"finish_reason":null}]}\n\n'),
        (STREAM, failures, False, b"}}"),
    ],
    ids=["streamed", "whole", "left", "failed"],
)
def test_nothing_is_left_to_the_collector(
    body: dict[str, Any],
    answer: Callable[[Request], list[Report]],
    leaves: bool,
    ending: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The watch listens at once, as it does for every request that is not over in an instant.
    monkeypatch.setattr(router.api.generate, "WATCH_AFTER_S", 0.0)
    write_tokenizer(tmp_path)
    tokenizer = TextTokenizer(tmp_path)
    template = ChatTemplate(tmp_path, tokenizer.special_tokens)
    kit = Kit("m", tokenizer, template, BodyDecoder())
    config = RouterConfig(
        workers=tuple(ENDPOINTS.values()), model_dir=tmp_path, served_model_name="m", max_retries=1
    )
    metrics = Metrics(retries=RetryBudget(config.max_retries, config.retry_share, config.retry_burst))
    dispatcher = Dispatcher(config, metrics)
    app = build_app(Service(config, kit, ProcessPool(tmp_path, "m", None), dispatcher, metrics))

    async def request() -> Client:
        client = Client(body, leaves)
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        await app(scope, client.receive, client.send)
        return client

    async def scenario() -> tuple[Client, list[str]]:
        for role, endpoint in ENDPOINTS.items():
            connect(dispatcher.clients[endpoint], role, answer)
        await request()  # whatever is made once is made now
        gc.collect()
        gc.disable()
        try:
            client = await request()
            await asyncio.sleep(0)  # a cancelled watch has its last turn
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            left = [f"{type(one).__module__}.{type(one).__qualname__}" for one in gc.garbage]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        assert dispatcher.live == 0
        return client, left

    client, left = asyncio.run(scenario())
    assert client.statuses == [500 if answer is failures else 200]
    assert client.written.endswith(ending), client.written[-60:]
    ours = [name for name in left if name.startswith(("router.", "services."))]
    assert not ours, left
