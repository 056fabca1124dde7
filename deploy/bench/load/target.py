"""The endpoint under load: its address, and what it says of its model."""

import urllib.error
import urllib.request
from dataclasses import dataclass
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from deploy.bench.load.errors import LoadError

_TIMEOUT_S = 10.0
_MOST_BYTES = 1 << 20


class _Model(Struct, frozen=True):
    id: str
    max_model_len: int | None = None


class _Models(Struct, frozen=True):
    data: list[_Model]


@dataclass(frozen=True, slots=True)
class Target:
    """Where completions are asked for. `head` is a request's, up to the value of its content-length; the
    paths of the API begin after `base`."""

    base: str
    api_key: str | None
    host: str
    port: int
    tls: bool
    head: bytes


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model behind an endpoint. `max_model_len` is None where the server does not say."""

    name: str
    max_model_len: int | None


def target_of(url: str, api_key: str | None) -> Target:
    """The endpoint at a base address, with or without `/v1`. Raises LoadError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise LoadError(f"{url!r}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise LoadError(f"{url!r} is not an http:// or https:// address")
    if parts.query or parts.fragment or parts.username:
        raise LoadError(f"{url!r} must be a base address, like http://127.0.0.1:8000")
    tls = parts.scheme == "https"
    base = url.rstrip("/").removesuffix("/v1")
    path = parts.path.rstrip("/").removesuffix("/v1") + "/v1/completions"
    lines = [f"POST {path} HTTP/1.1", f"host: {parts.netloc}", "content-type: application/json"]
    if api_key is not None:
        lines.append(f"authorization: Bearer {api_key}")
    head = "\r\n".join([*lines, "content-length: "]).encode()
    return Target(base, api_key, parts.hostname, port or (443 if tls else 80), tls, head)


def served_model(url: str, api_key: str | None, wanted: str | None) -> ServedModel:
    """One model of `GET /v1/models`: the one named `wanted`, else the first. Raises LoadError."""
    address = url.rstrip("/").removesuffix("/v1") + "/v1/models"
    request = urllib.request.Request(address)
    if api_key is not None:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            models = msgspec.json.decode(answer.read(_MOST_BYTES), type=_Models).data
    except urllib.error.HTTPError as error:
        hint = "; give --api-key" if error.code in (401, 403) else ""
        raise LoadError(f"{address} answered {error.code}{hint}") from None
    except msgspec.MsgspecError as error:
        raise LoadError(f"{address} did not answer with models: {error}") from None
    except (OSError, ValueError) as error:
        raise LoadError(f"{address} cannot be reached: {getattr(error, 'reason', error)}") from None
    for model in models:
        if wanted in (None, model.id):
            return ServedModel(model.id, model.max_model_len)
    if not models:
        raise LoadError(f"{address} names no model")
    raise LoadError(f"{address} names no model {wanted!r}, but {', '.join(one.id for one in models)}")
