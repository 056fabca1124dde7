"""What an endpoint asks of the dispatcher."""

from msgspec import Struct

from router.routing.attempt import AttemptListener
from services.protocol.messages import Sampling


class PromptRequest(Struct, frozen=True):
    """One prompt to run."""

    prompt: list[int]
    sampling: Sampling
    choices: int
    salt: bytes
    output: AttemptListener
