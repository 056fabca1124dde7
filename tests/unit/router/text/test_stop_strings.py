"""Stop strings, against a reference that sees the whole text at once."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from router.text.stop_strings import StopScanner


def cut(items: list[int], cuts: list[int]) -> list[list[int]]:
    edges = sorted({0, len(items), *[at % (len(items) + 1) for at in cuts]})
    return [items[start:end] for start, end in itertools.pairwise(edges)]


cuts = st.lists(st.integers(0, 1000), max_size=8)


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
