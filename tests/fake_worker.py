"""A worker without a model: a real peer on a UNIX socket that speaks `services/protocol/messages.py` and
answers from a script.

For tests of the router. One thread owns the socket; a test changes the `Script`, looks at what came by `of`
and `wait_for`, and has things done in that thread by `act`. To answer a message and to note it is one act:
who has the answer finds the message, and who finds the message finds it answered.
"""

import queue
import socket as sockets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import zmq

from kvtransfer.net.codec import Codec
from services.protocol.frame_server import FrameServer
from services.protocol.messages import (
    VERSION,
    Cancel,
    DecodeStarted,
    Failed,
    FinishReason,
    FirstToken,
    Generate,
    Prefill,
    PrefillDone,
    Refusal,
    Report,
    Request,
    ReserveKv,
    Role,
    RouterHello,
    SequenceRequest,
    StartDecode,
    StatusRequest,
    TokenLogprob,
    Tokens,
    TopLogprob,
    WorkerHello,
    WorkerTransferAddress,
)
from services.protocol.worker_status import Ledger, LedgerEntry, PageUsage, Slots, Status
from tests.patience import patient

DEADLINE_S = patient(30.0)
Kind = TypeVar("Kind")


@dataclass(slots=True)
class Script:
    """What the fake workers of one cluster do. `answers[c]` are choice `c`'s tokens (the last list serves the
    choices beyond); with `end_token` a choice that has all its tokens ends by "stop" on it."""

    answers: list[list[int]] = field(default_factory=lambda: [[65, 66, 67, 68]])
    end_token: int | None = None
    queue_s: float = 0.001
    prefill_s: float = 0.002
    cached_tokens: int = 0
    hold_prefill: bool = False
    hold_decode: bool = False
    """Neither DecodeStarted nor tokens after `StartDecode`."""
    decode_limit: int | None = None
    """Decode tokens of each choice before everything stops without a word."""
    fail_prefill: Failed | None = None
    fail_reserve: Failed | None = None
    fail_decode: Failed | None = None
    """After `decode_limit` tokens. The request id is filled in."""
    refuse: str | None = None
    state: str = "ready"

    def tokens_of(self, work: SequenceRequest, choice: int) -> tuple[list[int], FinishReason]:
        tokens = list(self.answers[min(choice, len(self.answers) - 1)])
        finish: FinishReason = "length"
        if self.end_token is not None:
            tokens.append(self.end_token)
            finish = "stop"
        if len(tokens) > work.sampling.max_tokens:
            tokens, finish = tokens[: work.sampling.max_tokens], "length"
        return tokens[work.output_tokens :], finish


def logprobs_of(tokens: Sequence[int], alternatives: int | None) -> list[TokenLogprob] | None:
    """Made up, but a function of the token, so that a test can tell them apart."""
    if alternatives is None:
        return None
    return [
        TokenLogprob(
            -token / 100,
            [TopLogprob((token + step) % 256, -(token + step) / 100) for step in range(alternatives)],
        )
        for token in tokens
    ]


