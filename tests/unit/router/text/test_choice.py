"""One choice: stops across tokens, end tokens, log probabilities beside the text they belong to."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models

from router.text.choice import Choice, LogprobEntry
from router.text.tokenizer import TextTokenizer
from services.protocol.messages import FinishReason, TokenLogprob, Tokens
from tests.checkpoints import IM_END, write_tokenizer


class Written(Choice):
    """A choice, and all that it has written."""

    def __init__(self, tokenizer: TextTokenizer, stops: Sequence[str], include: bool, logprobs: bool) -> None:
        super().__init__(tokenizer.detokenizer(), stops, include, logprobs)
        self.text = ""
        self.entries: list[LogprobEntry] = []
        self.finishes: list[FinishReason] = []

    def write(self, text: str, entries: Sequence[LogprobEntry], finish: FinishReason | None) -> None:
        self.text += text
        self.entries += entries
        if finish is not None:
            self.finishes.append(finish)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return TextTokenizer(directory)


def ids(tokenizer: TextTokenizer, text: str) -> list[int]:
    return [token for character in text for token in tokenizer.encode(character, False)]


def make(
    tokenizer: TextTokenizer, stops: Sequence[str] = (), include: bool = False, logprobs: bool = False
) -> Written:
    return Written(tokenizer, stops, include, logprobs)


@pytest.mark.parametrize("stops", [(), ("never",)])
def test_an_end_token_counts_but_has_no_text(tokenizer: TextTokenizer, stops: tuple[str, ...]) -> None:
    written = make(tokenizer, stops)
    end = tokenizer.encode(IM_END, False)
    assert written.push(Tokens(1, 0, ids(tokenizer, "ok")))
    assert not written.push(Tokens(1, 0, end, None, "stop"))
    assert (written.text, written.finishes, written.token_count) == ("ok", ["stop"], 3)


def test_an_end_token_that_is_no_special_token_has_no_text_either(tokenizer: TextTokenizer) -> None:
    written = make(tokenizer)
    assert not written.push(Tokens(1, 0, ids(tokenizer, "okX"), None, "stop"))
    assert written.text == "ok"
    written = make(tokenizer, include=True)
    assert not written.push(Tokens(1, 0, ids(tokenizer, "okX"), None, "stop"))
    assert written.text == "okX"


def test_length_keeps_the_last_token_and_flushes_half_a_character(tokenizer: TextTokenizer) -> None:
    written = make(tokenizer, stops=("b!",))
    assert not written.push(Tokens(1, 0, [*ids(tokenizer, "ab"), *ids(tokenizer, "é")[:1]], None, "length"))
    assert (written.text, written.finishes) == ("ab\N{REPLACEMENT CHARACTER}", ["length"])


def test_a_stop_string_over_several_reports_wins_over_length(tokenizer: TextTokenizer) -> None:
    written = make(tokenizer, stops=("END",))
    assert written.push(Tokens(1, 0, ids(tokenizer, "a EN")))
    assert written.text == "a "
    assert not written.push(Tokens(1, 0, ids(tokenizer, "D"), None, "length"))
    assert (written.text, written.finishes, written.finish) == ("a ", ["stop"], "stop")


def test_tokens_after_a_stop_string_do_not_count(tokenizer: TextTokenizer) -> None:
    written = make(tokenizer, stops=(".",), include=True)
    assert not written.push(Tokens(1, 0, ids(tokenizer, "a.bcd")))
    assert (written.text, written.token_count) == ("a.", 2)


def test_logprobs_leave_with_their_text_and_those_cut_off_stay(tokenizer: TextTokenizer) -> None:
    written = make(tokenizer, stops=("STOP",), logprobs=True)
    tokens = ids(tokenizer, "aSTx")
    written.push(Tokens(1, 0, tokens[:3], [TokenLogprob(-1.0, []) for _ in range(3)]))
    assert [entry.token for entry in written.entries] == tokens[:1]
    written.push(Tokens(1, 0, tokens[3:], [TokenLogprob(-2.0, [])]))
    assert [entry.token for entry in written.entries] == tokens
    assert [(entry.start, entry.end) for entry in written.entries] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    rest = ids(tokenizer, "STOP")
    assert not written.push(Tokens(1, 0, rest, [TokenLogprob(-3.0, []) for _ in rest]))
    assert (written.text, len(written.entries)) == ("aSTx", 4)


def test_logprobs_of_half_characters_come_with_the_character(tokenizer: TextTokenizer) -> None:
    written = make(tokenizer, logprobs=True)
    tokens = ids(tokenizer, "é")
    assert len(tokens) == 2
    written.push(Tokens(1, 0, tokens[:1], [TokenLogprob(-1.0, [])]))
    written.push(Tokens(1, 0, tokens[1:], [TokenLogprob(-2.0, [])], "length"))
    assert written.text == "é"
    assert [entry.token for entry in written.entries] == tokens


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """`▁a` is 0, `▁b` 1, and from 2 on a token for each byte."""
    vocab = {"▁a": 0, "▁b": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
    library = Tokenizer(models.WordLevel(vocab, unk_token="▁a"))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(parts)
    directory: Path = tmp_path_factory.mktemp("llama")
    library.save(str(directory / "tokenizer.json"))
    return TextTokenizer(directory)


LINE_END = 2 + 0x0A


def test_a_stop_string_ends_a_choice_before_more_bytes_could_change_it(llama: TextTokenizer) -> None:
    written = make(llama, stops=("a\n",))
    assert written.push(Tokens(1, 0, [1, 0]))
    assert not written.push(Tokens(1, 0, [LINE_END]))
    assert (written.text, written.finishes, written.token_count) == ("b ", ["stop"], 3)


def test_bytes_that_may_still_be_no_text_are_not_sent(llama: TextTokenizer) -> None:
    written = make(llama, stops=("never",))
    assert written.push(Tokens(1, 0, [0, LINE_END]))
    assert written.text == "a"
    assert not written.push(Tokens(1, 0, [2 + 0xFF, 1], None, "length"))
    assert written.text == "a\ufffd\ufffd b"


def test_logprobs_tell_where_held_text_will_be(llama: TextTokenizer) -> None:
    written = make(llama, logprobs=True)
    for token in (0, LINE_END, 1):
        assert written.push(Tokens(1, 0, [token], [TokenLogprob(-1.0, [])]))
    assert written.text == "a\n b"
    assert [(entry.start, entry.end) for entry in written.entries] == [(0, 1), (1, 2), (2, 4)]
