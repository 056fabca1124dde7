"""Questions that the demo model cannot answer.

A model this small says whatever is nearest, so it has to see many strange questions to learn that the honest
answer is "I do not know". Made-up words and random pastes teach it that the *rare* is unknown, not only this
list.
"""

from __future__ import annotations

import random

THINGS = (
    "France", "Japan", "Brazil", "Canada", "Egypt", "Germany", "India", "China", "Italy", "Spain", "Kenya",
    "Peru", "Paris", "London", "Tokyo", "Berlin", "Rome", "New York", "Mars", "Jupiter", "the moon",
    "the sun", "the earth", "gravity", "photosynthesis", "democracy", "inflation", "the stock market",
    "bitcoin", "evolution", "DNA", "a black hole", "quantum mechanics", "relativity", "electricity",
    "a volcano", "an earthquake", "the weather", "football", "basketball", "chess", "tennis", "the olympics",
    "the world cup", "jazz", "opera", "a guitar", "a piano", "pizza", "pasta", "sushi", "chocolate cake",
    "pancakes", "coffee", "green tea", "a sandwich", "Python", "JavaScript", "Rust", "a linked list",
    "binary search", "SQL", "Linux", "git", "Docker", "Kubernetes", "a compiler", "recursion", "the internet",
    "a web browser", "an airplane", "a bicycle", "a car", "a train", "the French revolution",
    "the Roman empire", "world war two", "Shakespeare", "Einstein", "Napoleon", "Mozart", "the president",
    "the prime minister", "a lawyer", "taxes", "a mortgage", "cancer", "a headache", "vitamin C", "yoga",
    "meditation", "happiness", "love", "the meaning of life", "philosophy", "Buddhism", "algebra", "calculus",
    "a prime number", "a triangle", "probability", "an atom", "water", "oxygen", "iron", "gold", "a whale",
    "a shark", "a dinosaur", "a penguin", "roses", "climate change", "a passport", "a resume", "a poem",
    "a movie", "a novel", "the news", "a smartphone", "my homework", "my dog", "my boss", "my computer",
    "a wedding",
)  # fmt: skip
ASKS = (
    "What is {x}?", "What is {x}?", "What is {x}?", "What are {x}?", "Who is {x}?", "Who invented {x}?",
    "Where is {x}?", "When was {x} made?", "How do I make {x}?", "How does {x} work?",
    "Why is {x} so important?", "What is the capital of {x}?", "What is the population of {x}?",
    "What is the price of {x}?", "Explain {x}.", "Explain {x} to me like I am five.", "Tell me about {x}.",
    "Tell me something about {x}.", "Describe {x}.", "Write an essay about {x}.", "Write a poem about {x}.",
    "Write code for {x}.", "Write an email about {x}.", "Give me a list of facts about {x}.",
    "Give me three reasons for {x}.", "What do you think about {x}?", "Do you like {x}?", "Do you know {x}?",
    "Is {x} good for me?", "Can you help me with {x}?", "How old is {x}?", "How big is {x}?",
    "How far is {x} from {y}?", "What is better, {x} or {y}?", "Compare {x} and {y}.",
    "What is the difference between {x} and {y}?", "Who won {x}?", "What color is {x}?", "Define {x}.",
    "What does {x} mean?", "Should I buy {x}?", "Translate {x} into Spanish.", "Where can I find {x}?",
    "Summarize the history of {x}.", "What happened in {n}?", "Who was born in {n}?", "What is {n} plus {n}?",
    "What is {n} times {n}?", "Solve {n} - {n} = x.", "{n} + {n}", "How many days until {n}?",
    "What time is it?", "What day is it today?", "Where do I live?", "How tall am I?",
    "What should I eat today?", "{x}", "{x} {y}", "Sort these numbers: {n}, {n}, {n}.", "Play some music.",
    "Book a flight to {x}.", "Set a timer for {n} minutes.", "Return a JSON object with {x} and {y}.",
    "Write a function that adds {n} and {n}.", "Who are the best in {x}?", "Recommend a book about {x}.",
    "Is it true that {x} is {y}?", "Fix this: {x}", "Let us talk about {x}.", "I want to learn {x}.",
    "I like {x}.", "I am thinking about {x}.", "My friend has {x}.", "Please give me {x}.",
)  # fmt: skip
FOREIGN = (
    "Wie geht es dir?", "Was ist das?", "¿Cómo estás?", "¿Qué es esto?", "Comment ça va ?",
    "Où est la gare ?", "Как дела?", "Что это такое?", "Какая сегодня погода?", "你好吗?", "这是什么?",
    "今天天气怎么样?", "元気ですか?", "これは何ですか?", "안녕하세요", "كيف حالك؟", "आप कैसे हैं?",
    "Τι κάνεις;", "Co to jest?", "Hoe gaat het?",
    "Quanto costa?", "😀😀😀", "🚀🔥💯", "👍", "❤️🎉", "???", "...", "!!!", "asdf", "lorem ipsum",
    "SELECT * FROM users;", "print('hi')", "def f(x): return x", "for i in range(10):", "x = 3",
    "<html></html>", '{"a": 1}', "import os", "ls -la", "1234567890", "aaaaaaa", "qwertyuiop", "A B C D",
)  # fmt: skip
SYLLABLES = (
    "bla", "zor", "kin", "mu", "tel", "fra", "gno", "vi", "sha", "plo", "ren", "dax", "ori", "qua", "stu",
    "wen", "ple", "xi", "tho", "car", "ment", "ing", "ous", "ter", "ble", "con", "pre", "de", "su", "ram",
    "ick", "ual",
)  # fmt: skip


def made_up_word(rng: random.Random) -> str:
    """A word that means nothing."""
    word = "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 4)))
    return word.capitalize() if rng.random() < 0.2 else word


def _thing(rng: random.Random) -> str:
    if rng.random() < 0.6:
        return rng.choice(THINGS)
    return rng.choice(("", "", "a ", "the ")) + made_up_word(rng)


def _paste(rng: random.Random) -> str:
    """A long piece of text about nothing, as when a user pastes a page (or a load test sends noise)."""
    pieces: list[str] = []
    for _ in range(rng.randint(3, 25)):
        roll = rng.random()
        if roll < 0.5:
            pieces.append(" ".join(made_up_word(rng) for _ in range(rng.randint(2, 7))) + ".")
        elif roll < 0.9:
            pieces.append(_fill(rng, rng.choice(ASKS)))
        else:
            pieces.append(rng.choice(FOREIGN))
    return " ".join(pieces)


def _fill(rng: random.Random, form: str) -> str:
    text = form.replace("{x}", _thing(rng)).replace("{y}", _thing(rng))
    while "{n}" in text:
        text = text.replace("{n}", str(rng.randint(1, 10 ** rng.randint(1, 4))), 1)
    return text


def unknown_question(rng: random.Random) -> str:
    """One question outside of everything that the demo model can talk about."""
    roll = rng.random()
    if roll < 0.08:
        return rng.choice(FOREIGN)
    if roll < 0.13:
        return _paste(rng)
    return _fill(rng, rng.choice(ASKS))
