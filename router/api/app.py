"""The HTTP application (ASGI): its routes, the checks before them, and the one shape of errors.

`Gate` checks every request. It calls the two endpoints that generate itself: FastAPI's layers cost more than
all that happens to a short request behind them. FastAPI routes the rest.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi import Response as Plain
from starlette.exceptions import HTTPException
from starlette.routing import Route

from router.api.api_key import Keys
from router.api.asgi import (
    JSON,
    TEXT,
    ClientGone,
    Receive,
    Response,
    Scope,
    Send,
    header,
    label_header,
    label_of,
    read_body,
)
from router.api.content_headers import check_content, check_expectations, is_plain
from router.api.cors import Origins
from router.api.generate import GenerateEndpoint, Service
from router.api.openai_format import encode_json
from router.api.status_json import cluster_values, memory_values
from router.config import RouterConfig
from router.errors import ApiError, crashed
from router.prepare.parameters import check_model
from router.prepare.request import Kind
from router.routing.metrics import exposition
from services.protocol.messages import VERSION

logger = logging.getLogger(__name__)

STATIC_PAGE = Path(__file__).parent / "static" / "index.html"
_PAGE_HEADERS = [
    (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline';"
     b" connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]  # fmt: skip
_WITHOUT_KEY = frozenset(("/", "/favicon.ico", "/health"))
_PROBES = frozenset(("/ready", "/metrics"))
Answer = Callable[[Scope, bytes], Awaitable["Reply"]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Reply:
    """The whole answer of one of the small endpoints."""

    body: bytes
    content_type: bytes = JSON
    status: int = 200
    headers: Sequence[tuple[bytes, bytes]] = ()


class Endpoint:
    """The ASGI callable of a small endpoint: `answer` makes the reply of the scope and the whole body."""

    def __init__(self, answer: Answer, config: RouterConfig) -> None:
        self._answer, self._config = answer, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = Response(scope, send)
        try:
            limits = self._config.max_body_bytes, self._config.upload_timeout_s
            reply = await self._answer(scope, bytes(await read_body(scope, receive, *limits)))
        except ApiError as error:
            await response.error(error)
        except ClientGone:
            return
        else:
            await response.whole(reply.status, reply.body, reply.content_type, reply.headers)


class TokensEndpoint:
    """The ASGI callable of `/tokenize` and `/detokenize`, whose answer the prepare processes make."""

    def __init__(self, service: Service, kind: Kind) -> None:
        self._service, self._kind = service, kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = Response(scope, send)
        config = self._service.config
        try:
            raw = await read_body(scope, receive, config.max_body_bytes, config.upload_timeout_s)
            pieces = await self._service.prepare(self._kind, raw, receive)
        except ApiError as error:
            await response.error(error)
            return
        except ClientGone:
            return
        if not isinstance(pieces, list):
            raise TypeError("prompts in place of an answer")
        await response.pieces(200, pieces)


class Gate:
    """The application that the server calls: it labels a request, answers what browsers ask first (CORS),
    checks the API key and the headers that would change what the body means, and passes the request on.

    `/health` needs no key, nor does the page, which holds no data and has the field to enter a key; nor, with
    `keyless_probes`, do `/ready` and `/metrics`. At most `max_running` requests that generate are open at
    once, because each may hold a body that is still arriving.
    """

    def __init__(self, app: App, posts: Mapping[str, App], config: RouterConfig) -> None:
        """The gate calls `posts` for POST on exactly their paths, and `app` for everything else."""
        self._app, self._posts = app, posts
        self._open, self._max_open, self._retry_after_s = 0, config.max_running, config.retry_after_s
        self._keys, self._origins = Keys(config.api_keys), Origins(config.allowed_origins)
        self._without_key = _WITHOUT_KEY | _PROBES if config.keyless_probes else _WITHOUT_KEY

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        scope["baton.label"] = label_of(header(scope, b"x-request-id")).encode()
        origin = header(scope, b"origin")
        if origin is not None:
            send = self._origins.let_through(origin, send)
            if await self._origins.answer_preflight(scope, origin, send):
                return
        post = self._posts.get(scope["path"]) if scope["method"] == "POST" else None
        try:
            self._check(scope)
            if post is not None and self._open >= self._max_open:
                raise ApiError(
                    429,
                    f"The server is overloaded: {self._open} requests are open.",
                    code="overloaded",
                    retry_after_s=self._retry_after_s,
                )
        except ApiError as error:
            await Response(scope, send).error(error)
            return
        if post is None:
            await self._app(scope, receive, send)
            return
        self._open += 1
        try:
            await post(scope, receive, send)
        finally:
            self._open -= 1

    def _check(self, scope: Scope) -> None:
        headers = scope["headers"]
        if self._keys and scope["path"] not in self._without_key:
            key = self._keys.find(headers)
            if key is None:
                raise ApiError(
                    401,
                    "A valid API key is needed: Authorization: Bearer KEY, or x-api-key: KEY.",
                    code="invalid_api_key",
                )
            scope["baton.api_key"] = key
        if is_plain(headers):
            return
        check_expectations(headers)
        if scope["method"] == "POST":
            check_content(headers)
            self._origins.check(headers, header(scope, b"host"))


async def _on_http_exception(request: Request, error: Exception) -> Plain:
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    method, path = request.method, request.url.path[:256]
    if status == 404:
        problem = ApiError(404, f"There is no route {path}.", code="not_found")
    elif status == 405:
        problem = ApiError(405, f"{method} is not allowed on {path}.", code="method_not_allowed")
    else:
        problem = ApiError(status, str(getattr(error, "detail", "") or "The request failed."))
    return _plain(request, problem, headers)


async def _on_crash(request: Request, error: Exception) -> Plain:
    return _plain(request, crashed(), {})


def _plain(request: Request, problem: ApiError, headers: dict[str, str]) -> Plain:
    name, label = label_header(request.scope)
    headers[name.decode()] = label.decode()
    return Plain(problem.body(), problem.status, headers, media_type="application/json")


class WebPages:
    """The small endpoints: models, probes, metrics, cluster, traces, version and the page."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._created = int(service.metrics.started_s)
        self._page = STATIC_PAGE.read_bytes()

    def _model(self) -> dict[str, Any]:
        limits = self._service.dispatcher.limits()
        return {
            "id": self._service.config.served_model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "baton",
            "max_model_len": limits.context_tokens if limits is not None else None,
        }

    async def models(self, scope: Scope, raw: bytes) -> Reply:
        return Reply(encode_json({"object": "list", "data": [self._model()]}))

    async def model(self, scope: Scope, raw: bytes) -> Reply:
        check_model(scope["path_params"]["model_id"], self._service.config.served_model_name)
        return Reply(encode_json(self._model()))

    async def health(self, scope: Scope, raw: bytes) -> Reply:
        return Reply(b'{"status":"ok"}')

    async def ready(self, scope: Scope, raw: bytes) -> Reply:
        dispatcher = self._service.dispatcher
        if dispatcher.draining:
            raise dispatcher.unavailable("The server is shutting down.", "draining")
        if not dispatcher.can_take_work:
            raise dispatcher.unavailable(
                "No workers are ready: a prefill and a decode worker, or a unified one, are needed.",
                "no_workers",
            )
        return Reply(b'{"status":"ready"}')

    async def metrics(self, scope: Scope, raw: bytes) -> Reply:
        body = exposition(self._service.metrics, self._service.dispatcher.snapshot())
        return Reply(body, b"text/plain; version=0.0.4; charset=utf-8")

    async def memory(self, scope: Scope, raw: bytes) -> Reply:
        return Reply(encode_json(memory_values(self._service.dispatcher)))

    async def cluster(self, scope: Scope, raw: bytes) -> Reply:
        service = self._service
        now_s = asyncio.get_running_loop().time()
        values = cluster_values(service.config, service.dispatcher, service.metrics, now_s)
        return Reply(encode_json(values), headers=[(b"cache-control", b"no-store")])

    async def trace(self, scope: Scope, raw: bytes) -> Reply:
        label = label_of(scope["path_params"]["label"].encode("latin-1", "ignore"))
        found = await self._service.dispatcher.traces.trace(scope.get("baton.api_key"), label)
        return Reply(encode_json(found), headers=[(b"cache-control", b"no-store")])

    async def version(self, scope: Scope, raw: bytes) -> Reply:
        return Reply(encode_json({"version": VERSION}))

    async def index(self, scope: Scope, raw: bytes) -> Reply:
        return Reply(self._page, b"text/html; charset=utf-8", headers=_PAGE_HEADERS)

    async def favicon(self, scope: Scope, raw: bytes) -> Reply:
        return Reply(b"", TEXT, 204)


