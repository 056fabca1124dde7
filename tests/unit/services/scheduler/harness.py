"""A model that needs no tensors: the next token is a function of all tokens before it.

`FakeKv` remembers, page by page, which token each slot of the pool holds, and "computes" by reading the
whole prefix back from the pages. A scheduler that loses, reuses or misplaces a page makes it see wrong
tokens, and the test fails on them. Like a device it knows what its last step drew, so that a token which the
scheduler does not know yet can be named by its draw.
"""

from collections.abc import Iterable

from services.protocol.messages import Sampling, SequenceRequest
from services.scheduler.pages import PagePool
from services.scheduler.sequence import PENDING, Sequence, StepPlan


def work(
    request_id: int, prompt: list[int], max_tokens: int = 4, choices: int = 1, **sampling: int
) -> SequenceRequest:
    return SequenceRequest(
        request_id=request_id,
        prompt=prompt,
        sampling=Sampling(max_tokens=max_tokens, seed=request_id, **sampling),
        choices=choices,
    )


def next_token(tokens: list[int], choice: int) -> int:
    value = 7 + choice
    for token in tokens:
        value = (value * 31 + token + 1) % 9973
    return value % 50


def expected(prompt: list[int], choice: int, count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, choice))
    return tokens[len(prompt) :]


class FakeKv:
    def __init__(self, pool: PagePool) -> None:
        self.size = pool.page_size_tokens
        self.content: list[list[int | None]] = [[None] * self.size for _ in range(pool.total)]
        self.sampled: list[int] = []

    def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
        for source, target in pairs:
            self.content[target] = list(self.content[source])

    def write(self, pages: list[int], start: int, tokens: list[int]) -> None:
        for position, token in enumerate(tokens, start):
            self.content[pages[position // self.size]][position % self.size] = token

    def read(self, pages: list[int], count: int) -> list[int | None]:
        return [self.content[pages[at // self.size]][at % self.size] for at in range(count)]

    def compute(self, plan: StepPlan) -> list[tuple[Sequence, list[int]]]:
        """Write the step's tokens, check that the pages hold the true prefix, draw for each choice."""
        sampled: list[tuple[Sequence, list[int]]] = []
        for sequence in plan.decodes:
            assert sequence.pending_tokens == 1
            sampled.append((sequence, self._row(sequence, sequence.computed_tokens, 1, sequence.choices)))
        for chunk in plan.chunks:
            sampled.append(
                (chunk.sequence, self._row(chunk.sequence, chunk.start, chunk.count, chunk.samples))
            )
        self.sampled = [token for _, tokens in sampled for token in tokens]
        return sampled

    def _row(self, sequence: Sequence, start: int, count: int, samples: Iterable[int]) -> list[int]:
        tokens = list(sequence.tokens)
        if tokens[-1] == PENDING:
            tokens[-1] = self.sampled[sequence.sample_index]
        assert PENDING not in tokens
        new = tokens[start : start + count]
        assert len(new) == count
        self.write(sequence.pages, start, new)
        prefix = self.read(sequence.pages, start + count)
        assert prefix == tokens[: start + count], f"request {sequence.work.request_id}"
        return [next_token(tokens, choice) for choice in samples]
