"""What is asked of a request before anything reads it: its key, its origin, and headers that change what its
body means."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from router.api.app import Gate
from router.api.asgi import Response
from router.config import RouterConfig, RouterConfigError

KEYS = ("sk-one", "sk-two")
PAGE = "https://app.example"
Headers = Sequence[tuple[str, str]]


def config(**settings: Any) -> RouterConfig:
    return RouterConfig(workers=("ipc:///w",), model_dir=Path(), served_model_name="m", **settings)


class Answer:
    def __init__(self) -> None:
        self.status = 0
        self.headers: list[tuple[str, str]] = []
        self.body = b""
        self.key: str | None = None

    def of(self, name: str) -> str | None:
        found = [value for one, value in self.headers if one == name]
        return ", ".join(found) if found else None

    @property
    def code(self) -> str | None:
        code: str | None = json.loads(self.body)["error"]["code"]
        return code


def ask(
    settings: RouterConfig, headers: Headers, method: str = "POST", path: str = "/v1/completions"
) -> Answer:
    answer = Answer()

    async def served(scope: Any, receive: Any, send: Any) -> None:
        answer.key = scope.get("baton.api_key")
        await Response(scope, send).whole(200, b"{}")

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = [(name.decode(), value.decode()) for name, value in message["headers"]]
        else:
            answer.body += message["body"]

    async def receive() -> Any:
        raise AssertionError("nothing reads a body here")

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(name.encode(), value.encode()) for name, value in headers],
    }
    gate = Gate(served, {"/v1/completions": served}, settings)
    asyncio.run(gate(scope, receive, send))
    assert answer.of("x-request-id")
    return answer


BEARER = ("authorization", "Bearer sk-one")


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ([BEARER], "sk-one"),
        ([("authorization", "bearer  sk-two ")], "sk-two"),
        ([("x-api-key", "sk-two")], "sk-two"),
        ([("x-api-key", " sk-two ")], "sk-two"),
        ([BEARER, ("x-api-key", "sk-one")], "sk-one"),
        ([BEARER, BEARER], "sk-one"),
        ([("authorization", "Basic c2s6"), ("x-api-key", "sk-one")], "sk-one"),
        ([], None),
        ([("authorization", "Basic sk-one")], None),
        ([("authorization", "sk-one")], None),
        ([("x-api-key", "Bearer sk-one")], None),
        ([("x-api-key", "")], None),
        ([("x-api-key", "sk-oné")], None),
        ([("x-api-key", "sk-one, sk-one")], None),
        # Whose cache would these use?
        ([BEARER, ("x-api-key", "sk-two")], None),
        ([BEARER, ("x-api-key", "sk-onf")], None),
        ([("x-api-key", "sk-onf"), BEARER], None),
        ([BEARER, ("authorization", "Bearer sk-two")], None),
        ([("authorization", "Bearer sk-onf"), BEARER], None),
        ([("x-api-key", "sk-one"), ("x-api-key", "sk-two")], None),
    ],
)
def test_a_request_comes_with_one_valid_key(headers: Headers, key: str | None) -> None:
    answer = ask(config(api_keys=KEYS), headers)
    assert (answer.status, answer.key) == ((200, key) if key else (401, None))
    if key is None:
        assert answer.code == "invalid_api_key"
        assert answer.of("www-authenticate") == "Bearer"


@pytest.mark.parametrize("keyless", [False, True])
def test_probes_may_be_left_without_a_key(keyless: bool) -> None:
    settings = config(api_keys=KEYS, keyless_probes=keyless)
    for path in ("/ready", "/metrics"):
        assert ask(settings, [], "GET", path).status == (200 if keyless else 401)
    assert ask(settings, [], "GET", "/health").status == 200
    for path in ("/cluster", "/memory", "/v1/models", "/metrics/", "/ready/x", "/trace/a"):
        assert ask(settings, [], "GET", path).status == 401


CONTENT = {
    "json": ([("content-type", "application/json")], 200),
    "none": ([], 200),
    "form": ([("content-type", "application/x-www-form-urlencoded")], 200),
    "utf-8": ([("content-type", "application/json; charset=UTF-8")], 200),
    "quoted": ([("content-type", 'application/json;charset="utf-8"; a=b')], 200),
    "utf8": ([("content-type", "application/json; charset=utf8")], 200),
    "ascii": ([("content-type", "application/json; Charset=us-ascii")], 200),
    "latin": ([("content-type", "application/json; charset=iso-8859-1")], 415),
    "latin last": ([("content-type", 'application/json; charset=utf-8; charset="latin1"')], 415),
    "utf-16": ([("content-type", "text/plain ;charset = utf-16le")], 415),
    "two types": ([("content-type", "application/json"), ("content-type", "text/plain")], 400),
    "json last": ([("content-type", "text/plain"), ("content-type", "application/json")], 400),
    "identity": ([("content-encoding", "Identity")], 200),
    "no encoding": ([("content-encoding", "")], 200),
    "identities": ([("content-encoding", "identity, "), ("content-encoding", "identity")], 200),
    "gzip": ([("content-encoding", "GZip")], 415),
    "list": ([("content-encoding", "identity, br")], 415),
    "second": ([("content-encoding", "identity"), ("content-encoding", "zstd")], 415),
    "range": ([("content-range", "bytes 0-9/10")], 400),
    "mail": ([("content-transfer-encoding", "base64")], 415),
    "plain mail": ([("content-transfer-encoding", "8BIT")], 200),
    "wait": ([("expect", "100-Continue")], 200),
    "tea": ([("expect", "tea")], 417),
    "wait and tea": ([("expect", "100-continue"), ("expect", "tea")], 417),
    "both at once": ([("expect", "100-continue, tea")], 417),
}  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
@pytest.mark.parametrize("case", CONTENT)
def test_what_changes_a_bodys_meaning_is_honoured_or_refused(case: str, path: str) -> None:
    headers, status = CONTENT[case]
    answer = ask(config(), headers, path=path)
    assert answer.status == status
    if any(name == "content-encoding" for name, _ in headers):
        assert answer.of("accept-encoding") == ("identity" if status == 415 else None)
    if status == 417:
        assert answer.of("connection") == "close"


FOREIGN = {
    "text": ([("origin", "http://evil.example"), ("content-type", "text/plain")], 415),
    "form": ([("origin", "http://evil.example"), ("content-type", "application/x-www-form-urlencoded")], 415),
    "none": ([("origin", "http://evil.example")], 415),
    "null": ([("origin", "null"), ("content-type", "text/plain")], 415),
    "empty": ([("origin", ""), ("content-type", "text/plain")], 415),
    "disguised": ([("origin", "null"), ("content-type", "text/plain; a=application/json")], 415),
    "json": ([("origin", "http://evil.example"), ("content-type", "Application/JSON;charset=utf-8")], 200),
    "other port": ([("origin", "http://me:9"), ("content-type", "text/plain")], 415),
    "longer": ([("origin", "http://me:80.evil"), ("content-type", "text/plain")], 415),
    "other scheme": ([("origin", "ftp://me:80"), ("content-type", "text/plain")], 415),
    "two": ([("origin", "http://me:80"), ("origin", "http://evil"), ("content-type", "text/plain")], 415),
    "own twice": ([("origin", "http://me:80"), ("origin", "http://me:80"), ("content-type", "a/b")], 415),
    "own": ([("origin", "http://me:80"), ("content-type", "text/plain")], 200),
    "own, default port": ([("origin", "http://ME"), ("content-type", "text/plain")], 200),
    "allowed": ([("origin", PAGE), ("content-type", "text/plain")], 200),
    "no page": ([("content-type", "text/plain")], 200),
    "cross-site": ([("sec-fetch-site", "cross-site"), ("content-type", "text/plain")], 415),
    "same-origin": ([("sec-fetch-site", "same-origin"), ("content-type", "text/plain")], 200),
}  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_page_cannot_post_what_a_browser_sends_unasked(case: str, path: str) -> None:
    headers, status = FOREIGN[case]
    answer = ask(config(allowed_origins=(PAGE,)), [("host", "me:80"), *headers], path=path)
    assert answer.status == status
    if status == 415:
        assert answer.code == "unsupported_media_type"


def preflight(origin: str, *headers: tuple[str, str]) -> Headers:
    return [("origin", origin), ("access-control-request-method", "POST"), *headers]


@pytest.mark.parametrize("allowed", [(PAGE,), ("*",)])
def test_a_preflight_needs_no_key(allowed: tuple[str, ...]) -> None:
    settings = config(api_keys=KEYS, allowed_origins=allowed)
    asked = ("access-control-request-headers", "authorization,x-stainless-os")
    for path in ("/v1/completions", "/tokenize", "/cluster"):
        answer = ask(settings, preflight(PAGE, asked), "OPTIONS", path)
        assert (answer.status, answer.body) == (204, b"")
        assert answer.of("access-control-allow-origin") == (PAGE if allowed == (PAGE,) else "*")
        assert "POST" in str(answer.of("access-control-allow-methods"))
        names = {name.strip() for name in str(answer.of("access-control-allow-headers")).split(",")}
        assert names >= {"authorization", "content-type", "x-api-key", "x-stainless-os"}
        assert int(str(answer.of("access-control-max-age"))) > 0
        assert ("origin" in str(answer.of("vary"))) or allowed == ("*",)
    # Without the method it is no preflight, and another method is none either.
    assert ask(settings, [("origin", PAGE)], "OPTIONS").status == 401
    assert ask(settings, preflight(PAGE), "GET", "/v1/models").status == 401


@pytest.mark.parametrize("allowed", [(), (PAGE,)])
@pytest.mark.parametrize("origin", ["https://other.example", "null", PAGE + ":444", PAGE + ".evil"])
def test_other_pages_learn_nothing(allowed: tuple[str, ...], origin: str) -> None:
    settings = config(api_keys=KEYS, allowed_origins=allowed)
    for answer in (
        ask(settings, preflight(origin), "OPTIONS"),
        ask(settings, [("origin", origin), BEARER, ("content-type", "application/json")]),
    ):
        assert not [name for name, _ in answer.headers if name.startswith("access-control-")]
        assert answer.of("vary") == ("origin" if allowed else None)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([BEARER], 200),
        ([], 401),
        ([BEARER, ("content-encoding", "gzip")], 415),
        ([BEARER, ("expect", "x")], 417),
    ],
)
def test_every_answer_may_be_read_by_the_page(headers: Headers, status: int) -> None:
    answer = ask(config(api_keys=KEYS, allowed_origins=(PAGE,)), [("origin", PAGE), *headers])
    assert answer.status == status
    assert answer.of("access-control-allow-origin") == PAGE
    assert {"x-request-id", "retry-after"} <= set(str(answer.of("access-control-expose-headers")).split(", "))
    assert answer.of("vary") == "origin"


def test_a_header_that_is_asked_for_is_given_back_only_as_one() -> None:
    settings = config(allowed_origins=("*",))
    asked = ("access-control-request-headers", "x-a\r\nset-cookie: b")
    answer = ask(settings, preflight(PAGE, asked), "OPTIONS")
    assert answer.status == 204 and "cookie" not in str(answer.of("access-control-allow-headers"))


def test_all_origins_and_one_more_are_refused() -> None:
    with pytest.raises(RouterConfigError, match="allowed_origins"):
        config(allowed_origins=("*", PAGE))
