"""What an endpoint asks of the dispatcher."""

from dataclasses import dataclass

from router.requests import Output
from services.messages import Sampling


@dataclass(frozen=True, slots=True)
class Order:
    """One prompt to run."""

    prompt: list[int]
    sampling: Sampling
    choices: int
    salt: bytes
    output: Output
