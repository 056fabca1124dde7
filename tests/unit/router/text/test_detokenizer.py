"""Detokenizing piece by piece, against the library that decodes all tokens at once: for every kind of
decoder, any tokens, any cuts, and any place where a prompt ends."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from router.text.decoder_chain import DecoderChain, byte_level_table
from router.text.detokenizer import ByteDetokenizer, Detokenizer
from router.text.tokenizer import TextTokenizer
from tests.checkpoints import write_tokenizer

LLAMA = (decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse())
DECODERS: dict[str, Any] = {
    "byte level": decoders.ByteLevel(),
    "bytes, fused": decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]),
    "Gemma": decoders.Sequence([*LLAMA]),
    "Llama 2": decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 0)]),
    "strip twice": decoders.Sequence([*LLAMA, decoders.Strip(" ", 2, 0)]),
    "metaspace, always": decoders.Metaspace(prepend_scheme="always"),
    "metaspace, first": decoders.Metaspace(prepend_scheme="first"),
    "metaspace, never": decoders.Metaspace(prepend_scheme="never"),
    "bytes, metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    "word pieces": decoders.WordPiece(cleanup=False),
    "word pieces, cleaned": decoders.WordPiece(cleanup=True),
    "word pieces, fused": decoders.Sequence([decoders.WordPiece(cleanup=True), decoders.Fuse()]),
    "BPE": decoders.BPEDecoder(),
    "CTC": decoders.CTC(pad_token="<pad>"),
    "CTC, metaspace": decoders.Sequence([decoders.CTC(pad_token="<pad>"), decoders.Metaspace()]),
    "none": None,
    "bytes alone": decoders.ByteFallback(),
    "replace in pieces": decoders.Sequence([decoders.Replace("▁", " "), decoders.Replace("  ", "-")]),
    "replace in a text": decoders.Sequence([*LLAMA, decoders.Replace("aa!", "-"), decoders.Strip(" ", 1, 0)]),
    "a text of bytes, stripped": decoders.Sequence([decoders.ByteLevel(), decoders.Strip("!", 1, 0)]),
}
PIECES = [
    "▁", "▁Hi", "▁there", "▁▁", "a", "é", "##a", "##", ".", "▁n't", " 's", "ab</w>", "</w>c", "|", "<pad>",
    "don", "Ġthe", "Ã", "©", "ðŁ", "Ļ", "Ĥ", "!", "Ġ", "<0x>", "<0xZZ>", "x▁y", "aa", " do not",
]  # fmt: skip
BYTES = [f"<0x{byte:02X}>" for byte in b"\nA \xc3\xa9\xe2\x82\xac\xf0\x9f\x80\xff"]
GAP = len(PIECES) + len(BYTES) + 3
"""An id between others that no token has."""


def vocabulary() -> dict[str, int]:
    stand_ins = byte_level_table()
    names = list(dict.fromkeys([*PIECES, *BYTES, *stand_ins]))
    return {name: index + (index >= GAP) for index, name in enumerate(names)}


def make(decoder: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token="a"))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("▁</s>", special=True)])
    tokenizer.add_tokens([AddedToken("<think now>"), AddedToken("▁added")])
    return tokenizer


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[TextTokenizer, Tokenizer]]:
    found = {}
    for name, decoder in DECODERS.items():
        directory = tmp_path_factory.mktemp("decoder")
        library = make(decoder)
        library.save(str(directory / "tokenizer.json"))
        found[name] = (TextTokenizer(directory), library)
    return found


SIZE = len(vocabulary()) + 1 + 4
LAST = SIZE - 1
few = st.integers(0, GAP + 2) | st.integers(SIZE - 4, SIZE + 2)
tokens = st.lists(few | st.integers(0, LAST), max_size=30)
bytes_first = st.lists(st.integers(len(PIECES), GAP) | few, max_size=30)

SPECIAL = SIZE - 4
NAMES = vocabulary()
runs = st.sampled_from(
    [SPECIAL, GAP, *(NAMES[name] for name in ("aa", "a", "▁", "<0x0A>", "<0x41>", "<pad>"))]
)
"""What may come many times, so that a prompt's end alone does not say what was before."""
prompts = st.lists(st.tuples(runs, st.integers(1, 14)) | st.tuples(few, st.just(1)), max_size=12).map(
    lambda parts: [token for token, count in parts for _ in range(count)]
)
cuts = st.lists(st.integers(0, 1000), max_size=8)


