"""The running batch: the sequences that take part in steps, and the pages they hold.

All three schedulers are this plus a policy of what enters. A step computes one token of each decoding
sequence first (they are what users watch), then chunks of the sequences that have more pending: up to
`max_chunk_tokens`, and beside decodes up to the step's deadline (step_deadline.py). When a sequence needs a
page and none is left, the youngest one is preempted: its pages are released, and it is computed again later
(mostly from the prefix cache). The oldest always goes on, so the batch never stands still.

Every step is `plan_step`, then `launched` once the engine has it; what it sampled is settled in the sequences
when it is collected, which may be after the next step was launched. Pages may be released while a step that
uses them is in flight: the engine's steps run in order, so their next user writes after it.

A step of a full batch touches each decoding sequence twice and does no other work for it unless it
crosses a page border: at 256 sequences the scheduler must not cost what a kernel costs.
"""

from bisect import insort
from collections.abc import Iterable

from services.protocol.messages import FirstToken
from services.scheduler.chunks import chunk_tokens
from services.scheduler.errors import IllegalSequenceTransition
from services.scheduler.pages import PagePool, chain_digest, chain_root
from services.scheduler.sequence import PENDING, Sequence, State, StepPlan, choice_sequence
from services.scheduler.step_deadline import StepDeadline
from services.scheduler.step_time import StepShape


def _age(sequence: Sequence) -> int:
    return sequence.arrival


