"""What is counted, and answered, when an endpoint meets something that nobody thought of."""

import asyncio
import json
from pathlib import Path
from typing import Any, cast

from router.api.app import build_app
from router.api.generate import Service
from router.config import RouterConfig
from router.openai.requests import BodyDecoder
from router.routing.limits import RequestLimits
from router.routing.metrics import Metrics


class Broken:
    """A dispatcher with a defect."""

    def limits(self) -> RequestLimits:
        raise ZeroDivisionError("a defect")


def test_a_defect_is_counted_and_answered_in_the_shape_of_every_error() -> None:
    config = RouterConfig(workers=("ipc:///nowhere",), model_dir=Path(), served_model_name="m")
    metrics = Metrics()
    nothing = cast(Any, None)
    service = Service(config, nothing, nothing, cast(Any, Broken()), metrics, BodyDecoder())
    app = build_app(service)
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b'{"prompt": "a"}', "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    async def request() -> str:
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "root_path": ""}
        try:
            await app({**scope, "query_string": b""}, receive, send)
        except ZeroDivisionError as error:  # Goes on to the server, which logs it.
            return str(error)
        return ""

    assert asyncio.run(request()) == "a defect"
    assert metrics.outcomes == {"failed": 1}
    assert sent[0]["status"] == 500
    assert json.loads(sent[1]["body"])["error"]["code"] == "internal_error"