def cut(items: list[int], at: list[int]) -> list[list[int]]:
    edges = sorted({0, len(items), *[place % (len(items) + 1) for place in at]})
    return [items[start:end] for start, end in itertools.pairwise(edges)]


def streamed(detokenizer: Detokenizer, pieces: list[list[int]], whole: str) -> str:
    text = ""
    for piece in pieces:
        ahead = text
        text += detokenizer.push(piece)
        assert whole.startswith(text), "something was passed on that what follows takes back"
        assert text.startswith(ahead)
    return text + detokenizer.flush()


@pytest.mark.parametrize("name", DECODERS)
@given(tokens=tokens | bytes_first, at=cuts, special=st.booleans())
@settings(max_examples=50, deadline=None)
def test_any_tokens_in_any_pieces_give_what_the_library_decodes(
    pairs: dict[str, tuple[TextTokenizer, Tokenizer]],
    name: str,
    tokens: list[int],
    at: list[int],
    special: bool,
) -> None:
    ours, library = pairs[name]
    whole = library.decode(tokens, skip_special_tokens=not special)
    assert streamed(ours.detokenizer(special), cut(tokens, at), whole) == whole


@pytest.mark.parametrize("name", DECODERS)
@given(prompt=prompts | bytes_first, tokens=tokens | bytes_first, at=cuts)
@settings(max_examples=80, deadline=None)
def test_prompt_and_completion_are_what_all_tokens_decode_to(
    pairs: dict[str, tuple[TextTokenizer, Tokenizer]],
    name: str,
    prompt: list[int],
    tokens: list[int],
    at: list[int],
) -> None:
    ours, library = pairs[name]
    shown = [library.decode(prompt)]
    whole = library.decode(prompt + tokens)

    def take_back(text: str) -> None:
        assert text and shown[0].endswith(text)
        shown[0] = shown[0].removesuffix(text)

    detokenizer = ours.continuation(prompt).detokenizer(take_back)
    completion = ""
    for piece in cut(tokens, at):
        completion += detokenizer.push(piece)
        assert whole.startswith(shown[0] + completion) or not completion
    completion += detokenizer.flush()
    assert shown[0] + completion == whole
    if whole.startswith(library.decode(prompt)):
        assert shown[0] == library.decode(prompt)


@pytest.mark.parametrize("name", DECODERS)
@given(prompt=st.lists(few, min_size=20, max_size=60), tokens=st.lists(few, max_size=4))
@settings(max_examples=20, deadline=None)
def test_choices_of_one_prompt_do_not_mix(
    pairs: dict[str, tuple[TextTokenizer, Tokenizer]], name: str, prompt: list[int], tokens: list[int]
) -> None:
    ours, library = pairs[name]
    continuation = ours.continuation(prompt)
    texts = []
    for _ in range(3):
        detokenizer = continuation.detokenizer(lambda text: None)
        texts.append(detokenizer.push(tokens) + detokenizer.flush())
    assert len(set(texts)) == 1
    assert library.decode(prompt + tokens).endswith(texts[0])


