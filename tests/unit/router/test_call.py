"""A stream whose client does not keep up."""

from pathlib import Path

import pytest

import router.call
from router.answers import Heading, StreamSheet
from router.bodies import CompletionBody
from router.call import Call
from router.metrics import Metrics
from router.parameters import Limits, options_of
from router.tokenizer import TextTokenizer
from services.messages import Tokens
from tests.checkpoints import write_tokenizer

LIMITS = Limits(320, 1024, 1024, 8, 8, 8)


def test_frames_that_nobody_takes_end_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router.call, "MAX_UNSENT_FRAMES", 10)
    write_tokenizer(tmp_path)
    tokenizer = TextTokenizer(tmp_path)
    options = options_of(CompletionBody(prompt="a", stream=True, n=2, max_tokens=500), LIMITS, 1)
    sheet = StreamSheet(Heading("id", 0, "tiny"), tokenizer, False, None, False)
    call = Call(options, sheet, tokenizer, Metrics())
    output = call.add_prompt([5], None)
    for taken in range(100):
        assert output.on_tokens(Tokens(1, taken % 2, [65], None, None), float(taken))
        call.take_frames()
    assert not call.ended
    going_on = [output.on_tokens(Tokens(1, at % 2, [65], None, None), 100.0) for at in range(14)]
    assert going_on == [True] * 10 + [False] * 4
    assert call.ended and call.error is not None
    assert (call.error.status, call.error.code) == (408, "client_too_slow")
