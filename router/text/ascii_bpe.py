"""A byte-level BPE encoder for ASCII text with a cache of words: a word's tokens never change. Pure.

The library spends its time on Unicode classes, offsets and masks that the router does not ask for. For ASCII
text the encoder cuts out added tokens, cuts the rest into words by the tokenizer's own pattern (its Unicode
classes narrowed to ASCII), and asks the model for the tokens of each word once. Where every single space
begins a word of the pattern, the encoder cuts there first, so that the pattern sees only what comes between
two spaces for the first time. The library encodes other texts, and all texts of tokenizers of another make.
"""

import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from tokenizers import Tokenizer

_FORMAT: Final = "I"
"""Of packed tokens, for `array` and `memoryview`."""
MAX_WORDS = 1 << 15
MAX_WORD_CHARACTERS = 32
"""Longer ones are seldom met twice; without a bound a client could fill the memory with them."""

_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What `ByteLevel` with `use_regex` stands for."""
_ASCII_OF_CLASS = {
    "L": "A-Za-z", "Lu": "A-Z", "Ll": "a-z", "N": "0-9", "Nd": "0-9",
    "Lt": "", "Lm": "", "Lo": "", "M": "", "Mn": "", "Nl": "", "No": "",
}  # fmt: skip
_SAME_ESCAPES = frozenset("rntsSdDwW")
_CONTRACTIONS = re.compile(r"'?\(\?i?:['\w\[\]|]+\)")
"""A choice of letters and apostrophes."""
_STARTS_AT_SPACES = frozenset(
    (
        "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "CONTRACTIONS",
        r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+",
        r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,3}", r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+CONTRACTIONS?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*CONTRACTIONS?",
        r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
    )
)  # fmt: skip
"""Alternatives of GPT-2, Llama 3, Qwen 2 and o200k. A space that follows none and comes before no white space
is the first character of whatever matches it: those that are not white space alone take a space as their
first character only, and those that are end before it, just as they end where a text does."""
_GROUPS = re.compile(r"\((?!\?)|\(\?(?:i?:|!|=)")
_CLASS_NAME = re.compile(r"\\p\{(\w+)\}")
_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD")
"""They leave ASCII as it is."""


def ascii_pattern(source: str) -> str | None:
    """An Oniguruma pattern as one of `re` that matches the same in ASCII text; None where that is unsure."""
    out: list[str] = []
    in_class = False
    at = 0
    while at < len(source):
        character, step = source[at], 1
        if character == "\\":
            named = _CLASS_NAME.match(source, at)
            following = source[at + 1 : at + 2]
            if named is not None and named[1] in _ASCII_OF_CLASS:
                members = _ASCII_OF_CLASS[named[1]]
                out.append(members if in_class else f"[{members}]" if members else "(?!)")
                step = len(named[0])
            elif following in _SAME_ESCAPES or not following.isalnum():
                out.append(character + following)
                step = 2
            else:
                return None
        elif in_class:
            if character == "[" or source.startswith("&&", at):
                return None
            in_class = character != "]"
            out.append(character)
        elif character in ".^$" or source.startswith("}+", at):
            return None
        else:
            in_class = character == "["
            if character == "(" and _GROUPS.match(source, at) is None:
                return None
            # findall must give whole matches.
            out.append("(?:" if character == "(" and source[at + 1 : at + 2] != "?" else character)
        at += step
    pattern = "".join(out)
    return None if "[]" in pattern or "[^]" in pattern else pattern


def starts_at_spaces(source: str) -> bool:
    """Whether a pattern begins a word at every space that follows none and comes before no white space; False
    where that is unsure."""
    return _STARTS_AT_SPACES.issuperset(_CONTRACTIONS.sub("CONTRACTIONS", source).split("|"))


def _pattern_of(values: dict[str, Any]) -> str | None:
    """The tokenizer's own pattern, where the pre-tokenizer is one pattern and the bytes' stand-ins."""
    entry = values.get("pre_tokenizer") or {}
    steps: list[dict[str, Any]] = entry.get("pretokenizers") or [entry]
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") is not False:
        return None
    if len(steps) == 1:
        return _GPT2_PATTERN if last.get("use_regex", True) else None
    if len(steps) != 2 or last.get("use_regex", True) or steps[0].get("type") != "Split":
        return None
    if steps[0].get("behavior") != "Isolated" or steps[0].get("invert"):
        return None
    source = (steps[0].get("pattern") or {}).get("Regex")
    return source if isinstance(source, str) else None


def _is_understood(values: dict[str, Any]) -> bool:
    normalizer = (values.get("normalizer") or {}).get("type")
    added = values.get("added_tokens") or []
    return (
        (normalizer is None or normalizer in _NORMALIZERS)
        and (values.get("model") or {}).get("type") == "BPE"
        and not values["model"].get("dropout")
        and not any(entry.get(flag) for entry in added for flag in ("single_word", "lstrip", "rstrip"))
        # Those of two kinds would be looked for one kind after the other.
        and len({bool(entry.get("normalized")) for entry in added}) <= 1
    )


def _probes(added: Sequence[str]) -> list[str]:
    """Texts with every pair of ASCII characters, every triple of those that patterns care about."""
    characters = [chr(code) for code in range(128)]
    cared = "aZ7 \n\r\t'._"
    return [
        "".join(first + second for first in characters for second in characters),
        "".join(a + b + c for a in cared for b in cared for c in cared),
        "It's 12345 o'clock; WE'LL see:\n\n  \t x=1\r\n   end  ",
        " ".join(added),
        "a".join(added) + "\n",
    ]


def _pack(ids: Iterable[int]) -> bytes:
    return array(_FORMAT, ids).tobytes()


class _Unsure(Exception):
    """This way of cutting the text may not be the library's."""


