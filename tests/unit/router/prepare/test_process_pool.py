"""Bodies prepared by a process beside the loop: the same as in the loop, and no end of one is another's."""

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from router.api.asgi import ClientGone, attended
from router.chat.chat_template import ChatTemplate
from router.errors import ApiError
from router.openai.requests import BodyDecoder
from router.prepare import process_pool as beside
from router.prepare.process_pool import ProcessPool
from router.prepare.request import (
    MAX_TEXT_PARTS,
    Kind,
    Kit,
    PreparedRequest,
    PrepareInput,
    TooMuchHere,
    prepare,
)
from router.routing.limits import RequestLimits
from router.text.tokenizer import TextTokenizer
from tests.checkpoints import write_tokenizer

LIMITS = RequestLimits(1024, 1 << 20, 1 << 20, 16, 64, 128)
TEMPLATE = """{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}
{% endfor %}{% if endless is defined %}{% for a in range(9999) %}{% for b in range(9999) %}
{% endfor %}{% endfor %}{% endif %}"""
"""`endless` is a request's own chat_template_kwargs."""
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_tokenizer(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def kit(model_dir: Path, **settings: Any) -> Kit:
    tokenizer = TextTokenizer(model_dir)
    return Kit("m", tokenizer, ChatTemplate(model_dir, **settings), BodyDecoder())


def raw(**fields: Any) -> bytes:
    return msgspec.json.encode(fields)


def chat(*texts: str, **fields: Any) -> bytes:
    return raw(messages=[{"role": "user", "content": text} for text in texts], **fields)


def together(scenario: Callable[[ProcessPool], Awaitable[None]], model_dir: Path) -> None:
    """Ends with all seats free, and no process left."""

    async def run() -> None:
        pool = ProcessPool(model_dir, "m", None)
        try:
            async with asyncio.timeout(DEADLINE_S):
                await scenario(pool)
                for _ in range(beside.PROCESSES):
                    await pool._capacity.acquire()
            assert pool._bytes == 0
        finally:
            pids = [one.process.pid for one in pool._all]
            pool.close()
        assert not [pid for pid in pids if psutil.pid_exists(pid)]

    asyncio.run(run())


def joined(made: PreparedRequest | list[bytes] | bytes) -> Any:
    return b"".join(made) if isinstance(made, list) else made


BODIES: dict[str, tuple[Kind, bytes]] = {
    "chat": ("chat", chat("Hello " * 3000, "you", temperature=0.5, logit_bias={"3": 1.5}, stop=["a", "b"])),
    "text": ("completions", raw(prompt=["a" * 50_000, "bä", ""][:2], echo=True, max_tokens=3, n=2)),
    "tokens": ("completions", raw(prompt=[[1, 2, 3] * 100_000, [319], [0]], logprobs=2)),
    "echoed tokens": ("completions", raw(prompt=[65, 66] * 5000, echo=True, max_tokens=0)),
    "tokenize": ("tokenize", raw(prompt="Hello you " * 20_000, return_token_strs=True)),
    "detokenize": ("detokenize", raw(tokens=[65, 66] * 50_000)),
    "small": ("tokenize", raw(prompt="")),
    "no json": ("chat", b"[" * 100_000),
    "field": ("chat", chat("a", temperature=9)),
    "unsupported": ("completions", raw(prompt="a", suffix="b")),
    "model": ("completions", raw(prompt="a" * 9000, model="other")),
    "too long": ("completions", raw(prompt=[1] * ((1 << 20) + 1))),
    "vocabulary": ("completions", raw(prompt=[1] * 9000 + [1024])),
    "mark": ("chat", b"\xef\xbb\xbf" + chat("a")),
    "utf-16": ("chat", chat("a").decode().encode("utf-16-le")),
    "utf-32": ("chat", chat("a").decode().encode("utf-32-be")),
    "latin-1": ("chat", chat("ä").decode().encode("latin-1")),
}


def test_it_is_as_in_the_loop(model_dir: Path) -> None:
    here = kit(model_dir)

    async def scenario(pool: ProcessPool) -> None:
        for name, (kind, body) in BODIES.items():
            for limits in (LIMITS, None):
                ask = PrepareInput(kind, limits, seed=7, retry_after_s=3)
                made = await asyncio.gather(pool.prepare(ask, body), return_exceptions=True)
                try:
                    expected: Any = prepare(here, ask, body)
                except ApiError as error:
                    assert isinstance(made[0], ApiError), (name, made)
                    assert vars(made[0]) == vars(error), name
                else:
                    assert not isinstance(made[0], BaseException), name
                    assert joined(made[0]) == expected, name
        assert len(pool._all) == 1

    together(scenario, model_dir)


def test_parts_are_bounded_over_all_messages(model_dir: Path) -> None:
    here = kit(model_dir)
    part = {"type": "text", "text": "a"}
    kinds: tuple[Kind, ...] = ("chat", "tokenize")
    for kind in kinds:
        for parts, taken in ((MAX_TEXT_PARTS // 2, True), (MAX_TEXT_PARTS // 2 + 1, False)):
            two = [{"role": "user", "content": "a"}, {"role": "user", "content": [part] * parts}]
            body = raw(messages=two * 2)
            if taken:
                prepare(here, PrepareInput(kind, LIMITS), body)
                continue
            with pytest.raises(ApiError) as caught:
                prepare(here, PrepareInput(kind, LIMITS), body)
            assert (caught.value.status, caught.value.param) == (400, "messages[3].content")


def test_what_is_large_after_all_is_left_to_the_process(model_dir: Path) -> None:
    small = Kit("m", TextTokenizer(model_dir), ChatTemplate(model_dir, time_limit_s=0.01), BodyDecoder(), 100)
    with pytest.raises(TooMuchHere):
        prepare(small, PrepareInput("tokenize", LIMITS), raw(prompt="a" * 101))
    prepare(small, PrepareInput("tokenize", LIMITS), raw(prompt="a" * 100))
    endless = chat("a", chat_template_kwargs={"endless": True})
    with pytest.raises(TooMuchHere):
        prepare(small, PrepareInput("chat", LIMITS), endless)

    async def scenario(pool: ProcessPool) -> None:
        with pytest.raises(ApiError, match="does not come to an end: it ran for more than 1 s"):
            await pool.prepare(PrepareInput("chat", LIMITS), endless)
        assert await pool.prepare(PrepareInput("chat", LIMITS), chat("a"))

    together(scenario, model_dir)


def test_what_a_process_dies_with_is_prepared_by_another(model_dir: Path) -> None:
    text = raw(prompt="Hello you")

    async def scenario(pool: ProcessPool) -> None:
        expected = joined(await pool.prepare(PrepareInput("tokenize"), text))
        (process,) = pool._all
        os.kill(process.process.pid, signal.SIGSTOP)
        dying = asyncio.create_task(pool.prepare(PrepareInput("tokenize"), text))
        other = asyncio.create_task(pool.prepare(PrepareInput("tokenize"), text))
        assert joined(await other) == expected
        os.kill(process.process.pid, signal.SIGKILL)
        assert joined(await dying) == expected
        # One that died while it had nothing to do is no error at all.
        (process,) = pool._all
        os.kill(process.process.pid, signal.SIGKILL)
        process.process.wait()
        assert joined(await pool.prepare(PrepareInput("tokenize"), text)) == expected

    together(scenario, model_dir)


def test_a_body_that_ends_two_processes_fails_alone(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = ProcessPool._start
    killed: list[int] = []

    def doomed(self: ProcessPool) -> tuple[subprocess.Popen[bytes], socket.socket]:
        process, ours = start(self)
        if len(killed) < 2:
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)
        return process, ours

    monkeypatch.setattr(ProcessPool, "_start", doomed)

    async def scenario(pool: ProcessPool) -> None:
        with pytest.raises(ApiError) as caught:
            await pool.prepare(PrepareInput("tokenize"), raw(prompt="a"))
        assert (caught.value.status, caught.value.code) == (500, "internal_error")
        assert len(killed) == 2 and not pool._bytes
        assert await pool.prepare(PrepareInput("tokenize"), raw(prompt="a"))

    together(scenario, model_dir)


def test_too_much_computing_ends_with_an_error(model_dir: Path) -> None:
    async def scenario(pool: ProcessPool) -> None:
        await pool.prepare(PrepareInput("tokenize"), raw(prompt="a"))
        (process,) = pool._all
        os.kill(process.process.pid, signal.SIGSTOP)
        asked = asyncio.create_task(pool.prepare(PrepareInput("tokenize"), raw(prompt="a")))
        await asyncio.sleep(0)
        os.kill(process.process.pid, signal.SIGXCPU)  # what the kernel sends
        os.kill(process.process.pid, signal.SIGCONT)
        with pytest.raises(ApiError, match="of computing") as caught:
            await asked
        assert caught.value.status == 400

    together(scenario, model_dir)


@pytest.mark.parametrize("ending", ["gone", "late"])
def test_nobody_waits_for_what_nobody_wants(
    ending: str, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside, "ABANDONED_S", 0.05)
    monkeypatch.setattr(beside, "PROCESSES", 1)
    text = raw(prompt="Hello you")

    async def scenario(pool: ProcessPool) -> None:
        await pool.prepare(PrepareInput("tokenize"), text)
        (process,) = pool._all
        os.kill(process.process.pid, signal.SIGSTOP)
        left = asyncio.Event()

        async def receive() -> Any:
            await left.wait()
            return {"type": "http.disconnect"}

        def asked() -> Any:
            timeout_s = 0.05 if ending == "late" else DEADLINE_S
            work = attended(pool.prepare(PrepareInput("tokenize"), text), receive, timeout_s, 7.0)
            return asyncio.create_task(work)

        both = [asked(), asked()]  # one in the process, one that waits for it
        await asyncio.sleep(0)
        assert pool._bytes <= 2 * len(text)
        if ending == "gone":
            left.set()
        for one in both:
            if ending == "gone":
                with pytest.raises(ClientGone):
                    await one
            else:
                with pytest.raises(ApiError, match=r"within 7 s") as caught:
                    await one
                assert caught.value.status == 504
        assert await pool.prepare(PrepareInput("tokenize"), text), "a new process, since the old one hangs"

    together(scenario, model_dir)


def test_more_than_there_is_room_for_is_refused(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = raw(prompt="a" * 1000)
    monkeypatch.setattr(beside, "MAX_WAITING_BYTES", 3 * len(body))

    async def scenario(pool: ProcessPool) -> None:
        asked = [asyncio.create_task(pool.prepare(PrepareInput("tokenize"), body)) for _ in range(5)]
        done = await asyncio.gather(*asked, return_exceptions=True)
        refused = [one for one in done if isinstance(one, ApiError)]
        assert [(one.status, one.retry_after_s) for one in refused] == [(429, 1)] * 2
        # One that is larger than all the room is taken where nothing else waits.
        assert await pool.prepare(PrepareInput("tokenize"), raw(prompt="a" * 5000))

    together(scenario, model_dir)
