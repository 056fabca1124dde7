"""The running batch: the sequences that take part in steps, and the pages they hold.

All three schedulers are this plus a policy of what enters. The batch computes decode tokens first (they
are what users watch), then fills the step up to `max_chunk_tokens` with chunks of prompts. When a
sequence needs a page and none is left, the youngest running sequence is preempted: its pages are
released, and it is computed again later (mostly from the prefix cache). The oldest always goes on, so
the batch never stands still.
"""

from collections.abc import Iterable

from services.messages import FirstToken
from services.scheduler.pages import PagePool, chain_digest, chain_root
from services.scheduler.sequence import Sequence, State, StepPlan, choice_sequence


class RunningBatch:
    def __init__(self, pool: PagePool, max_batch: int, max_chunk_tokens: int) -> None:
        self.pool = pool
        self.max_batch = max_batch
        self.max_chunk_tokens = max_chunk_tokens
        self.running: list[Sequence] = []
        self.resuming: list[Sequence] = []
        self.preemptions = 0
        self._arrivals = 0

    def number(self, sequence: Sequence) -> None:
        """Give a sequence that is new here its age."""
        self._arrivals += 1
        sequence.arrival = self._arrivals

    # ------------------------------------------------------------ entering

    def has_room(self) -> bool:
        return len(self.running) < self.max_batch

    def admit(self, sequence: Sequence) -> bool:
        """Take pages for all of a waiting sequence's tokens and run it; False if there are too few.

        A page for each running sequence is left over, so that an arrival does not at once preempt.
        """
        if not self.has_room() or not self._take_pages(sequence, len(sequence.tokens) - 1, len(self.running)):
            return False
        sequence.computed_tokens = sequence.cached_tokens
        self.enter(sequence)
        return True

    def admit_resuming(self) -> None:
        """Oldest first; nobody overtakes a preempted sequence."""
        while self.resuming and self.admit(self.resuming[0]):
            self.resuming.pop(0)

    def reserve(self, sequence: Sequence) -> bool:
        """Take pages for a prompt whose KV another worker computes; False if there are too few."""
        headroom = len(self.running) + sequence.work.choices if self.running else 0
        if not self._take_pages(sequence, len(sequence.tokens), headroom):
            return False
        sequence.move(State.RESERVED)
        return True

    def enter(self, sequence: Sequence) -> None:
        sequence.move(State.RUNNING)
        self.running.append(sequence)
        self.running.sort(key=lambda one: one.arrival)

    def fork(
        self, prompt: Sequence, first_tokens: Iterable[FirstToken]
    ) -> tuple[list[tuple[int, int]], list[Sequence]]:
        """Split a computed prompt into the choices that go on; each becomes a sequence of its own.

        All share the prompt's full pages. The first takes over its last, partly filled page, the others
        get a copy: the returned pairs (from, to) must be copied at once. A choice for which no page is
        left waits and is computed again. The prompt itself ends.
        """
        copies: list[tuple[int, int]] = []
        sequences: list[Sequence] = []
        full = len(prompt.tokens) // self.pool.page_size_tokens
        partial = prompt.pages[full:]
        for index, first in enumerate(first_tokens):
            sequence = choice_sequence(prompt.work, first)
            sequence.arrival = prompt.arrival
            sequences.append(sequence)
            own = partial
            if index > 0:
                if len(partial) > self.pool.available:
                    self._wait_again(sequence)
                    continue
                own = self.pool.allocate(len(partial))
                copies += zip(partial, own, strict=True)
            else:
                self.pool.share(partial)
            self.pool.share(prompt.pages[:full])
            sequence.pages = prompt.pages[:full] + own
            sequence.digests = list(prompt.digests)
            sequence.published_pages = prompt.published_pages
            sequence.computed_tokens = prompt.computed_tokens
            self.enter(sequence)
        self.end(prompt)
        return copies, sequences

    # ------------------------------------------------------------ a step

    def plan_decodes(self, plan: StepPlan) -> None:
        for sequence in list(self.running):
            if sequence.state is State.RUNNING and sequence.pending_tokens == 1 and self._grow(sequence):
                plan.add(sequence, 1)

    def plan_chunks(self, plan: StepPlan) -> None:
        for sequence in self.running:
            budget = self.max_chunk_tokens - plan.tokens
            if budget <= 0:
                return
            if sequence.pending_tokens > 1:
                plan.add(sequence, min(budget, sequence.pending_tokens))

    def wants_more(self) -> bool:
        """Whether a step would have room for tokens beyond what the running sequences have pending."""
        return self.has_room() and sum(one.pending_tokens for one in self.running) < self.max_chunk_tokens

    def advance(self, plan: StepPlan) -> None:
        """The step is done: its tokens' KV is in the pages. Full pages become findable prefixes."""
        for one in plan.scheduled:
            one.sequence.computed_tokens += one.count
            self.publish(one.sequence)

    def publish(self, sequence: Sequence) -> None:
        size = self.pool.page_size_tokens
        full = sequence.computed_tokens // size
        digests = sequence.digests
        while len(digests) < full:
            start = len(digests) * size
            parent = digests[-1] if digests else chain_root(sequence.work.salt)
            digests.append(chain_digest(parent, sequence.tokens[start : start + size]))
        for index in range(sequence.published_pages, full):
            self.pool.publish(sequence.pages[index], digests[index])
        sequence.published_pages = max(full, sequence.published_pages)

    # ------------------------------------------------------------ leaving

    def leave(self, sequence: Sequence, to: State) -> None:
        """Out of the batch, with its pages (`HOLDING`)."""
        self.running.remove(sequence)
        sequence.move(to)

    def end(self, sequence: Sequence) -> None:
        """From any state to `ENDED`: out of the batch, pages released."""
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
        elif sequence in self.resuming:
            self.resuming.remove(sequence)
        self._release(sequence)
        sequence.move(State.ENDED)

    def preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.running.remove(sequence)
        self._release(sequence)
        self._wait_again(sequence)

    def reset(self, sequence: Sequence) -> None:
        """Back to `WAITING` without pages, but into no queue of this batch."""
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
        self._release(sequence)
        sequence.move(State.WAITING)

    # ------------------------------------------------------------ pages

    def _take_pages(self, sequence: Sequence, reusable_tokens: int, headroom_pages: int) -> bool:
        tokens = sequence.tokens
        if sequence.work.sampling.prompt_logprobs is not None and sequence.choices:
            reusable_tokens = 0  # every position's logits are wanted
        cached = self.pool.match_prefix(sequence.work.salt, tokens, reusable_tokens)
        needed = self.pool.pages_for(len(tokens)) - len(cached)
        if not self.pool.can_allocate(needed + headroom_pages):
            self.pool.release(cached)
            return False
        sequence.pages = cached + self.pool.allocate(needed)
        sequence.cached_tokens = len(cached) * self.pool.page_size_tokens
        sequence.published_pages = len(cached)
        return True

    def _grow(self, sequence: Sequence) -> bool:
        """Give a decoding sequence the page its next token needs; False if it was preempted instead."""
        if self.pool.pages_for(sequence.computed_tokens + 1) <= len(sequence.pages):
            return True
        while not self.pool.can_allocate(1):
            youngest = self.running[-1]
            self.preempt(youngest)
            if youngest is sequence:
                return False
        sequence.pages += self.pool.allocate(1)
        return True

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages = []
        sequence.computed_tokens = 0
        sequence.cached_tokens = 0
        sequence.published_pages = 0

    def _wait_again(self, sequence: Sequence) -> None:
        if sequence.state is not State.WAITING:
            sequence.move(State.WAITING)
        self.resuming.append(sequence)
        self.resuming.sort(key=lambda one: one.arrival)