@pytest.mark.parametrize("name", DECODERS)
@given(tokens=tokens | bytes_first)
@settings(max_examples=20, deadline=None)
def test_what_lies_ahead_is_what_a_flush_would_give(
    pairs: dict[str, tuple[TextTokenizer, Tokenizer]], name: str, tokens: list[int]
) -> None:
    ours, library = pairs[name]
    detokenizer = ours.detokenizer()
    text = detokenizer.push(tokens)
    ahead = detokenizer.ahead()
    assert detokenizer.ahead() == ahead
    flushed = detokenizer.flush()
    assert ahead in ("", flushed)
    assert text + flushed == library.decode(tokens)


@pytest.mark.parametrize("name", DECODERS)
@given(tokens=tokens | bytes_first)
@settings(max_examples=20, deadline=None)
def test_a_list_of_tokens_is_decoded_with_its_special_ones(
    pairs: dict[str, tuple[TextTokenizer, Tokenizer]], name: str, tokens: list[int]
) -> None:
    ours, library = pairs[name]
    assert ours.decode(tokens) == library.decode(tokens, skip_special_tokens=False)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return TextTokenizer(directory)


def kept(text: str) -> None:
    raise AssertionError(f"{text!r} was taken back")


def test_a_byte_level_vocabulary_takes_a_table(byte_level: TextTokenizer) -> None:
    assert isinstance(byte_level.detokenizer(), ByteDetokenizer)


def test_a_character_of_many_tokens_comes_at_its_last_one(byte_level: TextTokenizer) -> None:
    tokens = byte_level.encode("🙂", False)
    assert len(tokens) == 4
    detokenizer = byte_level.detokenizer()
    assert [detokenizer.push([token]) for token in tokens] == ["", "", "", "🙂"]


def test_an_unfinished_character_becomes_a_replacement_at_the_end(byte_level: TextTokenizer) -> None:
    detokenizer = byte_level.detokenizer()
    assert detokenizer.push(byte_level.encode("a🙂", False)[:-1]) == "a"
    assert detokenizer.flush() == "\N{REPLACEMENT CHARACTER}"
    assert detokenizer.flush() == ""


def test_half_a_character_of_the_prompt_is_taken_back_when_the_other_half_comes(
    byte_level: TextTokenizer,
) -> None:
    tokens = byte_level.encode("é", False)
    taken: list[str] = []
    continuation = byte_level.continuation(tokens[:1])
    completed = continuation.detokenizer(taken.append)
    assert (completed.push(tokens[1:]), taken) == ("é", ["\N{REPLACEMENT CHARACTER}"])
    other = continuation.detokenizer(kept)
    assert other.push(byte_level.encode("x", False)) + other.flush() == "x"


def test_tokens_beyond_the_tokenizer_have_no_text(
    byte_level: TextTokenizer, pairs: dict[str, tuple[TextTokenizer, Tokenizer]]
) -> None:
    for tokenizer in (byte_level, *(ours for ours, _ in pairs.values())):
        detokenizer = tokenizer.detokenizer()
        assert detokenizer.push([tokenizer.size + 5, 2**31 - 1]) + detokenizer.flush() == ""
        assert tokenizer.token_text(tokenizer.size + 5) == ""


def test_the_space_between_prompt_and_completion_is_kept(
    pairs: dict[str, tuple[TextTokenizer, Tokenizer]],
) -> None:
    ours, _ = pairs["metaspace, always"]
    hi, there = NAMES["▁Hi"], NAMES["▁there"]
    detokenizer = ours.continuation([hi]).detokenizer(kept)
    assert detokenizer.push([there, hi]) == " there Hi"
    assert ours.continuation([SPECIAL]).detokenizer(kept).push([there]) == "there"


def test_a_line_end_of_the_prompt_is_not_sent_again(
    pairs: dict[str, tuple[TextTokenizer, Tokenizer]],
) -> None:
    ours, _ = pairs["Llama 2"]
    hi, line, invalid = NAMES["▁Hi"], NAMES["<0x0A>"], NAMES["<0xFF>"]
    continuation = ours.continuation([hi, line])
    assert continuation.detokenizer(kept).push([hi]) == " Hi"
    taken: list[str] = []
    detokenizer = continuation.detokenizer(taken.append)
    assert detokenizer.push([invalid]) + detokenizer.flush() == "\N{REPLACEMENT CHARACTER}" * 2
    assert taken == ["\n"]