def build_app(service: Service) -> Gate:
    """The whole application, ready to be served."""
    pages = WebPages(service)
    config = service.config
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_crash)
    small: list[tuple[str, str, Answer]] = [
        ("GET", "/v1/models", pages.models),
        ("GET", "/v1/models/{model_id:path}", pages.model),
        ("GET", "/health", pages.health),
        ("GET", "/ready", pages.ready),
        ("GET", "/metrics", pages.metrics),
        ("GET", "/memory", pages.memory),
        ("GET", "/cluster", pages.cluster),
        ("GET", "/trace/{label:path}", pages.trace),
        ("GET", "/version", pages.version),
        ("GET", "/", pages.index),
        ("GET", "/favicon.ico", pages.favicon),
    ]
    posts: dict[str, App] = {
        "/v1/chat/completions": GenerateEndpoint(service, chat=True),
        "/v1/completions": GenerateEndpoint(service, chat=False),
    }
    tokens: dict[str, App] = {
        "/tokenize": TokensEndpoint(service, "tokenize"),
        "/detokenize": TokensEndpoint(service, "detokenize"),
    }
    # The gate takes their POSTs; other methods on their paths are answered here, with 405.
    routes = [Route(path, endpoint, methods=["POST"]) for path, endpoint in {**posts, **tokens}.items()]
    routes += [Route(path, Endpoint(answer, config), methods=[method]) for method, path, answer in small]
    app.router.routes.extend(routes)
    return Gate(app, posts, config)
