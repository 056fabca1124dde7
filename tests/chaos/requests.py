"""The requests of a run, drawn from its seed: every length, both ways to answer, good and bad ones.

There are few enough that each one's right answer is computed once (reference.py), and many clients ask for
them again and again.
"""

from dataclasses import dataclass
from random import Random
from typing import Any

from tests.checkpoints import VOCAB_SIZE

MAX_MODEL_LEN = 2048
LONGEST_PROMPT_TOKENS = 1500
MODEL = "tiny"
INVALID: list[dict[str, Any]] = [
    {"prompt": []},
    {"prompt": [VOCAB_SIZE]},
    {"prompt": [1] * MAX_MODEL_LEN},
    {"n": 0},
    {"max_tokens": -1},
    {"top_p": 2.0},
]
STOPS = [[" the", "in"], ["e"], [" was", " of", "q"]]


@dataclass(frozen=True)
class Plan:
    """One request. `cut_after` is the number of stream events that the client reads before it hangs up."""

    number: int
    body: dict[str, Any]
    expect_status: int = 200
    cut_after: int | None = None

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def choices(self) -> int:
        return int(self.body["n"])


def sample_plans(seed: int, count: int) -> list[Plan]:
    """The same for the same seed. Of ten plans, one is cut off, one is invalid and four more stream."""
    random = Random(f"requests {seed}")
    return [_draw(random, number) for number in range(count)]


def _draw(random: Random, number: int) -> Plan:
    short, long = random.randint(3, 200), random.randint(200, LONGEST_PROMPT_TOKENS)
    length = random.choice([1, 15, 16, 17, short, short, long, long])
    body: dict[str, Any] = {
        "model": MODEL,
        "prompt": [random.randrange(10, VOCAB_SIZE) for _ in range(length)],
        "max_tokens": random.choice([1, 2, 20, 60, 150, 300]),
        "temperature": random.choice([0, 0, 0.7, 1.2]),
        "n": random.choice([1, 1, 1, 2, 3]),
        "seed": 1000 + number,
        "ignore_eos": random.random() < 0.7,
    }
    if random.random() < 0.25:
        body["stop"] = random.choice(STOPS)
    if random.random() < 0.25:
        body |= {"presence_penalty": 0.5, "frequency_penalty": 0.2, "top_k": 40}
    streamed = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": 0}
    match number % 10:
        case 0:
            endless = {"max_tokens": 200, "ignore_eos": True}
            return Plan(number, body | streamed | endless, cut_after=random.randint(1, 60))
        case 1:
            return Plan(number, body | random.choice(INVALID), expect_status=400)
        case 2 | 3 | 4 | 5:
            return Plan(number, body | streamed)
        case _:
            return Plan(number, body | {"return_token_ids": True})