class _WordCache(dict[str, bytes]):
    """A cache of packed tokens by text. It asks for those of a new text, and keeps them if the text is short.

    Packed, since thousands of lists lie scattered with their numbers, and are all the garbage collector's.
    """

    def __init__(self, ask: Callable[[str], bytes]) -> None:
        super().__init__()
        self._ask = ask

    def __missing__(self, text: str) -> bytes:
        tokens = self._ask(text)
        if len(text) <= MAX_WORD_CHARACTERS:
            if len(self) >= MAX_WORDS:
                self.clear()
            self[text] = tokens
        return tokens


class AsciiBpeEncoder:
    """The ids that `tokenizer.encode` gives, for ASCII text. `make` is the way to get one.

    `table` maps each ASCII character to its byte's stand-in in the vocabulary; `at_spaces` is what
    `starts_at_spaces` says of the pattern.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        pattern: str,
        added: dict[str, int],
        table: dict[int, str],
        at_spaces: bool = False,
    ) -> None:
        self._model, self._table = tokenizer.model, table
        self._added = {text: _pack((token,)) for text, token in added.items()}
        self._words = re.compile(pattern, re.ASCII)
        longest_first = sorted(added, key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if added else None
        plain: list[int] = tokenizer.encode("a", add_special_tokens=False).ids
        whole: list[int] = tokenizer.encode("a", add_special_tokens=True).ids
        starts = [at for at in range(len(whole)) if whole[at : at + len(plain)] == plain]
        self._before = _pack(whole[: starts[0]])
        self._after = _pack(whole[starts[0] + len(plain) :])
        self._at_spaces = at_spaces
        self._known = _WordCache(self._ask)
        self._after_space = _WordCache(self._ask_after_space)

    @classmethod
    def make(
        cls, tokenizer: Tokenizer, values: dict[str, Any], stand_ins: dict[int, str]
    ) -> "AsciiBpeEncoder | None":
        """`values` is the content of `tokenizer.json`. None for a tokenizer that this does not understand, or
        on which it once disagrees with the library."""
        source = _pattern_of(values)
        pattern = None if source is None else ascii_pattern(source)
        if source is None or pattern is None or not _is_understood(values):
            return None
        added = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
        try:
            encoder = cls(tokenizer, pattern, added, stand_ins, starts_at_spaces(source))
        except (re.error, IndexError):
            return None
        for probe in _probes(list(added)):
            for special in (False, True):
                expected = tokenizer.encode(probe, add_special_tokens=special).ids
                if probe.isascii() and encoder.encode(probe, special) != expected:
                    return None
        encoder._known.clear()
        encoder._after_space.clear()
        return encoder

    def encode(self, text: str, add_special_tokens: bool) -> list[int] | None:
        """None: the library must do it."""
        if not text.isascii():
            return None
        packed = [self._before] if add_special_tokens else []
        parts = [text] if self._cut is None else self._cut.split(text)
        try:
            for number, part in enumerate(parts):
                if number % 2:
                    packed.append(self._added[part])
                elif part:
                    packed += self._encode_part(part)
        except _Unsure:
            return None
        if add_special_tokens:
            packed.append(self._after)
        return memoryview(b"".join(packed)).cast(_FORMAT).tolist()

    def _encode_part(self, text: str) -> list[bytes]:
        """Packed tokens, in pieces. Raises _Unsure if the pattern leaves something out."""
        if not self._at_spaces:
            return self._encode_words(text)
        first, *others = text.split(" ")
        try:
            # All in C where everything was met before.
            return [*self._encode_words(first), *map(self._after_space.__getitem__, others)]
        except _Unsure:
            return self._encode_words(text)

    def _encode_words(self, text: str) -> list[bytes]:
        words = self._words.findall(text)
        if len("".join(words)) != len(text):
            raise _Unsure
        return list(map(self._known.__getitem__, words))

    def _ask(self, word: str) -> bytes:
        return _pack(token.id for token in self._model.tokenize(word.translate(self._table)))

    def _ask_after_space(self, text: str) -> bytes:
        # With more white space the pattern takes them together.
        if not text or text[0].isspace():
            raise _Unsure
        return b"".join(self._encode_words(" " + text))
