"""A process that prepares large bodies: `python -m router.prepare.process MODEL_DIR PARENT_PID DESCRIPTOR`.

1. Die with the parent, and leave its signals to it.
2. Load the tokenizer and the chat template that the router has loaded.
3. Take one body after the other from the socket, and answer each; until the socket is closed, or until one
   takes more than `CPU_LIMIT_S` of computing: then the kernel ends this process (SIGXCPU).

On the socket every message is its length in four bytes and msgpack; behind it come the bytes that it
announces, as they are: the body, the answer's JSON, or the prompts' tokens as 32-bit integers.
"""

import array
import logging
import resource
import signal
import socket
import struct
import sys
import time
from pathlib import Path

import msgspec
from msgspec import Struct

from router.chat.chat_template import ChatTemplate
from router.child_process import die_with
from router.errors import ApiError, crashed
from router.openai.requests import BodyDecoder
from router.prepare.parameters import Options
from router.prepare.request import Kit, PreparedRequest, PrepareInput, prepare
from router.text.conversion import Converted
from router.text.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

LENGTH = struct.Struct("<I")
CPU_LIMIT_S = 60
"""Of one body. The template's own limit is far below: what is left is a tokenizer, slow on its text."""
TOKEN_BYTES = 4
"""Of one token on the socket, as `array("i")` has it."""


class Setup(Struct, frozen=True):
    """The first message. `converted` is the tokenizer of a checkpoint without tokenizer.json."""

    model: str
    converted: Converted | None


class PrepareJob(Struct, frozen=True):
    ask: PrepareInput
    body_bytes: int


class PreparationRefused(Struct, frozen=True, tag=True):
    """An ApiError."""

    status: int
    message: str
    param: str | None
    code: str | None
    retry_after_s: int | None


class Page(Struct, frozen=True, tag=True):
    size_bytes: int


class Generation(Struct, frozen=True, tag=True):
    """`texts`, `tokens` (how many) and `of_ids` of each prompt."""

    options: Options
    texts: list[str | None]
    tokens: list[int]
    of_ids: list[bool]


Answer = PreparationRefused | Page | Generation
encode = msgspec.msgpack.Encoder().encode
decode_answer = msgspec.msgpack.Decoder(Answer).decode


def framed(message: Struct) -> bytes:
    body = encode(message)
    return LENGTH.pack(len(body)) + body


def refusal(error: ApiError) -> PreparationRefused:
    return PreparationRefused(error.status, error.message, error.param, error.code, error.retry_after_s)


def run(model_dir: Path, parent_pid: int, descriptor: int) -> None:
    die_with(parent_pid)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, meant for the router, which drains
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rb", 1 << 20) as arriving:

        def take(size_bytes: int) -> bytes:
            taken: bytes = arriving.read(size_bytes)
            if len(taken) < size_bytes:
                raise SystemExit(0)  # the router has closed it
            return taken

        def message() -> bytes:
            size_bytes: int = LENGTH.unpack(take(LENGTH.size))[0]
            return take(size_bytes)

        setup = msgspec.msgpack.decode(message(), type=Setup)
        tokenizer = TextTokenizer(model_dir, setup.converted)
        # By the time that it computes: others may have the processor meanwhile.
        template = ChatTemplate(model_dir, tokenizer.special_tokens, clock=time.process_time)
        template.learn()
        kit = Kit(setup.model, tokenizer, template, BodyDecoder())
        works = msgspec.msgpack.Decoder(PrepareJob)
        while True:
            work = works.decode(message())
            raw = take(work.body_bytes)
            _limit_cpu()
            for piece in answer(kit, work.ask, raw):
                connection.sendall(piece)


def _limit_cpu() -> None:
    until_s = int(time.process_time()) + 1 + CPU_LIMIT_S
    _, most_s = resource.getrlimit(resource.RLIMIT_CPU)
    if most_s == resource.RLIM_INFINITY or until_s < most_s:
        resource.setrlimit(resource.RLIMIT_CPU, (until_s, most_s))


def answer(kit: Kit, ask: PrepareInput, raw: bytes) -> list[bytes]:
    """What goes onto the socket."""
    try:
        made = prepare(kit, ask, raw)
    except ApiError as error:
        return [framed(refusal(error))]
    except Exception:
        logger.exception("a body could not be prepared")
        return [framed(refusal(crashed()))]
    if isinstance(made, PreparedRequest):
        head = Generation(
            made.options,
            [prompt.text for prompt in made.prompts],
            [len(prompt.tokens) for prompt in made.prompts],
            [prompt.of_ids for prompt in made.prompts],
        )
        return [framed(head), *[array.array("i", prompt.tokens).tobytes() for prompt in made.prompts]]
    return [framed(Page(len(made))), made]


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
