"""A stream's bytes in any pieces: chunks with tokens, usage, errors."""

import pytest

from deploy.bench.load.stream import EventStream, failure_of

STREAM = (
    b'data: {"id":"1","choices":[{"index":0,"text":"a","finish_reason":null}],"usage":null}\n\n'
    b': a comment\n\ndata: {"choices":[{"index":0,"text":"","finish_reason":null}]}\r\n\r\n'
    b'data:{"choices":[{"text":"b","finish_reason":"length"}]}\n\n'
    b'data: {"choices":[{"text":"","finish_reason":"length"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\n'
    b"data: [DONE]\n\n"
)


@pytest.mark.parametrize("piece", [1, 2, 7, 64, 1000])
def test_any_pieces(piece: int) -> None:
    stream = EventStream()
    found = [stream.feed(STREAM[start : start + piece]) for start in range(0, len(STREAM), piece)]
    assert sum(found) == 3, "with text, or without but going on; not the one that only ends"
    assert stream.completion_tokens == 4
    assert stream.failure is None
    assert stream.finished


def test_it_is_not_finished_without_done() -> None:
    stream = EventStream()
    stream.feed(STREAM[: -len(b"data: [DONE]\n\n")])
    assert not stream.finished


@pytest.mark.parametrize(
    ("event", "failure"),
    [
        (b'{"error":{"type":"server_error","code":"worker_lost"}}', "error in the stream: worker_lost"),
        (b'{"error":{"message":"m","type":"server_error"}}', "error in the stream: server_error"),
        (b'{"error":"broken"}', "error in the stream: unnamed"),
        (b"{", "unreadable answer"),
        (b'{"choices":3}', "unreadable answer"),
    ],
)  # fmt: skip
def test_failures_in_the_stream(event: bytes, failure: str) -> None:
    stream = EventStream()
    stream.feed(b"data: " + event + b"\n\ndata: [DONE]\n\n")
    assert stream.failure == failure


def test_failures_instead_of_a_stream() -> None:
    assert failure_of(429, b'{"error":{"code":"overloaded","message":"m"}}') == "http 429 overloaded"
    assert failure_of(502, b"<html>") == "http 502"
    assert failure_of(500, b'{"detail":"x"}') == "http 500"
