"""What is measured: the rows of the table, and how a batch is brought to one context. Pure."""

from dataclasses import dataclass

QUICK_OFFLINE_REQUESTS = 200


@dataclass(frozen=True, slots=True)
class Decode:
    """Steps of `batch` sequences around `context` tokens."""

    batch: int
    context: int

    @property
    def name(self) -> str:
        return f"decode step, batch {self.batch} at {self.context}"

    def longest_tokens(self, steps: int) -> int:
        """What a sequence comes to if `steps` are run around the context, and a little more."""
        return self.context + steps


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """`requests` prompts of `tokens` tokens, given at once, one token sampled of each."""

    requests: int
    tokens: int

    @property
    def name(self) -> str:
        return f"prefill {self.tokens}" if self.requests == 1 else f"prefill {self.requests} x {self.tokens}"


@dataclass(frozen=True, slots=True)
class Offline:
    """`requests` of `input_tokens` and `output_tokens`, given at once and run to their end."""

    requests: int
    input_tokens: int
    output_tokens: int

    @property
    def name(self) -> str:
        return f"offline {self.requests} x ({self.input_tokens} in, {self.output_tokens} out)"


DECODES = (Decode(1, 1024), Decode(1, 16384), Decode(64, 1024), Decode(256, 1024))
PREFILLS = (PrefillRow(1, 1024), PrefillRow(1, 8192), PrefillRow(1, 16384), PrefillRow(32, 4096))
OFFLINE = Offline(800, 1024, 256)
TRACED_DECODE, TRACED_PREFILL = Decode(64, 1024), PrefillRow(1, 8192)


@dataclass(frozen=True, slots=True)
class Workload:
    """`warm_steps` run before the `steps` of a decode row that count; a prefill is run once more than
    `repeats` and the first does not count."""

    decodes: tuple[Decode, ...]
    prefills: tuple[PrefillRow, ...]
    offline: Offline
    traced_decode: Decode
    traced_prefill: PrefillRow
    warm_steps: int
    steps: int
    repeats: int
    traced_steps: int

    @property
    def longest_tokens(self) -> int:
        """Of all rows' sequences, with room for the steps around a decode row's context."""
        steps = self.warm_steps + self.steps
        decodes = [one.longest_tokens(steps) for one in (*self.decodes, self.traced_decode)]
        prefills = [one.tokens + 1 for one in (*self.prefills, self.traced_prefill)]
        return max(*decodes, *prefills, self.offline.input_tokens + self.offline.output_tokens)


def workload(shrink: int, quick: bool) -> Workload:
    """The rows, every count and length divided by `shrink` (1: as they are), without repetitions."""

    def less(count: int) -> int:
        return max(1, count // shrink)

    def less_decode(row: Decode) -> Decode:
        return Decode(less(row.batch), max(2, row.context // shrink))

    def less_prefill(row: PrefillRow) -> PrefillRow:
        return PrefillRow(less(row.requests), less(row.tokens))

    decodes = tuple(dict.fromkeys(map(less_decode, DECODES)))
    offline_requests = QUICK_OFFLINE_REQUESTS if quick else OFFLINE.requests
    return Workload(
        decodes=decodes,
        prefills=tuple(dict.fromkeys(map(less_prefill, PREFILLS))),
        offline=Offline(less(offline_requests), less(OFFLINE.input_tokens), less(OFFLINE.output_tokens)),
        traced_decode=less_decode(TRACED_DECODE),
        traced_prefill=less_prefill(TRACED_PREFILL),
        warm_steps=8,
        steps=min(64 if quick else 96, *(row.context for row in decodes)),
        repeats=1 if quick else 3,
        traced_steps=10,
    )


def prompt_lengths(batch: int, context: int, max_chunk_tokens: int) -> list[int]:
    """Tokens of each prompt such that all sequences have about `context` when the last prompt is computed.

    Sequences whose prompts come first decode while the others' are computed: how far depends on the lengths
    themselves, so they are improved on a few times. At least 1.
    """
    lengths = [max(1, context)] * batch
    for _ in range(4):
        ends = _last_steps(lengths, max_chunk_tokens)
        lengths = [max(1, context - (ends[-1] - end)) for end in ends]
    return lengths


def _last_steps(lengths: list[int], max_chunk_tokens: int) -> list[int]:
    """The step in which each prompt's last chunk runs, oldest first, after one token a decoding sequence."""
    ends: list[int] = []
    step, left = 0, max_chunk_tokens
    for length in lengths:
        rest = length
        while rest > left:
            rest -= left
            step += 1
            left = max(1, max_chunk_tokens - sum(end < step for end in ends))
        left -= rest
        ends.append(step)
    return ends
