import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engine.stopping import OutputText, StopStrings


def feed(pieces, stops, *, keep):
    """(what was shown piece by piece, the text object)."""
    text = OutputText(tuple(stops), keep_stop_text=keep)
    shown = [text.add(piece) for piece in pieces]
    shown.append(text.close())
    return shown, text


@pytest.mark.parametrize(("keep", "expected"), [(True, "one STOP"), (False, "one ")])
@pytest.mark.parametrize(
    "pieces", [["one STOP two"], ["one ST", "OP two"], ["one ", "S", "T", "O", "P", " two"], ["one STOP", " two"]]
)
def test_a_stop_string_matches_wherever_token_ends_are(pieces, keep, expected):
    shown, text = feed(pieces, ["STOP"], keep=keep)
    assert "".join(shown) == text.whole() == expected
    assert text.stopped


def test_the_stop_string_that_is_complete_first_wins():
    assert feed(["xabcd"], ["abcd", "bc"], keep=True)[1].whole() == "xabc"


def test_of_two_that_end_together_the_longer_is_cut():
    assert feed(["xabc"], ["c", "abc"], keep=False)[1].whole() == "x"


def test_text_is_held_back_only_while_it_may_become_a_stop_string():
    shown, _ = feed(["a", "S", "T", "x", "S"], ["STOP"], keep=False)
    assert shown == ["a", "", "", "STx", "", "S"]


def test_kept_stop_text_is_shown_at_once():
    shown, _ = feed(["a", "S", "TOPx"], ["STOP"], keep=True)
    assert shown == ["a", "S", "TOP", ""]


def test_nothing_is_added_after_the_stop():
    text = OutputText(("b",), keep_stop_text=True)
    assert [text.add("abc"), text.add("d"), text.close()] == ["ab", "", ""]


def test_empty_stop_strings_are_ignored():
    shown, text = feed(["a", "b"], ["", "zz"], keep=False)
    assert shown == ["a", "b", ""]
    assert not text.stopped


def test_a_hidden_piece_can_stop_but_is_not_shown():
    text = OutputText(("<end>",), keep_stop_text=True)
    assert [text.add("a"), text.add("<end>", hidden=True)] == ["a", ""]
    assert text.stopped
    assert text.whole() == "a"


def test_a_stop_string_may_span_hidden_and_shown_pieces():
    text = OutputText(("b<x>c",), keep_stop_text=False)
    shown = [text.add("ab"), text.add("<x>", hidden=True), text.add("c")]
    assert shown == ["a", "", ""]
    assert text.stopped


def test_a_hidden_piece_that_stops_nothing_leaves_the_text_alone():
    text = OutputText(("b<x>d",), keep_stop_text=False)
    shown = [text.add("ab"), text.add("<x>", hidden=True), text.add("c"), text.close()]
    assert "".join(shown) == "abc"


def test_a_search_does_not_match_old_text_again():
    assert StopStrings(("ab",)).find("abc", 2) is None
    assert StopStrings(("ab",)).find("xab", 2) == (1, 3)


LETTERS = st.text("ab<", max_size=6)


@given(st.lists(st.tuples(LETTERS, st.booleans()), max_size=8), st.lists(LETTERS, max_size=3), st.booleans())
def test_the_text_does_not_depend_on_where_the_pieces_end(pieces, stops, keep):
    text = OutputText(tuple(stops), keep_stop_text=keep)
    shown = [text.add(piece, hidden=hidden) for piece, hidden in pieces]
    shown.append(text.close())
    characters = [(character, hidden) for piece, hidden in pieces for character in piece]
    whole = "".join(character for character, _ in characters)
    ends = [
        (start + len(stop), start)
        for stop in stops
        if stop
        for start in range(len(whole))
        if whole.startswith(stop, start)
    ]
    cut = len(whole) if not ends else min(ends)[0] if keep else min(ends)[1]
    expected = "".join(character for character, hidden in characters[:cut] if not hidden)
    assert "".join(shown) == expected
    assert text.whole() == expected
    assert text.stopped == bool(ends)
