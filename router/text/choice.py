"""One choice of one prompt: it detokenizes, looks for stop strings, and writes pieces of text. Pure."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from router.text.detokenizer import Detokenizer
from router.text.stop_strings import StopScanner
from services.protocol.messages import FinishReason, TokenLogprob, Tokens


@dataclass(frozen=True, slots=True)
class LogprobEntry:
    """One generated token beside where its text begins and ends in the choice's text."""

    token: int
    logprob: TokenLogprob
    start: int
    end: int


class Choice(ABC):
    """The text of one choice, which a subclass writes into an answer. It ends with exactly one `finish`: the
    worker's, or "stop" at a stop string.

    The end token's own text is never part of the answer unless `include_stop` is set.
    """

    __slots__ = (
        "_detokenizer",
        "_entries",
        "_include_stop",
        "_length",
        "_released",
        "_seen",
        "_stops",
        "_want_logprobs",
        "finish",
        "token_count",
    )

    def __init__(
        self, detokenizer: Detokenizer, stops: Sequence[str], include_stop: bool, want_logprobs: bool
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = StopScanner(stops, include_stop) if stops else None
        self._include_stop = include_stop
        self._want_logprobs = want_logprobs
        self._entries: list[LogprobEntry] = []
        self._length = 0
        self._seen = 0
        """The length with what the detokenizer holds back, as far as that is text already."""
        self._released = 0
        self.finish: FinishReason | None = None
        self.token_count = 0

    @abstractmethod
    def write(self, text: str, entries: Sequence[LogprobEntry], finish: FinishReason | None) -> None:
        """Adds to the answer: a frame of a stream, or a part of one body."""

    def push(self, report: Tokens) -> bool:
        """Writes what a worker's tokens add to the answer. False: they were the last of the choice."""
        if self._stops is None and not self._want_logprobs:
            return self._push_plain(report)
        tokens, logprobs = report.tokens, report.logprobs
        for index, token in enumerate(tokens):
            self.token_count += 1
            ends = report.finish == "stop" and index == len(tokens) - 1
            text = "" if ends and not self._include_stop else self._detokenizer.push((token,))
            ahead = self._detokenizer.ahead()
            self._length += len(text)
            start, self._seen = self._seen, max(self._seen, self._length + len(ahead))
            if self._want_logprobs and logprobs is not None and index < len(logprobs):
                self._entries.append(LogprobEntry(token, logprobs[index], start, self._seen))
            if self._scan(text):
                return False
            if ahead and self._stops is not None and self._stops.completes(ahead):
                self._scan(self._detokenizer.flush())
                return False
        if report.finish is None:
            return True
        rest = self._detokenizer.flush()
        if rest and self._scan(rest):
            return False
        held = self._stops.flush() if self._stops is not None else ""
        self._release(held, report.finish)
        return False

    def mute(self) -> None:
        """Ends without any text: the caller wanted its prompt back and nothing else."""
        self._release("", "length")

    def _push_plain(self, report: Tokens) -> bool:
        tokens, finish = report.tokens, report.finish
        self.token_count += len(tokens)
        if finish is None:
            text = self._detokenizer.push(tokens)
            if text:
                self.write(text, (), None)
            return True
        if finish == "stop" and not self._include_stop:
            tokens = tokens[:-1]
        self.finish = finish
        self.write(self._detokenizer.push(tokens) + self._detokenizer.flush(), (), finish)
        return False

    def _scan(self, text: str) -> bool:
        """Writes what cannot be part of a stop string. True: one was hit, and the choice has ended."""
        hit = False
        if self._stops is not None:
            text, hit = self._stops.push(text)
        if hit:
            self._release(text, "stop")
        elif text:
            self._release(text, None)
        return hit

    def _release(self, text: str, finish: FinishReason | None) -> None:
        self._released += len(text)
        out: list[LogprobEntry] = []
        if self._entries:
            cut = self._released
            if finish is None:
                out = [entry for entry in self._entries if entry.end <= cut]
            else:
                out = [entry for entry in self._entries if entry.start < cut or entry.start == entry.end]
            self._entries = self._entries[len(out) :] if finish is None else []
        if finish is not None:
            self.finish = finish
        self.write(text, out, finish)
