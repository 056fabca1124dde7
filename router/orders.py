"""What an endpoint asks of the dispatcher."""

from msgspec import Struct

from router.requests import Output
from services.messages import Sampling


class Order(Struct, frozen=True):
    """One prompt to run."""

    prompt: list[int]
    sampling: Sampling
    choices: int
    salt: bytes
    output: Output