class RunningBatch:
    """`decoding` and `computing` are disjoint, each oldest first; together they are what runs."""

    def __init__(
        self,
        pool: PagePool,
        max_batch: int,
        max_chunk_tokens: int,
        max_sequence_tokens: int | None = None,
        tail_tokens: int = 0,
        deadline: StepDeadline | None = None,
    ) -> None:
        """`tail_tokens`: see chunks.py; 0 where no KV leaves. `deadline`: see step_deadline.py; None where
        nothing decodes."""
        self.pool = pool
        self.max_sequence_tokens = max_sequence_tokens or pool.total * pool.page_size_tokens
        self.max_batch = max_batch
        self.max_chunk_tokens = max_chunk_tokens
        self.tail_tokens = tail_tokens
        self.deadline = deadline or StepDeadline()
        self.decoding: list[Sequence] = []
        self.computing: list[Sequence] = []
        self.resuming: list[Sequence] = []
        self.preemptions = 0
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self.decoding) + len(self.computing)

    def number(self, sequence: Sequence) -> None:
        """Give a sequence that is new here its age and its end."""
        self._arrivals += 1
        sequence.arrival = self._arrivals
        sequence.limit_tokens = min(sequence.limit_tokens, self.max_sequence_tokens)

    # ------------------------------------------------------------ entering

    def has_room(self, choices: int = 1) -> bool:
        """Whether `choices` more can decode; a prompt counts as the choices it will become."""
        prompts = sum(max(1, len(one.choices)) for one in self.computing)
        return len(self.decoding) + prompts + choices <= self.max_batch

    def wants_more(self) -> bool:
        """Whether a step would have room for tokens beyond what the running sequences have pending."""
        pending = len(self.decoding) + sum(one.pending_tokens for one in self.computing)
        return self.has_room() and pending < self.max_chunk_tokens

    def admit(self, sequence: Sequence) -> bool:
        """Take pages for all of a waiting sequence's tokens and run it; False if there are too few.

        A page for each running sequence is left over, so that an arrival does not at once preempt.
        """
        if not self.has_room(max(1, len(sequence.choices))):
            return False
        if not self._take_pages(sequence, len(sequence.tokens) - 1, len(self)):
            return False
        sequence.computed_tokens = sequence.cached_tokens
        sequence.transition(State.RUNNING)
        insort(self.computing, sequence, key=_age)
        return True

    def admit_resuming(self) -> None:
        """Oldest first; nobody overtakes a preempted sequence. One whose last token is not known yet waits
        for it: it is computed again from what the host knows."""
        while self.resuming and self.resuming[0].tokens[-1] != PENDING and self.admit(self.resuming[0]):
            self.resuming.pop(0)

    def reserve(self, sequence: Sequence) -> bool:
        """Take pages for a prompt whose KV another worker computes; False if there are too few."""
        headroom = len(self) + sequence.work.choices if len(self) else 0
        if not self._take_pages(sequence, len(sequence.tokens), headroom):
            return False
        sequence.transition(State.RESERVED)
        return True

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
            sequence.arrival, sequence.limit_tokens = prompt.arrival, prompt.limit_tokens
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
            self._give_pages(sequence, prompt.pages[:full] + own)
            sequence.digests = list(prompt.digests)
            sequence.published_pages = prompt.published_pages
            sequence.computed_tokens = prompt.computed_tokens
            sequence.transition(State.RUNNING)
            insort(self.decoding, sequence, key=_age)
        self.end(prompt)
        return copies, sequences

    # ------------------------------------------------------------ a step

    def reads_pending(self) -> bool:
        """Whether the next step has a sample that looks at a token which is not known yet."""
        return any(
            one.reads_output and one.tokens[-1] == PENDING and len(one.tokens) < one.limit_tokens
            for one in self.decoding
        )

    def plan_step(self) -> StepPlan:
        """The next step, as if no choice ended with the step in flight, but for those whose last token it
        samples: their length says so. A prompt whose last chunk is in flight has nothing to compute. Beside
        sequences that decode, chunks are as large as the deadline lets them be."""
        plan = StepPlan()
        due = [one for one in self.decoding if len(one.tokens) < one.limit_tokens]
        preemptions = self.preemptions
        for sequence in [one for one in due if one.computed_tokens >= one.capacity_tokens]:
            if sequence.state is State.RUNNING:  # not preempted by an older one just now
                self._grow(sequence)
        if self.preemptions > preemptions:
            due = [one for one in due if one.state is State.RUNNING]
        plan.decodes = due
        plan.tokens = len(due)
        has_deadline = bool(due) and self.deadline.itl_limit_s > 0
        shape: StepShape | None = None
        for sequence in self.computing:
            budget = self.max_chunk_tokens - plan.tokens
            if budget <= 0:
                break
            if sequence.pending_tokens:
                count = chunk_tokens(sequence.pending_tokens, budget, self.tail_tokens)
                if has_deadline:
                    shape = shape or plan.shape()
                    count = self.deadline.chunk_tokens(shape, sequence.computed_tokens, count)
                    if count == 0:
                        break
                    shape = shape.plus_chunk(sequence.computed_tokens, count)
                plan.add_chunk(sequence, count)
        return plan

    def launched(self, plan: StepPlan) -> None:
        """The step is queued, and is number `pool.step`: its tokens' KV will be in the pages before any later
        step reads them.

        A choice's next token is on its way. A prompt's full pages become findable prefixes at once, those of
        its output when it leaves its pages: hashing them during decode would cost more than the rest of the
        step. A choice that was computed again decodes from now on.
        """
        for index, sequence in enumerate(plan.decodes):
            sequence.computed_tokens += 1
            sequence.launched(index)
        index = len(plan.decodes)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            sequence.computed_tokens += chunk.count
            sequence.computed_up_to(sequence.computed_tokens, self.pool.step)
            self.publish(sequence, self.pool.step)
            if chunk.samples and len(sequence.tokens) > sequence.prompt_tokens:
                sequence.launched(index)
                self.computing.remove(sequence)
                insort(self.decoding, sequence, key=_age)
            index += len(chunk.samples)

    def publish(self, sequence: Sequence, step: int) -> None:
        """Make the full pages that are computed once `step` is done, and whose tokens are known, findable as
        prefixes."""
        size = self.pool.page_size_tokens
        full = min(sequence.computed_tokens, sequence.known_tokens, sequence.sound_tokens) // size
        digests = sequence.digests
        while len(digests) < full:
            start = len(digests) * size
            parent = digests[-1] if digests else chain_root(sequence.work.salt)
            digests.append(chain_digest(parent, sequence.tokens[start : start + size]))
        for index in range(sequence.published_pages, full):
            self.pool.publish(sequence.pages[index], digests[index], step)
        sequence.published_pages = max(full, sequence.published_pages)

    def spoil(self, sequence: Sequence, position: int) -> set[int]:
        """What was computed of a sequence from `position` on is worth nothing: its pages are not findable any
        more, nor will be. Returns them: others may have found them. The sequence may have ended meanwhile."""
        sequence.sound_tokens = min(sequence.sound_tokens, position)
        first = position // self.pool.page_size_tokens
        return {*sequence.pages[first:], *self.pool.forget(sequence.digests[first:])}

    # ------------------------------------------------------------ leaving

    def hold(self, sequence: Sequence) -> None:
        """Out of the batch, with its pages."""
        self._remove(sequence)
        sequence.transition(State.HOLDING)

    def end(self, sequence: Sequence) -> None:
        """From any state to `ENDED`: out of the batch, pages released."""
        if sequence.state is State.RUNNING:
            self._remove(sequence)
        elif sequence in self.resuming:
            self.resuming.remove(sequence)
        self._release(sequence)
        sequence.transition(State.ENDED)

    def preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._remove(sequence)
        self._release(sequence)
        self._wait_again(sequence)

    def reset(self, sequence: Sequence) -> None:
        """Back to `WAITING` without pages, but into no queue of this batch."""
        if sequence.state is State.RUNNING:
            self._remove(sequence)
        self._release(sequence)
        sequence.transition(State.WAITING)

    def _remove(self, sequence: Sequence) -> None:
        for half in (self.decoding, self.computing):
            if sequence in half:
                half.remove(sequence)
                return
        raise IllegalSequenceTransition(f"request {sequence.work.request_id} runs, but not in this batch")

    def _wait_again(self, sequence: Sequence) -> None:
        if sequence.state is not State.WAITING:
            sequence.transition(State.WAITING)
        insort(self.resuming, sequence, key=_age)

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
        allocated = self.pool.allocate(needed)
        self._give_pages(sequence, cached + allocated)
        sequence.free_after_step = self.pool.free_after(allocated)
        sequence.cached_tokens = len(cached) * self.pool.page_size_tokens
        for number, page in enumerate(cached, 1):
            sequence.computed_up_to(number * self.pool.page_size_tokens, self.pool.computed_by(page))
        sequence.published_pages = len(cached)
        return True

    def _give_pages(self, sequence: Sequence, pages: list[int]) -> None:
        sequence.pages = pages
        sequence.capacity_tokens = len(pages) * self.pool.page_size_tokens

    def _grow(self, sequence: Sequence) -> None:
        """Give a decoding sequence the page its next token needs, or preempt it if it is the youngest."""
        while not self.pool.can_allocate(1):
            youngest = max((*self.decoding[-1:], *self.computing[-1:]), key=_age)
            self.preempt(youngest)
            if youngest is sequence:
                return
        sequence.pages += self.pool.allocate(1)
        sequence.capacity_tokens += self.pool.page_size_tokens

    def _release(self, sequence: Sequence) -> None:
        self.publish(sequence, self.pool.step)
        self.pool.release(sequence.pages)
        self._give_pages(sequence, [])
        sequence.chunk_steps.clear()
        sequence.done_tokens = 0
        sequence.computed_tokens = 0
        sequence.cached_tokens = 0
        sequence.published_pages = 0