def test_what_may_still_match_is_sent_once(pairs: dict[str, tuple[TextTokenizer, Tokenizer]]) -> None:
    ours, _ = pairs["replace in a text"]
    one, two, mark = NAMES["a"], NAMES["aa"], NAMES["!"]
    detokenizer = ours.continuation([one, two]).detokenizer(kept)
    assert [detokenizer.push([token]) for token in (one, one, mark)] == ["", "", "-"]


def test_tokens_on_which_the_library_gives_up(pairs: dict[str, tuple[TextTokenizer, Tokenizer]]) -> None:
    """Its `DecodeStream` raises where bytes after whole characters are none."""
    ours, library = pairs["bytes, fused"]
    run = [*(NAMES[f"<0x{byte:02X}>"] for byte in (0xC3, 0xA9, 0x80)), NAMES["a"]]
    stream = decoders.DecodeStream(skip_special_tokens=True)
    with pytest.raises(Exception, match="Invalid prefix"):
        for token in run:
            stream.step(library, token)
    assert streamed(ours.detokenizer(), [[token] for token in run], "\ufffd" * 3 + "a") == "\ufffd" * 3 + "a"


@pytest.mark.parametrize(
    ("name", "token", "text"),
    [
        ("Llama 2", "▁there", " there"),
        ("metaspace, always", "▁there", " there"),
        ("word pieces", "##a", "a"),
        ("word pieces", "don", " don"),
        ("none", "don", " don"),
        ("BPE", "ab</w>", "ab "),
        ("byte level", "Ġthe", " the"),
    ],
)
def test_a_token_by_itself_is_what_it_is_amid_others(
    pairs: dict[str, tuple[TextTokenizer, Tokenizer]], name: str, token: str, text: str
) -> None:
    assert pairs[name][0].token_text(NAMES[token]) == text


def test_a_byte_by_itself(pairs: dict[str, tuple[TextTokenizer, Tokenizer]]) -> None:
    assert pairs["Llama 2"][0].token_bytes(NAMES["<0xC3>"]) == b"\xc3"
    assert pairs["metaspace, always"][0].token_bytes(NAMES["<0xC3>"]) == b"<0xC3>"


def test_a_decoder_that_needs_the_whole_text_gives_it_at_the_end(tmp_path: Path) -> None:
    library = make(decoders.Sequence([*LLAMA, decoders.ByteLevel()]))
    library.save(str(tmp_path / "tokenizer.json"))
    ours = TextTokenizer(tmp_path)
    tokens = [NAMES["a"], NAMES["Ġthe"]]
    detokenizer = ours.continuation([NAMES["aa"]]).detokenizer(kept)
    assert detokenizer.push(tokens) == ""
    assert detokenizer.flush() == library.decode([NAMES["aa"], *tokens]).removeprefix("aa")


def test_a_long_run_of_bytes_costs_no_more_than_others(
    pairs: dict[str, tuple[TextTokenizer, Tokenizer]],
) -> None:
    """Looking ahead of a long run is given up, and the run is still text at its end."""
    ours, _ = pairs["Llama 2"]
    detokenizer = ours.detokenizer()
    for _ in range(4):
        assert detokenizer.push([NAMES["<0x41>"]] * 256) == ""
    assert detokenizer.ahead() == "A" * 1024
    assert detokenizer.push([NAMES["<0x41>"]]) == detokenizer.ahead() == ""
    assert detokenizer.flush() == "A" * 1025


def test_a_decoder_that_nobody_knows_is_named() -> None:
    with pytest.raises(ValueError, match="'Other' is not known"):
        DecoderChain({"type": "Other"})
