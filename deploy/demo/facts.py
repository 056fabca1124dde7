"""What the demo model says about serving language models, Baton included.

Each topic has the terms a user may ask about ("what is X?"), whole questions that mean the same, a few
answers that are true on their own, and more to say when the user asks to go on.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """Terms fit "what is {term}?"; asks are whole questions in lower case, without the question mark."""

    terms: tuple[str, ...] = ()
    asks: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    more: str = ""


FACTS: dict[str, Topic] = {
    "prefill": Topic(
        terms=("prefill", "the prefill phase", "the prefill stage", "prefilling", "prompt processing"),
        asks=(
            "what happens during prefill", "what does the model do with my prompt first",
            "what is a prefill in llms", "what is prefill in an llm", "what is the first phase of serving",
            "what happens to my prompt",
        ),
        answers=(
            "Prefill is the first phase of serving a prompt. The model reads all the prompt tokens in one "
            "pass, fills the KV cache, and gives the first token of the answer.",
            "Prefill is the phase in which the model reads the whole prompt at once. It fills the KV cache "
            "and gives the first token of the answer.",
        ),
        more=(
            "Prefill needs a lot of computing, because it works on many tokens at the same time. A long "
            "prompt makes prefill slow, so you wait longer for the first token."
        ),
    ),
    "decode": Topic(
        terms=("decode", "the decode phase", "the decode stage", "decoding", "token generation"),
        asks=(
            "what happens during decode", "how are the tokens of the answer produced",
            "what comes after prefill", "what is decode in an llm", "what is the second phase of serving",
            "how does a model write its answer",
        ),
        answers=(
            "Decode is the second phase of serving a prompt. The model produces the answer one token at a "
            "time, and each step reads the KV cache.",
            "Decode is the phase in which the model produces the answer, one token after another. Each step "
            "reads the KV cache and adds one more token to it.",
        ),
        more=(
            "Decode needs fast memory more than computing, because every step reads the weights and the KV "
            "cache. Serving many requests in one batch makes each step worth more."
        ),
    ),
    "difference": Topic(
        terms=("the difference between prefill and decode", "prefill and decode", "prefill versus decode"),
        asks=(
            "how do prefill and decode differ", "how is prefill different from decode", "prefill vs decode",
            "compare prefill and decode", "is prefill the same as decode",
            "what are the two phases of serving", "what are prefill and decode",
        ),
        answers=(
            "Prefill reads the whole prompt in one pass, and decode produces the answer one token at a "
            "time. Prefill is limited by computing, while decode is limited by memory speed.",
        ),
        more=(
            "Because the two phases need different things, they get in the way of each other when they share "
            "one worker. That is why Baton runs them on separate workers."
        ),
    ),
    "kv_cache": Topic(
        terms=(
            "a kv cache", "the kv cache", "kv cache", "kv caching", "a key value cache",
            "the key-value cache",
        ),
        asks=(
            "what is the kv cache for", "why do we need a kv cache", "what is stored in the kv cache",
            "what does the kv cache hold", "why is there a kv cache", "what does kv mean",
            "what does kv stand for",
        ),
        answers=(
            "The KV cache holds the keys and values that attention computed for the earlier tokens. With "
            "it, the model does not have to read the whole text again for every new token.",
            "A KV cache stores the attention keys and values of all earlier tokens. Thanks to it, each new "
            "token needs only one small step.",
        ),
        more=(
            "The KV cache grows with every token, so long chats need a lot of memory. When prefill and "
            "decode run on separate workers, the KV cache must be moved between them."
        ),
    ),
    "disaggregation": Topic(
        terms=(
            "disaggregation", "disaggregated serving", "disaggregated inference", "pd disaggregation",
            "disaggregated prefill", "prefill decode separation",
        ),
        asks=(
            "what does it mean to disaggregate", "what does it mean to split prefill and decode",
            "what is disaggregated prefill and decode",
        ),
        answers=(
            "Disaggregated serving means that prefill and decode run on separate workers. The KV cache is "
            "moved from the prefill worker to the decode worker after the prompt was read.",
        ),
        more=(
            "Each side can then be made larger or smaller on its own. A service with long prompts can have "
            "more prefill workers, and one with long answers can have more decode workers."
        ),
    ),
    "why_split": Topic(
        terms=(
            "the point of disaggregation", "the benefit of disaggregation",
            "the advantage of disaggregated serving",
        ),
        asks=(
            "why disaggregate", "why disaggregate prefill and decode", "why split prefill and decode",
            "why separate prefill from decode", "why should i disaggregate",
            "why run prefill and decode separately", "why not run prefill and decode together",
            "what are the benefits of disaggregation", "why use separate workers",
            "why do you split prefill and decode", "what is disaggregation good for",
            "why are prefill and decode separate", "why is disaggregation useful",
        ),
        answers=(
            "Prefill and decode need different things. When they share a worker, a long prompt makes all "
            "the other users wait for their next token. On separate workers, the tokens keep a steady pace, "
            "and each side can grow on its own.",
        ),
        more=(
            "The price is that the KV cache must be moved from one worker to the other. A fast transfer "
            "keeps that price small."
        ),
    ),
    "baton": Topic(
        terms=("baton", "the baton project", "the baton system", "the baton server"),
        asks=(
            "what is baton for", "what does baton do", "how does baton work", "how does baton serve a model",
            "what is this system", "what is this project", "what is this server", "how is baton built",
            "what are the parts of baton", "how does baton handle a request", "what system is this",
        ),
        answers=(
            "Baton is a system that serves large language models with prefill and decode on separate "
            "processes. Prefill workers run the prompt, decode workers produce the tokens, and a transfer "
            "process moves the KV cache between them through a staging buffer.",
            "Baton serves large language models. Its prefill workers run the prompt, its decode workers "
            "produce the tokens, and a transfer process moves the KV cache from one to the other through a "
            "staging buffer.",
        ),
        more=(
            "A request goes first to a prefill worker and then to a decode worker. The KV cache is passed on "
            "like the baton in a relay race."
        ),
    ),
    "name": Topic(
        asks=(
            "why is it called baton", "why the name baton", "where does the name baton come from",
            "what does the name baton mean", "why is baton called baton",
        ),
        answers=(
            "In a relay race, one runner passes a baton to the next. In Baton, the prefill worker passes "
            "the KV cache to the decode worker in the same way.",
        ),
        more="The prefill worker runs first, and the decode worker runs to the end.",
    ),
    "transfer": Topic(
        terms=("the transfer process", "kv transfer", "the kv transfer", "the kv cache transfer"),
        asks=(
            "how does the kv cache move", "how is the kv cache moved", "who moves the kv cache",
            "how does the kv cache get to the decode worker", "how does baton move the kv cache",
            "how does baton transfer the kv cache", "what does the transfer process do",
        ),
        answers=(
            "The transfer process moves the KV cache from the prefill worker to the decode worker. It goes "
            "through a staging buffer, so that neither worker has to stop its own work to copy.",
            "In Baton, a transfer process moves the KV cache from a prefill worker to a decode worker. The "
            "data goes through a staging buffer.",
        ),
        more="The sooner the KV cache arrives, the sooner the decode worker can start.",
    ),
    "staging": Topic(
        terms=("a staging buffer", "the staging buffer", "staging", "staging memory"),
        asks=("what is the staging buffer for", "why is there a staging buffer", "why use a staging buffer"),
        answers=(
            "A staging buffer is a piece of memory in which data waits on its way from one place to "
            "another. Baton uses one to move the KV cache from prefill workers to decode workers.",
        ),
        more=(
            "With a staging buffer, the prefill worker can free its own memory early and go on with the next "
            "prompt."
        ),
    ),
    "prefill_worker": Topic(
        terms=("a prefill worker", "the prefill worker", "prefill workers"),
        asks=("what does a prefill worker do", "what do prefill workers do", "who runs the prompt"),
        answers=(
            "A prefill worker runs the prompt. It reads all the prompt tokens, fills the KV cache, and "
            "hands it over for decode.",
        ),
        more="You can add prefill workers when users send many long prompts.",
    ),
    "decode_worker": Topic(
        terms=("a decode worker", "the decode worker", "decode workers"),
        asks=("what does a decode worker do", "what do decode workers do", "who produces the tokens"),
        answers=(
            "A decode worker produces the tokens of the answer. It takes the KV cache that a prefill worker "
            "made and goes on from there, one token at a time.",
        ),
        more="You can add decode workers when users ask for many long answers.",
    ),
    "token": Topic(
        terms=("a token", "tokens", "an output token"),
        asks=("how long is a token", "is a token a word", "what are tokens made of"),
        answers=(
            "A token is a small piece of text, such as a word or a part of a word. Language models read and "
            "write text token by token.",
        ),
        more="My own vocabulary has only 2048 tokens. Any other text is built from single bytes.",
    ),
    "tokenizer": Topic(
        terms=("a tokenizer", "the tokenizer", "tokenization"),
        asks=("what does a tokenizer do", "how is text turned into tokens"),
        answers=(
            "A tokenizer cuts text into tokens and gives each token a number. It also turns the numbers "
            "back into text.",
        ),
        more="My tokenizer works on bytes, so it can read any text, even emoji.",
    ),
    "ttft": Topic(
        terms=("ttft", "time to first token", "the time to first token"),
        asks=(
            "what does ttft mean", "how long until the first token", "what does ttft stand for",
            "why is the first token slow",
        ),
        answers=(
            "TTFT is the time to first token. It is how long a user waits between sending a prompt and "
            "seeing the first token of the answer.",
        ),
        more="Most of it is waiting in the queue and prefill, so long prompts make it longer.",
    ),
    "itl": Topic(
        terms=("itl", "inter-token latency", "the inter-token latency", "tpot", "time per output token"),
        asks=("what does itl mean", "what does tpot mean", "how fast are the tokens after the first one"),
        answers=(
            "Inter-token latency is the time between one token of the answer and the next. When it is low "
            "and steady, the text flows smoothly.",
        ),
        more="It depends on the speed of decode and on how many requests share a batch.",
    ),
}  # fmt: skip
