"""Detokenizing and stop strings, against references that see the whole text at once."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from router.text import ByteDetokenizer, StopScanner, StreamDetokenizer
from router.tokenizer import TextTokenizer
from tests.checkpoints import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return TextTokenizer(directory)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("library")
    write_tokenizer(directory)
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def cut(items: list[int], cuts: list[int]) -> list[list[int]]:
    edges = sorted({0, len(items), *[at % (len(items) + 1) for at in cuts]})
    return [items[start:end] for start, end in itertools.pairwise(edges)]


token_ids = st.lists(st.integers(0, 319), max_size=40)
cuts = st.lists(st.integers(0, 1000), max_size=8)
texts = st.text(max_size=30)


@given(tokens=token_ids, cuts=cuts)
@settings(max_examples=300, deadline=None)
def test_any_tokens_in_any_pieces_give_what_the_library_decodes(
    tokenizer: TextTokenizer, library: Tokenizer, tokens: list[int], cuts: list[int]
) -> None:
    detokenizer = tokenizer.detokenizer()
    assert isinstance(detokenizer, ByteDetokenizer)
    text = "".join(detokenizer.push(piece) for piece in cut(tokens, cuts)) + detokenizer.flush()
    assert text == library.decode(tokens, skip_special_tokens=True)


@given(text=texts, cuts=cuts)
@settings(max_examples=200, deadline=None)
def test_text_survives_the_way_through_tokens(
    tokenizer: TextTokenizer, library: Tokenizer, text: str, cuts: list[int]
) -> None:
    tokens = library.encode(text).ids
    for detokenizer in (tokenizer.detokenizer(), StreamDetokenizer(library, 320)):
        assert "".join(detokenizer.push(piece) for piece in cut(tokens, cuts)) + detokenizer.flush() == text


def test_a_character_of_many_tokens_comes_at_its_last_one(
    tokenizer: TextTokenizer, library: Tokenizer
) -> None:
    tokens = library.encode("🙂").ids
    assert len(tokens) == 4
    for detokenizer in (tokenizer.detokenizer(), StreamDetokenizer(library, 320)):
        assert [detokenizer.push([token]) for token in tokens] == ["", "", "", "🙂"]


def test_an_unfinished_character_becomes_a_replacement_at_the_end(
    tokenizer: TextTokenizer, library: Tokenizer
) -> None:
    tokens = library.encode("a🙂").ids[:-1]
    for detokenizer in (tokenizer.detokenizer(), StreamDetokenizer(library, 320)):
        assert detokenizer.push(tokens) == "a"
        assert detokenizer.flush() == "\N{REPLACEMENT CHARACTER}"
        assert detokenizer.flush() == ""


def test_tokens_beyond_the_tokenizer_have_no_text(tokenizer: TextTokenizer) -> None:
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.push([tokenizer.size + 5]) + detokenizer.flush() == ""
    assert tokenizer.token_text(tokenizer.size + 5) == ""


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """`<s>`, `▁Hi`, `▁there`, and from 4 on a token for each byte."""
    vocab = {
        "<unk>": 0,
        "<s>": 1,
        "▁Hi": 2,
        "▁there": 3,
        **{f"<0x{byte:02X}>": 4 + byte for byte in range(256)},
    }
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.add_special_tokens(["<s>"])
    directory = tmp_path_factory.mktemp("fallback")
    bpe.save(str(directory / "tokenizer.json"))
    return TextTokenizer(directory)


def test_a_vocabulary_with_byte_fallback(fallback: TextTokenizer) -> None:
    tokens = [1, 2, 3, *[4 + byte for byte in "é".encode()]]
    for continues, text in ((False, "Hi thereé"), (True, " Hi thereé")):
        detokenizer = fallback.detokenizer(continues)
        assert "".join(detokenizer.push([token]) for token in tokens) + detokenizer.flush() == text
    assert fallback.decode(tokens, skip_special_tokens=True) == "Hi thereé"
    assert fallback.token_bytes(4 + 0xC3) == b"\xc3"
    assert fallback.token_text(3) == " there"


@given(tokens=st.lists(st.integers(1, 259), max_size=40), cuts=cuts)
@settings(max_examples=300, deadline=None)
def test_bytes_that_are_no_text_take_nothing_back(
    fallback: TextTokenizer, tokens: list[int], cuts: list[int]
) -> None:
    words = {1: b"", 2: b" Hi", 3: b" there"}
    whole = b"".join(words[token] if token < 4 else bytes([token - 4]) for token in tokens)
    detokenizer = fallback.detokenizer()
    text = "".join(detokenizer.push(piece) for piece in cut(tokens, cuts)) + detokenizer.flush()
    assert text == whole.decode("utf-8", "replace").removeprefix(" ")


def test_any_other_vocabulary_is_detokenized_by_the_library(tmp_path: Path) -> None:
    library = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    library.decoder = decoders.WordPiece()
    library.save(str(tmp_path / "tokenizer.json"))
    detokenizer = TextTokenizer(tmp_path).detokenizer()
    assert isinstance(detokenizer, StreamDetokenizer)
    assert detokenizer.push([1, 2, 1]) + detokenizer.flush() == "playing play"


def naive_stop(text: str, stops: list[str], include: bool) -> tuple[str, bool]:
    """Reads character by character, and stops where the text so far ends in a stop string."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[:end] if include else text[: end - max(map(len, ending))], True
    return text, False


small_texts = st.text(alphabet="abc", max_size=24)
small_stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4)


@given(text=small_texts, stops=small_stops, cuts=cuts, include=st.booleans())
@settings(max_examples=1000, deadline=None)
def test_stop_strings_are_found_however_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    expected, expected_hit = naive_stop(text, stops, include)
    scanner = StopScanner(stops, include)
    out, hit = "", False
    for piece in cut([ord(character) for character in text], cuts):
        passed, hit = scanner.push("".join(map(chr, piece)))
        out += passed
        assert expected.startswith(out), "something was passed on that a stop string takes back"
        if hit:
            break
    if not hit:
        out += scanner.flush()
    assert (out, hit) == (expected, expected_hit)


def test_no_more_is_held_back_than_could_begin_a_stop_string() -> None:
    scanner = StopScanner(["\n\nUser:"])
    assert scanner.push("Hello\n") == ("Hello", False)
    assert scanner.push("\nU") == ("", False)
    assert scanner.push("ncle") == ("\n\nUncle", False)
    assert scanner.push("\n\nUser: x") == ("", True)
