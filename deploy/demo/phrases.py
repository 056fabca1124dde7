"""How users put things: question forms, and the small changes that people make to them.

The forms are in lower case and without an end mark; :func:`dress` adds those, as people do, most of the time.
"""

from __future__ import annotations

import random

from deploy.demo.tales import HE_NAMES, SHE_NAMES

TERM_FORMS = (
    "what is {t}", "what is {t}", "what is {t}", "what's {t}", "whats {t}", "what are {t}",
    "what does {t} mean", "explain {t}", "explain {t} to me", "can you explain {t}",
    "could you explain {t} to me", "tell me about {t}", "tell me what {t} is", "describe {t}", "define {t}",
    "{t}", "what do you know about {t}", "what is meant by {t}", "i do not understand {t}",
    "i don't know what {t} is", "how does {t} work", "what exactly is {t}", "what is {t} in llm serving",
    "what is {t} good for", "do you know what {t} is", "teach me about {t}",
    "give me a short explanation of {t}", "why do we need {t}", "how would you explain {t} to a child",
    "i want to know about {t}", "what is the meaning of {t}", "help me understand {t}", "and what is {t}",
    "what is {t} and why is it useful", "what is {t} and how does it work", "what does {t} do",
    "why is {t} important", "how is {t} used in serving", "what can you tell me about {t}",
    "in simple words, what is {t}", "can you tell me what {t} is", "please explain what {t} is",
)  # fmt: skip
BEFORE = (
    "please ", "hi, ", "hello, ", "hey, ", "so, ", "ok, ", "and ", "thanks! ", "now ", "well, ", "baton, ",
)  # fmt: skip
AFTER = (
    " please", " in simple words", " in short", " briefly", " for me", " again", " exactly",
    " in one sentence",
)  # fmt: skip
MORE_ASKS = (
    "tell me more", "more", "go on", "can you say more", "more details please", "what else", "and then",
    "please go on", "i want to know more", "continue", "can you explain more", "tell me more about it",
)  # fmt: skip
YES = ("yes", "yes please", "sure", "of course", "i would like that", "ok, go on", "yes, a story", "yeah")
SYSTEMS = (
    "You are a helpful assistant.", "You are a helpful assistant.", "You are the demo model of Baton.",
    "You are a small demo model that tells tales and answers questions about serving.", "Be kind.",
    "You are a friendly teller of tales.", "Answer in simple English.", "You are a chat bot. Be polite.",
)  # fmt: skip
BRIEF_SYSTEMS = (
    "Answer in one sentence.", "Be brief.", "You are a helpful assistant. Answer in one sentence.",
)  # fmt: skip

TALE_ASKS = (
    "tell me a story", "tell me a tale", "can you tell me a story", "i would like to hear a story",
    "tell a story", "write a story", "write me a short story", "please tell me a short tale",
    "do you have a story for me", "story", "a story please", "another story", "tell me another one",
    "make up a story", "tell me something nice", "tell me a bedtime story", "give me a story",
    "write a short tale", "one more story please", "story time",
)  # fmt: skip
ABOUT_FORMS = (
    "tell me a story about {w}", "tell me a story about {w}", "tell me a tale about {w}", "a story about {w}",
    "can you tell me a story about {w}", "write a story about {w}", "write me a short story about {w}",
    "story about {w}", "do you know a tale about {w}", "i want a story about {w}", "another story about {w}",
    "please tell me a short story about {w}", "make up a story about {w}", "tell me about {w}",
    "write about {w}",
)  # fmt: skip
STRANGE_HEROES = (
    "submarine", "teapot", "banana", "spaceship", "computer", "president", "cactus", "vampire", "potato",
    "volcano", "train", "ninja", "tomato", "server", "penguin", "unicorn", "giraffe", "shark",
)  # fmt: skip
WHO_ASKS = (
    "who is the story about", "who was in the story", "who are they", "who was it about", "what was it about",
    "who is the tale about", "who is in this story", "what is this story about",
)  # fmt: skip
MORAL_ASKS = (
    "what is the moral", "what is the moral of the story", "what can i learn from it", "what does it teach",
    "what is the point of the story", "what do we learn from this tale",
)  # fmt: skip
USER_NAMES = (
    *HE_NAMES, *SHE_NAMES, "Anna", "Ben", "David", "Eva", "Emma", "John", "Julia", "Maria", "Paul", "Peter",
    "Lisa", "Mark", "Nina", "Alex", "Chris", "Kim", "Li", "Omar", "Priya", "Yuki",
)  # fmt: skip
NAME_FORMS = ("my name is {n}", "i am {n}", "hi, i am {n}", "hello, my name is {n}", "call me {n}", "i'm {n}")
NAME_ASKS = (
    "what is my name", "do you remember my name", "who am i", "do you know my name", "what am i called",
)  # fmt: skip
QUESTION_WORDS = frozenset(
    (
        "what",
        "what's",
        "whats",
        "why",
        "how",
        "who",
        "is",
        "do",
        "does",
        "can",
        "could",
        "are",
        "which",
        "where",
    )
)
NAMES_OF_THINGS = (("kv ", "KV "), ("baton", "Baton"), ("llm", "LLM"), ("ttft", "TTFT"), (" i ", " I "))


def _typo(rng: random.Random, text: str) -> str:
    at = rng.randrange(1, len(text) - 1)
    kind = rng.randrange(3)
    if kind == 0:
        return text[:at] + text[at + 1 :]
    if kind == 1:
        return text[:at] + text[at] + text[at:]
    return text[: at - 1] + text[at] + text[at - 1] + text[at + 1 :]


def dress(rng: random.Random, ask: str, end: str = "?") -> str:
    """Write a question as users do: with or without capitals, marks, a polite word, a slip of the finger."""
    if rng.random() < 0.12:
        ask = rng.choice(BEFORE) + ask
    if rng.random() < 0.08:
        ask += rng.choice(AFTER)
    if len(ask) > 6 and rng.random() < 0.06:
        ask = _typo(rng, ask)
    if rng.random() < 0.65:
        for low, up in NAMES_OF_THINGS:
            ask = ask.replace(low, up)
        return ask[0].upper() + ask[1:] + end
    return ask + rng.choice((end, "", ""))
