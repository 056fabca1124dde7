"""The router process.

1. Load the tokenizer, converted by a short-lived process where the checkpoint has no tokenizer.json, and the
   chat template; a bad directory ends here, with one message.
2. Connect to the workers (they may come later) and listen for HTTP.
3. Say "ready" in one line, with the address.
4. Serve: validate, tokenize, dispatch, stream.
5. On SIGTERM or SIGINT: answer new requests with 503, let what runs finish for `drain_timeout_s`, fail what
   is left with a clear error, close the workers' connections, and go. A second signal skips the wait.
"""

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from router.api.app import build_app
from router.api.generate import Service
from router.api.http_connection import connection_with
from router.chat.chat_template import ChatTemplate
from router.config import RouterConfig, RouterConfigError
from router.errors import ApiError
from router.openai.requests import BodyDecoder
from router.prepare.generation_config import sampling_defaults
from router.prepare.process_pool import ProcessPool
from router.prepare.request import BESIDE_BYTES, BESIDE_TEMPLATE_S, Kit
from router.routing.dispatcher import Dispatcher
from router.routing.metrics import Metrics
from router.routing.routed_request import RetryBudget
from router.text.tokenizer import TextTokenizer
from services.protocol.client import ClientConfigError

logger = logging.getLogger(__name__)

GC_THRESHOLDS = (20_000, 20, 20)
"""A request makes some hundred objects and hardly a cycle: the default looks at them with every other one."""
UNSENT_BYTES = 128 << 10
"""Of one connection, in the kernel and not on the wire yet."""
LAST_WRITES_S = 2
"""After the drain: how long responses that have ended may take to leave."""


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling: what a signal means here is the drain's business."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(config: RouterConfig) -> None:
    """Runs until a signal ends it. Raises RouterConfigError before anything listens."""
    service = build_service(config)
    listener = _listen(config)
    server = _Server(
        uvicorn.Config(
            build_app(service),
            loop="uvloop",
            http=connection_with(config.upload_timeout_s),
            ws="none",
            lifespan="off",
            access_log=False,
            proxy_headers=False,  # nobody here asks who the client is
            log_config=None,
            log_level="warning",
            timeout_keep_alive=config.keep_alive_timeout_s,  # type: ignore[arg-type]  # it takes parts of one
            server_header=False,
            timeout_graceful_shutdown=LAST_WRITES_S,
        )
    )
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(_serve(config, service, server, listener))


def build_service(config: RouterConfig) -> Service:
    """Steps 1 and, without its sockets, 2. Raises RouterConfigError."""
    defaults = sampling_defaults(config.model_dir, config.generation_config)
    tokenizer = TextTokenizer(config.model_dir)
    template = ChatTemplate(config.model_dir, tokenizer.special_tokens, time_limit_s=BESIDE_TEMPLATE_S)
    template.learn()
    kit = Kit(config.served_model_name, tokenizer, template, BodyDecoder(), max_characters=2 * BESIDE_BYTES)
    beside = ProcessPool(
        config.model_dir, config.served_model_name, tokenizer.converted, config.retry_after_s
    )
    metrics = Metrics(retries=RetryBudget(config.max_retries, config.retry_share, config.retry_burst))
    try:
        dispatcher = Dispatcher(config, metrics)
    except ClientConfigError as error:
        raise RouterConfigError(str(error)) from error
    logger.info("%s", defaults.describe())
    return Service(config, kit, beside, dispatcher, metrics, defaults=defaults)


def _listen(config: RouterConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit both. A client that reads nothing is cut off by the kernel, whatever this process
    # does meanwhile; and little of what such a client does not read is kept there.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(config.stall_timeout_s * 1000))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    try:
        listener.bind((config.host, config.port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise RouterConfigError(
            f"host/port: cannot listen on {config.host}:{config.port}: {error}"
        ) from error
    listener.setblocking(False)
    return listener


async def _serve(config: RouterConfig, service: Service, server: _Server, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    dispatcher = service.dispatcher
    try:
        dispatcher.start()
    except ClientConfigError as error:
        dispatcher.close()
        listener.close()
        raise RouterConfigError(str(error)) from error
    draining = asyncio.Event()
    hurried = asyncio.Event()

    def on_signal() -> None:
        (hurried if draining.is_set() else draining).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    # What exists by now stays: the collector need not look at it again while streams run.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    serving = loop.create_task(server.serve(sockets=[listener]))
    await server.listening.wait()
    host, port = listener.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    print(f"baton router ready on http://{address}:{port}", flush=True)
    stopping = loop.create_task(draining.wait())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    await _drain(config, dispatcher, hurried)
    server.should_exit = True
    await serving
    stopping.cancel()
    service.beside.close()
    dispatcher.close()


async def _drain(config: RouterConfig, dispatcher: Dispatcher, hurried: asyncio.Event) -> None:
    dispatcher.draining = True
    logger.info("draining: %d prompts in flight", dispatcher.live)
    loop = asyncio.get_running_loop()
    hurry = loop.create_task(hurried.wait())
    idle = loop.create_task(dispatcher.wait_idle())
    await asyncio.wait({hurry, idle}, timeout=config.drain_timeout_s, return_when=asyncio.FIRST_COMPLETED)
    hurry.cancel()
    idle.cancel()
    if dispatcher.live:
        logger.warning("the drain ran out of time: %d prompts are ended", dispatcher.live)
        dispatcher.end_all(ApiError(503, "The server is shutting down.", code="draining", committed=True))
