"""A token's way back through the router: which objects it passes from the worker's client to the bytes of the
client's stream."""

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from router.api.call import Call
from router.api.responses import ResponseHeader, StreamBuilder
from router.openai.requests import CompletionBody
from router.prepare.parameters import options_of
from router.routing.limits import RequestLimits
from router.routing.routed_request import PromptRequest
from router.text.tokenizer import TextTokenizer
from services.protocol.messages import DecodeStarted, PrefillDone, Tokens
from tests.checkpoints import write_tokenizer
from tests.unit.router.test_isolation import DECODE, PREFILL, World

LIMITS = RequestLimits(320, 1024, 1024, 8, 8, 8)
MAX_OBJECTS = 5


def owners(frame: FrameType | None, until: object) -> Iterator[object]:
    """The objects whose methods are on the stack, innermost first, without those of `until`."""
    while frame is not None:
        owner = frame.f_locals.get("self")
        if owner is until:
            return
        if owner is not None:
            yield owner
        frame = frame.f_back


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("fields", [{}, {"stop": "zz"}], ids=str)
def test_a_token_passes_few_objects(tmp_path: Path, fields: dict[str, Any], chat: bool) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        write_tokenizer(tmp_path)
        tokenizer = TextTokenizer(tmp_path)
        options = options_of(CompletionBody(prompt="a", stream=True, max_tokens=9, **fields), LIMITS, 1)
        builder = StreamBuilder(ResponseHeader("id", 0, "tiny"), tokenizer, chat, None, False)
        call = Call(options, builder, tokenizer, world.metrics)
        prompt_request = PromptRequest([5], options.sampling, 1, b"", call.add_prompt([5], None))
        (routed,) = world.dispatcher.submit([prompt_request])
        request_id = routed.work.request_id
        world.report(PREFILL, PrefillDone(request_id, 0.0, 0.0, 0), Tokens(request_id, 0, [65]))
        world.report(DECODE, DecodeStarted(request_id, 0.0, 0.0, 3, 0))
        call.take_frames()
        paths: list[list[object]] = []

        def profile(frame: FrameType, event: str, argument: Any) -> None:
            if event == "c_call" and getattr(argument, "__self__", None) is builder.frames:
                paths.append(list(dict.fromkeys(owners(frame, world))))

        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            world.report(DECODE, Tokens(request_id, 0, [66]))
        finally:
            sys.setprofile(before)
        assert b'"c"' in call.take_frames()
        (path,) = paths
        names = [type(owner).__name__ for owner in path]
        assert names[1:] == ["RoutedRequest", "Attempt", "Dispatcher", "WorkerClient"]
        assert path[0] in prompt_request.output.choices
        assert len(path) <= MAX_OBJECTS
        world.dispatcher.end([routed])

    asyncio.run(scenario())
