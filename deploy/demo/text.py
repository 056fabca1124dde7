"""Writes the training text of the demo model: tales, notes about serving, and chats.

Everything comes from the grammar in this folder and one seed, so the text needs no download and no licence of
others, and two runs give the same bytes. Run ``python -m deploy.demo.text`` to look at some of it.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from deploy.demo.facts import FACTS, Topic
from deploy.demo.facts_more import FACTS_MORE
from deploy.demo.phrases import (
    ABOUT_FORMS,
    BRIEF_SYSTEMS,
    MORAL_ASKS,
    MORE_ASKS,
    NAME_ASKS,
    NAME_FORMS,
    QUESTION_WORDS,
    STRANGE_HEROES,
    SYSTEMS,
    TALE_ASKS,
    TERM_FORMS,
    USER_NAMES,
    WHO_ASKS,
    YES,
    dress,
)
from deploy.demo.smalltalk import SMALLTALK, UNKNOWN_FIRST, UNKNOWN_REST
from deploy.demo.tales import HEROES, Cast, Tale, draw_cast, plural, tell, with_article
from deploy.demo.unknown import unknown_question

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

NO_MORE = "That is all I know about it. Ask me about something else, or ask for a story."
SERVING: dict[str, Topic] = FACTS | FACTS_MORE
# A newcomer asks about these first, so the model sees them more often than the rest.
COMMON = (
    "prefill", "decode", "difference", "kv_cache", "disaggregation", "why_split", "baton", "name", "transfer",
)  # fmt: skip


@dataclass(frozen=True)
class ChatTurn:
    """One turn of a chat."""

    role: str
    content: str


Document = str | list[ChatTurn]


def render_chat(messages: list[ChatTurn]) -> str:
    """The chat as the model's chat template writes it (a test holds the two together)."""
    return "".join(f"{TURN_START}{m.role}\n{m.content}{TURN_END}\n" for m in messages)


def render(document: Document) -> str:
    """Any document as training text, closed by the end-of-text token."""
    return (document if isinstance(document, str) else render_chat(document)) + END_OF_TEXT


def first_sentence(text: str) -> str:
    """What is left of an answer when the system prompt asks for one sentence."""
    for mark in (". ", "! ", "? "):
        head, found, _ = text.partition(mark)
        if found and "!" not in head and "?" not in head:
            return head + mark.strip()
    return text


def _pair(ask: str, answer: str) -> list[ChatTurn]:
    return [ChatTurn("user", ask), ChatTurn("assistant", answer)]


def _topic_ask(rng: random.Random, topic: Topic) -> str:
    if topic.terms and (not topic.asks or rng.random() < 0.55):
        ask = rng.choice(TERM_FORMS).format(t=rng.choice(topic.terms))
    else:
        ask = rng.choice(topic.asks)
    return dress(rng, ask, "?" if ask.split()[0] in QUESTION_WORDS else rng.choice(".!"))


def _talk(rng: random.Random, topic: Topic) -> list[ChatTurn]:
    turns = _pair(_topic_ask(rng, topic), rng.choice(topic.answers))
    if (topic.more or topic.terms) and rng.random() < 0.15:
        turns += _pair(dress(rng, rng.choice(MORE_ASKS), "."), topic.more or NO_MORE)
    return turns


def _about(rng: random.Random, cast: Cast) -> str:
    """Some of the cast, as a user would ask for it."""
    hero = with_article(cast.hero)
    roll = rng.random()
    if roll < 0.42:
        return hero
    if roll < 0.55:
        return rng.choice((plural(cast.hero), f"the {cast.hero}", f"my {cast.hero}"))
    if roll < 0.7:
        return f"{hero} and {with_article(cast.friend)}"
    if roll < 0.85:
        return f"{hero} and {with_article(cast.thing)}"
    return f"{hero} named {cast.name}"


def _tale_questions(rng: random.Random, tale: Tale) -> tuple[str, str]:
    cast = tale.cast
    roll = rng.random()
    if roll < 0.4:
        text = f"The tale is about {cast.name} the {cast.hero} and {cast.fname} the {cast.friend}."
        return dress(rng, rng.choice(WHO_ASKS)), text
    if roll < 0.7:
        return dress(rng, rng.choice(MORAL_ASKS)), tale.moral
    kind, name = rng.choice(((cast.hero, cast.name), (cast.friend, cast.fname)))
    ask = rng.choice(("what is the name of the {k}", "what was the {k} called", "how is the {k} called"))
    return dress(rng, ask.format(k=kind)), f"The {kind} is named {name}."


