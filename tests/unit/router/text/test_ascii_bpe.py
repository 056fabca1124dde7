"""Words from memory give the ids that the library gives, or leave the text to it."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import router.text.ascii_bpe
from router.text.ascii_bpe import MAX_WORD_CHARACTERS, AsciiBpeEncoder, ascii_pattern, starts_at_spaces
from router.text.decoder_chain import byte_level_table

STAND_INS = {byte: text for text, byte in byte_level_table().items()}
PATTERNS = {
    "gpt2": None,
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'ll)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'ll)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
CORPUS = ["The runner's baton: it'll be 1234 handed on, don't DROP it!\n\n  So\tthe end... " * 20]


def make(pattern: str | None, **added: Any) -> Tokenizer:
    """A byte-level BPE with a token that begins every text and two that are cut out of it."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is None:
        tokenizer.pre_tokenizer = byte_level
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, **added) for text in ("<s>", "<|a|>", "<|a|>b")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def words_of(tokenizer: Tokenizer) -> AsciiBpeEncoder | None:
    return AsciiBpeEncoder.make(tokenizer, json.loads(tokenizer.to_str()), STAND_INS)


ENCODERS = {name: (made := make(pattern), words_of(made)) for name, pattern in PATTERNS.items()}
PIECES = st.sampled_from(
    [
        *("<|a|>", "<|a|>b", "<s>", "it's", "DON'T", "12345", " baton", "\x1c", "'"),
        *(" ", "  ", "\n ", " \n", "\r\n"),
    ]
)
TEXTS = st.lists(PIECES | st.text(st.characters(max_codepoint=127), max_size=8), max_size=12).map("".join)


@pytest.mark.parametrize("name", PATTERNS)
@given(text=TEXTS, special=st.booleans())
def test_any_ascii_text_gives_what_the_library_gives(name: str, text: str, special: bool) -> None:
    tokenizer, words = ENCODERS[name]
    assert words is not None
    for _ in range(2):  # the second time from memory
        assert words.encode(text, special) == tokenizer.encode(text, add_special_tokens=special).ids


def test_texts_are_cut_at_spaces_only_where_every_alternative_is_known() -> None:
    for name, pattern in PATTERNS.items():
        encoder = ENCODERS[name][1]
        assert encoder is not None
        assert encoder._at_spaces
        assert pattern is None or starts_at_spaces(pattern)
        assert pattern is None or not starts_at_spaces(pattern + r"|\p{L}+ \p{L}+")
    assert not starts_at_spaces(r" ?\p{L}+ ?\p{L}+|\s+")
    assert not starts_at_spaces(r"(?i:a b|'s)|\s+")


def test_a_pattern_that_joins_words_is_never_cut_at_spaces() -> None:
    tokenizer = make(r"[a-z]+ [a-z]+|\s+|\S")
    words = words_of(tokenizer)
    assert words is not None
    for text in ("one two three four", "x y  z"):
        assert words.encode(text, False) == tokenizer.encode(text, add_special_tokens=False).ids


def test_other_texts_are_the_librarys() -> None:
    words = ENCODERS["gpt2"][1]
    assert words is not None
    assert words.encode("né", True) is None


def test_tokenizers_of_another_make_are_not_understood() -> None:
    assert words_of(make(None, lstrip=True)) is None
    assert words_of(make(None, single_word=True)) is None
    metaspace = make(None)
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace()
    assert words_of(metaspace) is None
    prefixed = make(None)
    prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert words_of(prefixed) is None
    assert AsciiBpeEncoder.make(make(None), {"model": {"type": "Unigram"}}, STAND_INS) is None


def test_a_pattern_that_leaves_something_out_is_not_trusted() -> None:
    # The library makes one piece of what lies between two matches.
    tokenizer = make(r"\p{L}+")
    assert words_of(tokenizer) is None
    unproved = AsciiBpeEncoder(tokenizer, "[A-Za-z]+", {}, STAND_INS)
    assert unproved.encode("baton", False) == tokenizer.encode("baton", add_special_tokens=False).ids
    assert unproved.encode("baton 12", False) is None


def test_one_disagreement_with_the_library_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make(PATTERNS["llama3"])
    assert words_of(tokenizer) is not None
    monkeypatch.setattr(router.text.ascii_bpe, "ascii_pattern", lambda source: r"[A-Za-z]+|[^A-Za-z]+")
    assert words_of(tokenizer) is None


@pytest.mark.parametrize(
    ("source", "translated"),
    [
        (r" ?\p{L}+|[^\s\p{L}\p{N}]", r" ?[A-Za-z]+|[^\sA-Za-z0-9]"),
        (r"(a|b)\p{M}", r"(?:a|b)(?!)"),
        (r"\p{Han}+", None),
        (r"[a[bc]]", None),
        (r"[a&&b]", None),
        (r"^a", None),
        (r"a.", None),
        (r"(?<=a)b", None),
        (r"a{1,2}+", None),
        (r"\h", None),
        (r"[\p{M}]", None),
    ],
)
def test_patterns_are_translated_or_refused(source: str, translated: str | None) -> None:
    assert ascii_pattern(source) == translated


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router.text.ascii_bpe, "MAX_WORDS", 3)
    tokenizer = make(None)
    words = words_of(tokenizer)
    assert words is not None
    for text in ("one two three four five", "x" * (MAX_WORD_CHARACTERS + 1), "one two three four five"):
        assert words.encode(text, False) == tokenizer.encode(text, add_special_tokens=False).ids
        for memory in (words._known, words._after_space):
            assert 0 < len(memory) <= 3 or memory is words._after_space
            assert all(len(word) <= MAX_WORD_CHARACTERS for word in memory)