class FakeWorker:
    """`with FakeWorker("ipc:///...", "prefill", script) as worker:` serves until the block ends."""

    def __init__(
        self,
        endpoint: str,
        role: Role,
        script: Script,
        *,
        name: str = "",
        epoch: int = 1,
        max_model_len: int = 1024,
        max_sequence_tokens: int = 1024,
        vocab_size: int = 320,
    ) -> None:
        self.endpoint, self.role, self.script = endpoint, role, script
        self.name = name or role
        self.epoch = epoch
        self._limits = (vocab_size, max_model_len, max_sequence_tokens)
        self._received: list[Request] = []
        self.mute = False
        self._works: dict[int, tuple[bytes, SequenceRequest]] = {}
        self._peer = b""
        self._changed = threading.Condition()
        self._actions: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._bell, self._bell_end = sockets.socketpair()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"fake-{self.name}", daemon=True)
        self._bound = threading.Event()

    def __enter__(self) -> "FakeWorker":
        self._thread.start()
        assert self._bound.wait(DEADLINE_S), "the fake worker could not bind"
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Closes the socket, as a worker's death does. Idempotent."""
        if self._thread.is_alive():
            self.act(self._stop)
            self._thread.join(DEADLINE_S)
        self._bell.close()
        self._bell_end.close()

    # -- for tests

    def act(self, action: Callable[[], None]) -> None:
        """Runs `action` in the worker's thread, soon."""
        self._actions.put(action)
        self._bell.send(b"!")

    def say(self, reports: list[Report]) -> None:
        """Sends a frame to the router that spoke last."""
        self.act(lambda: self._send(self._peer, reports))

    def of(self, kind: type[Kind]) -> list[Kind]:
        with self._changed:
            found: list[Kind] = [message for message in self._received if isinstance(message, kind)]
            return found

    def wait_for(self, kind: type[Kind], count: int = 1) -> list[Kind]:
        """The first `count` messages of a kind, as soon as they are there."""
        until_s = time.monotonic() + DEADLINE_S
        with self._changed:
            while True:
                found: list[Kind] = [message for message in self._received if isinstance(message, kind)]
                if len(found) >= count:
                    return found[:count]
                left_s = until_s - time.monotonic()
                assert left_s > 0, f"{self.name}: waited for {count} {kind.__name__}, got {self._received}"
                self._changed.wait(left_s)

    @property
    def busy(self) -> bool:
        """Whether something given to `act` is still to be done."""
        with self._changed:
            return not self._actions.empty()

    def work_of(self, request_id: int) -> SequenceRequest:
        return self._works[request_id][1]

    def forget(self) -> None:
        """What came until now is found no more."""
        with self._changed:
            self._received.clear()

    # -- the thread

    def _run(self) -> None:
        server: FrameServer[Request, Report] = FrameServer(
            self.endpoint, Codec[Request](Request), Codec[Report](Report), on_drop=lambda reason: None
        )
        self._server = server
        poller = zmq.Poller()
        poller.register(server.socket, zmq.POLLIN)
        poller.register(self._bell_end.fileno(), zmq.POLLIN)
        self._bound.set()
        try:
            while not self._stopping:
                poller.poll()
                self._bell_drain()
                for peer, messages in server.receive():
                    self._peer = peer
                    with self._changed:
                        for message in messages:
                            self._answer(peer, message)
                        self._received += [one for one in messages if not isinstance(one, StatusRequest)]
                        self._changed.notify_all()
        finally:
            server.close()

    def _bell_drain(self) -> None:
        self._bell_end.setblocking(False)
        try:
            while self._bell_end.recv(64):
                pass
        except BlockingIOError:
            with self._changed:
                while not self._actions.empty():
                    self._actions.get()()

    def _stop(self) -> None:
        self._stopping = True

    def _send(self, peer: bytes, reports: Sequence[Report]) -> None:
        if not self.mute and reports:
            self._server.send(peer, list(reports))

    # -- the protocol

    def _answer(self, peer: bytes, message: Request) -> None:
        script = self.script
        if isinstance(message, RouterHello):
            self._send(peer, [Refusal(script.refuse)] if script.refuse else [self._hello()])
        elif isinstance(message, StatusRequest):
            self._send(peer, [self.status(message.ask_id)])
        elif isinstance(message, Prefill):
            self._works[message.work.request_id] = (peer, message.work)
            if script.fail_prefill is not None:
                self._fail(peer, message.work.request_id, script.fail_prefill)
            elif not script.hold_prefill:
                self.prefill(message.work)
        elif isinstance(message, ReserveKv):
            self._works[message.work.request_id] = (peer, message.work)
            if script.fail_reserve is not None:
                self._fail(peer, message.work.request_id, script.fail_reserve)
        elif isinstance(message, StartDecode):
            if message.request_id in self._works and not script.hold_decode:
                self.decode(self._works[message.request_id][1], message.first_tokens)
        elif isinstance(message, Generate):
            self._works[message.work.request_id] = (peer, message.work)
            if script.fail_prefill is not None:
                self._fail(peer, message.work.request_id, script.fail_prefill)
            elif not script.hold_prefill:
                firsts = self.prefill(message.work)
                if not script.hold_decode:
                    self._stream(message.work, firsts)
        elif isinstance(message, Cancel) and message.choice is None:
            self._works.pop(message.request_id, None)

    def _fail(self, peer: bytes, request_id: int, failed: Failed) -> None:
        self._send(peer, [Failed(request_id, failed.code, failed.message, failed.retryable)])

    def prefill(self, work: SequenceRequest) -> list[int]:
        """Sends PrefillDone and the first tokens; returns the choices that go on."""
        script, sampling = self.script, work.sampling
        prompt_logprobs = logprobs_of(work.prompt[1:], sampling.prompt_logprobs)
        frame: list[Report] = [
            PrefillDone(
                work.request_id, script.queue_s, script.prefill_s, script.cached_tokens, prompt_logprobs
            )
        ]
        going_on: list[int] = []
        for choice in work.choice_numbers:
            tokens, finish = script.tokens_of(work, choice)
            last = len(tokens) == 1
            logprobs = logprobs_of(tokens[:1], sampling.logprobs)
            frame.append(Tokens(work.request_id, choice, tokens[:1], logprobs, finish if last else None))
            if not last:
                going_on.append(choice)
        self._send(self._works[work.request_id][0], frame)
        return going_on

    def decode(self, work: SequenceRequest, firsts: Sequence[FirstToken]) -> None:
        """Sends DecodeStarted and everything that follows the first tokens."""
        peer = self._works[work.request_id][0]
        self._send(peer, [DecodeStarted(work.request_id, 0.003, 0.001, len(work.prompt), 0)])
        for first in firsts:
            expected = self.script.tokens_of(work, first.choice)[0][0]
            assert first.token == expected, f"the router joined with {first.token}, prefill drew {expected}"
        self._stream(work, [first.choice for first in firsts])

    def _stream(self, work: SequenceRequest, choices: Sequence[int]) -> None:
        script = self.script
        peer = self._works[work.request_id][0]
        left = {choice: script.tokens_of(work, choice) for choice in choices}
        step = 1
        while left:
            if script.decode_limit is not None and step > script.decode_limit:
                if script.fail_decode is not None:
                    self._fail(peer, work.request_id, script.fail_decode)
                return
            frame: list[Report] = []
            for choice, (tokens, finish) in list(left.items()):
                last = step == len(tokens) - 1
                new = tokens[step : step + 1]
                logprobs = logprobs_of(new, work.sampling.logprobs)
                frame.append(Tokens(work.request_id, choice, new, logprobs, finish if last else None))
                if last:
                    del left[choice]
            self._send(peer, frame)
            step += 1

    def _hello(self) -> WorkerHello:
        vocab_size, max_model_len, max_sequence_tokens = self._limits
        transfer = None if self.role == "unified" else WorkerTransferAddress(f"ipc:///fake/{self.name}", 1)
        return WorkerHello(
            version=VERSION,
            name=self.name,
            role=self.role,
            worker_epoch=self.epoch,
            model_digest="fake",
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            max_sequence_tokens=max_sequence_tokens,
            page_size_tokens=16,
            pages=256,
            transfer=transfer,
        )

    def status(self, ask_id: int | None) -> Status:
        return Status(
            ask_id=ask_id,
            worker_epoch=self.epoch,
            name=self.name,
            role=self.role,
            state=self.script.state,  # type: ignore[arg-type]
            pid=4242,
            transfer_pid=4243,
            queued=0,
            running=len(self._works),
            reserved=0,
            holding=0,
            pages=PageUsage(256, 200, 36, 20),
            slots=Slots(16, 14, 1, 1, 0),
            slots_age_s=0.0,
            open_sends=0,
            open_receives=0,
            prompt_tokens_per_s=0.0,
            output_tokens_per_s=0.0,
            counters={"output_tokens": 7.0},
            ledger=Ledger(
                device="cpu",
                device_bytes=1 << 30,
                mem_fraction=0.5,
                entries=[
                    LedgerEntry("worker", "weights", True, 100 << 20, 100 << 20),
                    LedgerEntry("worker", "kv_pool", True, 400 << 20, None),
                    LedgerEntry("transfer", "staging", False, 64 << 20, 64 << 20),
                ],
            ),
            mover="nixl",
        )