def _story(rng: random.Random) -> list[ChatTurn]:
    cast = draw_cast(rng)
    tale = tell(rng, cast)
    roll = rng.random()
    if roll < 0.35:
        ask = rng.choice(TALE_ASKS)
        intro = rng.choice(("", f"Here is a tale about {with_article(cast.hero)}. "))
    elif roll < 0.92:
        ask, intro = rng.choice(ABOUT_FORMS).format(w=_about(rng, cast)), ""
    else:
        strange = with_article(rng.choice(STRANGE_HEROES))
        ask = rng.choice(ABOUT_FORMS[:-2]).format(w=strange)
        intro = f"I do not know a tale about that, but here is one about {with_article(cast.hero)}. "
    turns = _pair(dress(rng, ask, rng.choice(".!")), intro + tale.text)
    if rng.random() < 0.35:
        turns += _pair(*_tale_questions(rng, tale))
    return turns


def _reading(rng: random.Random) -> list[ChatTurn]:
    """The user pastes a tale and asks about it, so that prompts of a few hundred tokens are nothing new."""
    tale = tell(rng)
    question, answer = _tale_questions(rng, tale)
    lead = rng.choice(("Here is a tale: ", "Read this: ", "Read this tale. ", ""))
    content = f"{lead}{tale.text} {question}" if rng.random() < 0.7 else f"{question} {tale.text}"
    return _pair(content, answer)


def _unknown(rng: random.Random) -> list[ChatTurn]:
    question = unknown_question(rng)
    if rng.random() < 0.3:
        question = question.lower().rstrip("?.")
    return _pair(question, UNKNOWN_FIRST + rng.choice(UNKNOWN_REST))


def _animal(rng: random.Random) -> list[ChatTurn]:
    word = with_article(rng.choice(HEROES))
    answer = f"I know {word} only from tales. Would you like to hear a story?"
    return _pair(dress(rng, f"what is {word}"), answer)


def _yes(rng: random.Random) -> list[ChatTurn]:
    """Takes up the offer of a story."""
    return _pair(dress(rng, rng.choice(YES), rng.choice(".!")), tell(rng).text)


def _name(rng: random.Random) -> list[ChatTurn]:
    name = rng.choice(USER_NAMES)
    hello = f"Hello, {name}! I can tell you a story or answer questions about serving."
    turns = _pair(dress(rng, rng.choice(NAME_FORMS).format(n=name), "."), hello)
    if rng.random() < 0.6:
        if rng.random() < 0.4:
            turns += _talk(rng, _pick_topic(rng))
        turns += _pair(dress(rng, rng.choice(NAME_ASKS)), f"Your name is {name}.")
    return turns


def _pick_topic(rng: random.Random) -> Topic:
    if rng.random() < 0.45:
        return SERVING[rng.choice(COMMON)]
    return SERVING[rng.choice(tuple(SERVING))]


def _any_exchange(rng: random.Random) -> list[ChatTurn]:
    roll = rng.random()
    if roll < 0.36:
        return _talk(rng, _pick_topic(rng))
    if roll < 0.60:
        return _talk(rng, SMALLTALK[rng.choice(tuple(SMALLTALK))])
    if roll < 0.78:
        return _unknown(rng)
    if roll < 0.89:
        return _story(rng)
    if roll < 0.93:
        return _reading(rng)
    return _name(rng) if roll < 0.97 else _animal(rng)


def chat(rng: random.Random) -> list[ChatTurn]:
    """A chat of one or more exchanges, with a system prompt in a third of the cases."""
    turns: list[ChatTurn] = []
    exchanges = rng.choice((1, 1, 1, 1, 2, 2, 3, 5))
    for _ in range(exchanges):
        turns += _any_exchange(rng)
        if turns[-1].content.endswith("story?") and rng.random() < 0.2:
            turns += _yes(rng)
    roll = rng.random()
    if roll < 0.25:
        return [ChatTurn("system", rng.choice(SYSTEMS)), *turns]
    if roll < 0.31 and all(len(m.content) < 300 for m in turns):
        short = [ChatTurn(m.role, first_sentence(m.content)) if m.role == "assistant" else m for m in turns]
        return [ChatTurn("system", rng.choice(BRIEF_SYSTEMS)), *short]
    return turns


def notes(rng: random.Random) -> str:
    """A plain page about serving, so that raw completion has more than tales to go on with."""
    topics = rng.sample(tuple(SERVING.values()), rng.randint(2, 5))
    return "\n".join(f"{rng.choice(t.answers)} {t.more}".rstrip() for t in topics)


def document(rng: random.Random) -> Document:
    """One document of any kind."""
    roll = rng.random()
    if roll < 0.2:
        return tell(rng).text
    return notes(rng) if roll < 0.25 else chat(rng)


def documents(seed: int, size: int) -> Iterator[Document]:
    """Documents until about ``size`` bytes of text are written; the same seed gives the same documents."""
    rng = random.Random(seed)
    written = 0
    while written < size:
        made = document(rng)
        written += len(render(made).encode())
        yield made


if __name__ == "__main__":
    for shown in documents(int(sys.argv[1]) if len(sys.argv) > 1 else 0, 8000):
        print(render(shown), end="\n\n")
