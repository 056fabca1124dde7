"""Short tales in simple English, put together from a small grammar.

A tale is a list of slots and each slot offers a few wordings, so that a model of two million parameters can
learn the whole space in minutes and still tell a tale that hangs together when it samples. The cast of a tale
(hero, helper, thing) is drawn first, so that in the training text a chat gets the fox and bell it asks for.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

ANIMALS = (
    "fox", "owl", "bear", "rabbit", "mouse", "hedgehog", "otter", "badger", "squirrel", "duck", "frog",
    "turtle", "crow", "cat", "dog", "horse", "goat", "hen", "wolf", "deer", "beaver", "mole", "lion",
    "elephant",
)  # fmt: skip
PEOPLE = (
    "robot", "dragon", "wizard", "knight", "pirate", "sailor", "baker", "farmer", "girl", "boy", "princess",
)  # fmt: skip
HEROES = ANIMALS + PEOPLE
ALWAYS_SHE = frozenset({"girl", "princess", "hen"})
ALWAYS_HE = frozenset({"boy"})

HE_NAMES = ("Pip", "Tom", "Finn", "Oscar", "Hugo", "Ned", "Bram", "Leo", "Max", "Sam")
SHE_NAMES = ("Mina", "Rosa", "Tilly", "Ada", "Hazel", "Ivy", "Nell", "Luna", "Ruby", "Clara")

THINGS = (
    "bell", "lantern", "red hat", "silver key", "blue kite", "map", "drum", "golden coin", "green scarf",
    "basket", "little boat", "book", "ring", "flute",
)  # fmt: skip
PLACES = (
    "at the edge of a quiet forest", "by a slow river", "on a green hill", "near an old mill",
    "in a small village by the sea", "under a tall oak tree", "beside a blue lake",
    "in a valley full of flowers",
)  # fmt: skip
MOODS = ("small", "kind", "curious", "brave", "clever", "shy", "cheerful", "quiet")
FOODS = ("warm bread", "apple pie", "honey cakes", "sweet berries", "hot soup", "fresh plums")

OPENINGS = (
    "Once upon a time, {a_mood} {hero} named {name} lived {place}.",
    "Once upon a time, there was {a_mood} {hero} named {name} who lived {place}.",
    "Long ago, {a_mood} {hero} named {name} lived {place}.",
    "There once was {a_mood} {hero} named {name} who lived {place}.",
)  # fmt: skip

Slot = tuple[str, ...]


@dataclass(frozen=True)
class Plot:
    """Slots in telling order (an empty wording leaves the slot out) and the moral of the tale."""

    slots: tuple[Slot, ...]
    moral: str


PLOTS: dict[str, Plot] = {
    "lost": Plot(
        (
            ("One morning, {name} could not find {his} {thing}.", "One day, {name} lost {his} {thing}."),
            ("{He} looked under the bed and behind the door, but it was not there.",
             "{He} looked all over the house, but it was not there."),
            ("{He} sat down and felt very sad.", ""),
            ("Then {a_friend} named {fname} came by and asked what was wrong.",),
            ('"I have lost my {thing}," said {name}.',),
            ('"Then let us look for it together," said {fname}.',),
            ("They looked until the sun was low.", "They looked in the grass and along the path.", ""),
            ("At last, they found the {thing} under a heap of leaves.",
             "At last, {fname} found the {thing} behind a big stone."),
            ("{name} thanked {fname}, and they shared some {food}.",),
        ),
        "When you have lost something, it is good to ask a friend for help.",
    ),
    "storm": Plot(
        (
            ("One evening, dark clouds came over the hills.", "One night, a great storm came."),
            ("The wind blew hard, and the rain fell on the roof.",),
            ("{name} heard a knock at the door.", "Then {name} heard a soft knock at the door."),
            ("Outside stood {a_friend} named {fname}, wet and cold.",),
            ('"Please, may I come in?" asked {fname}.',),
            ('"Of course," said {name}, and {he} made a warm fire.',),
            ("They ate {food} and told stories all night long.",),
            ("In the morning, the sky was blue again.", "By morning, the storm was gone."),
            ("{fname} gave {name} a {thing} to say thank you.",),
        ),
        "A warm door is the best gift on a cold night.",
    ),
    "relay": Plot(
        (
            ("Every summer, there was a great race around the valley.",),
            ("The road was too long for one runner, so {name} asked {a_friend} named {fname} to help.",),
            ('"I will run up the hill, and you will run down," said {name}.',),
            ("{name} ran first and carried a {thing} in {his} hand.",),
            ("{He} ran as fast as {he} could until {he} had no breath left.", ""),
            ("At the top of the hill, {he} passed the {thing} to {fname}.",),
            ("{fname} held it tight and ran all the way to the end.",),
            ("Together they won the race.", "They came in first, and everyone cheered."),
            ('"Half the road each is no long road at all," said {fname}.', ""),
        ),
        "Two who share the work well go faster than one who does it all.",
    ),
    "seed": Plot(
        (
            ("One spring, {name} found a tiny seed beside {his} {thing}.",),
            ("{He} put it in the ground and gave it water every day.",),
            ("But for a long time, nothing grew.", "Days went by, and nothing grew."),
            ('"Maybe it is only a stone," said {name}.', ""),
            ('"Be patient," said {a_friend} named {fname}.',),
            ("So {name} waited through sun and rain.", "So {name} waited and sang to it every evening."),
            ("One morning, a green leaf came out of the ground.",),
            ("By the end of summer, it was a tall tree full of fruit.",),
            ("{name} and {fname} sat in its shade and ate {food}.",),
        ),
        "Good things take time, so be patient.",
    ),
    "bridge": Plot(
        (
            ("{name} wanted to bring a {thing} to the market, but the old bridge was broken.",),
            ("The water was deep and fast.", "The river was too wide to jump."),
            ("On the other side stood {a_friend} named {fname}.",),
            ('"We could build a new bridge," said {fname}.',),
            ("{name} worked from one side, and {fname} worked from the other.",),
            ("They carried wood and stones for three days.", "They worked for two days and two nights."),
            ("On the last day, they met in the middle and laughed.",),
            ("Then {name} walked across with the {thing}.",),
            ("Now everyone in the valley could cross the river.", ""),
        ),
        "When two work from both sides, they meet in the middle.",
    ),
    "noise": Plot(
        (
            ("One night, {name} heard a strange noise in the dark.",
             "One night, a strange noise woke {name} from {his} sleep."),
            ("Tap, tap, tap, it went.", "It went tap, tap, tap, just like a ghost."),
            ("{name} was afraid, but {he} took {his} {thing} and went outside.",),
            ("{He} walked slowly to the old shed.", "{He} walked slowly around the house."),
            ("There sat {a_friend} named {fname} with a little hammer.",),
            ('"What are you doing here so late?" asked {name}.',),
            ('"I am making a chair for your birthday," said {fname}.',),
            ("{name} laughed, and {he} was not afraid any more.",),
            ("They went inside and ate some {food}.", ""),
        ),
        "Many things that scare us in the dark are kind when we look at them.",
    ),
    "winter": Plot(
        (
            ("One winter, the snow was so deep that there was little to eat.",),
            ("{name} had only some {food} and an old {thing}.",),
            ("On the road {he} met {a_friend} named {fname}, who had nothing at all.",),
            ("{name} thought for a while.", ""),
            ("Then {he} gave {fname} half of the food.",),
            ('"I will not forget this," said {fname}.',),
            ("When spring came, {fname} came back with {food} for two.",),
            ('"Now it is my turn to share," said {fname}.',),
            ("{name} was never hungry again.", "They ate together in the sun."),
        ),
        "What you share comes back to you.",
    ),
    "learn": Plot(
        (
            ("More than anything, {name} wanted to learn to {skill}.",),
            ("{He} tried and tried, but it was very hard.", "The first time {he} tried, it went all wrong."),
            ("Everyone laughed, and {name} hid behind a tree.", ""),
            ("There {he} met {a_friend} named {fname}.",),
            ('"I will teach you to {skill}," said {fname}, "if you come every day."',),
            ("So {name} came every day, even in the rain.",),
            ("Little by little, {he} got better.", "Each day, {he} got a little better."),
            ("By autumn, {name} could {skill} better than anyone in the valley.",),
            ("{fname} was proud and gave {name} a {thing}.",),
        ),
        "With a little work every day, you can learn hard things.",
    ),
    "letter": Plot(
        (
            ("One day, {name} had to bring a {thing} to the queen.",),
            ("The castle was far away, and the road was long.", "The castle was three days away."),
            ("After two days, {name} was too tired to walk.",),
            ("{A_friend} named {fname} sat by the road and saw {him}.",),
            ('"Give it to me, and I will carry it the rest of the way," said {fname}.',),
            ("{name} handed over the {thing} with care.",),
            ("{fname} went over the last hill and brought it to the queen.",),
            ("The queen was so happy that she sent them both {food}.",
             "The queen was very happy and thanked them both."),
        ),
        "It is no shame to let a friend carry the load for a while.",
    ),
    "gift": Plot(
        (
            ("It was the birthday of {a_friend} named {fname}, and {name} wanted to bring a gift.",),
            ("But {name} had no money.", "But {name} had nothing to give."),
            ("{He} had only {his} own {thing}, and {he} loved it very much.",),
            ("{He} thought about it all day.", ""),
            ("In the evening, {he} put the {thing} in a box and brought it to {fname}.",),
            ("{fname} opened the box and smiled.",),
            ('"This is the best gift of all," said {fname}, "because you love it too."',),
            ("They ate {food} and danced until the moon was high.",),
        ),
        "The best gift is one that comes from the heart.",
    ),
}  # fmt: skip

SKILLS = ("swim", "sing", "dance", "read", "paint", "fly a kite")


@dataclass(frozen=True)
class Cast:
    """Who and what a tale is about."""

    hero: str
    name: str
    friend: str
    fname: str
    thing: str


@dataclass(frozen=True)
class Tale:
    """A finished tale together with what a reader may ask about it."""

    cast: Cast
    sentences: tuple[str, ...]
    moral: str

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


def with_article(word: str) -> str:
    """The word with "a" or "an" before it."""
    return ("an " if word[0] in "aeiou" else "a ") + word


def plural(word: str) -> str:
    """More than one hero of a kind."""
    irregular = {"fox": "foxes", "mouse": "mice", "wolf": "wolves", "deer": "deer", "princess": "princesses"}
    return irregular.get(word, word + "s")


def pick_name(rng: random.Random, kind: str) -> str:
    """A name that fits the hero: "princess" gets a she-name, a fox may get either."""
    she = kind in ALWAYS_SHE or (kind not in ALWAYS_HE and rng.random() < 0.5)
    return rng.choice(SHE_NAMES if she else HE_NAMES)


def draw_cast(rng: random.Random) -> Cast:
    """Two different kinds with two different names, and a thing."""
    hero = rng.choice(HEROES)
    friend = rng.choice([kind for kind in HEROES if kind != hero])
    name = pick_name(rng, hero)
    fname = name
    while fname == name:
        fname = pick_name(rng, friend)
    return Cast(hero, name, friend, fname, rng.choice(THINGS))


def tell(rng: random.Random, cast: Cast | None = None) -> Tale:
    """Tell one tale of 8 to 10 sentences."""
    cast = cast or draw_cast(rng)
    plot = PLOTS[rng.choice(tuple(PLOTS))]
    she = cast.name in SHE_NAMES
    friend = with_article(cast.friend)
    words = {
        "hero": cast.hero,
        "name": cast.name,
        "a_friend": friend,
        "A_friend": friend.capitalize(),
        "fname": cast.fname,
        "thing": cast.thing,
        "place": rng.choice(PLACES),
        "a_mood": with_article(rng.choice(MOODS)),
        "food": rng.choice(FOODS),
        "skill": rng.choice(SKILLS),
        "he": "she" if she else "he",
        "He": "She" if she else "He",
        "his": "her" if she else "his",
        "him": "her" if she else "him",
    }
    wordings = [rng.choice(OPENINGS)] + [rng.choice(slot) for slot in plot.slots]
    return Tale(cast, tuple(w.format_map(words) for w in wordings if w), plot.moral)
