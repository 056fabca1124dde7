"""The control socket of a launcher: `baton scale` sends one command, and gets lines until it is carried out.

The socket lies in the launcher's run directory, which only its user can enter. A line is a JSON object.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from deploy.errors import UserError
from deploy.launcher.scale_plan import Scale

_MAX_LINE_BYTES = 1 << 16
_CONNECT_S = 2.0


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of the launcher's answer. The last one has an `end`; that of "refused" is the reason."""

    text: str
    end: Literal["done", "refused"] | None = None


ScaleHandler = Callable[[Scale, Callable[[str], None]], Awaitable[None]]
"""Carries out a command, and calls its second argument with lines of progress. Raises UserError."""


@contextlib.asynccontextmanager
async def control_server(path: Path, handler: ScaleHandler) -> AsyncIterator[None]:
    """A server at `path`, while the block runs, for one command a connection."""

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def send(text: str, end: Literal["done", "refused"] | None = None) -> None:
            # The client may be gone; its command is carried out all the same.
            writer.write(msgspec.json.encode(Line(text, end)) + b"\n")

        try:
            wanted = msgspec.json.decode(await reader.readline(), type=Scale)
            await handler(wanted, send)
            send("", "done")
        except UserError as error:
            send(str(error), "refused")
        except (msgspec.MsgspecError, ValueError) as error:
            send(f"not a command: {error}", "refused")
        finally:
            with contextlib.suppress(OSError):
                writer.close()
                await writer.wait_closed()

    server = await asyncio.start_unix_server(on_connection, path, limit=_MAX_LINE_BYTES)
    try:
        yield
    finally:
        server.close()


def request_scale(paths: list[Path], wanted: Scale) -> Iterator[str]:
    """Sends `wanted` to the first launcher that listens at one of `paths`; yields its lines of progress.

    Raises UserError if none listens, it refuses, or it ends meanwhile.
    """
    with _connected(paths) as connection:
        connection.sendall(msgspec.json.encode(wanted) + b"\n")
        with connection.makefile("rb") as lines:
            for raw in lines:
                line = msgspec.json.decode(raw, type=Line)
                if line.end == "refused":
                    raise UserError(line.text)
                if line.end == "done":
                    return
                yield line.text
    raise UserError("the launcher ended before this was done")


def _connected(paths: list[Path]) -> socket.socket:
    for path in paths:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(_CONNECT_S)
        try:
            connection.connect(str(path))
        except OSError:
            connection.close()
            continue
        connection.settimeout(None)
        return connection
    raise UserError("no launcher listens there any more")
