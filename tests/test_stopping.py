"""Stop strings: found wherever the text is cut, and never shown."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from melt_runtime.errors import ArgumentError
from melt_runtime.text.stop_strings import StopMatcher, stop_strings

small = st.text("ab", max_size=12)
stops = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)


def run(stop: list[str], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stop)
    shown = "".join(matcher.push(piece)[0] for piece in pieces)
    return shown + matcher.flush(), matcher.found


def expected(stop: list[str], text: str) -> str:
    return text[: min((text.find(s) for s in stop if s in text), default=len(text))]


@pytest.mark.parametrize(
    ("value", "strings"),
    [(None, ()), ("END", ("END",)), (["a", "b"], ("a", "b")), (("a",), ("a",)), ([], ())],
)
def test_stop_strings_become_a_tuple(value: Any, strings: tuple[str, ...]) -> None:
    assert stop_strings(value) == strings


@pytest.mark.parametrize("value", ["", [""], ["a", ""]])
def test_an_empty_stop_string_is_refused(value: Any) -> None:
    with pytest.raises(ArgumentError, match="empty"):
        stop_strings(value)
    with pytest.raises(ArgumentError, match="empty"):
        StopMatcher(value)


def test_a_stop_string_that_is_not_text_is_refused() -> None:
    with pytest.raises(ArgumentError, match="3"):
        stop_strings(["a", 3])  # type: ignore[list-item]


def test_a_stop_string_is_found_at_every_possible_cut() -> None:
    text = "one two<|end|>three"
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            pieces = [text[:first], text[first:second], text[second:]]
            assert run(["<|end|>"], pieces) == ("one two", "<|end|>")


def test_nothing_of_a_stop_string_is_shown_before_it_is_complete() -> None:
    matcher = StopMatcher(["###"])
    assert matcher.push("a#") == ("a", None)
    assert matcher.push("#") == ("", None)
    assert matcher.push("#b") == ("", "###")


def test_text_held_back_is_shown_once_it_cannot_become_a_stop_string() -> None:
    matcher = StopMatcher(["###"])
    assert matcher.push("##") == ("", None)
    assert matcher.push("x") == ("##x", None)


def test_flush_gives_the_text_still_held_back() -> None:
    matcher = StopMatcher(["###"])
    assert matcher.push("a##") == ("a", None)
    assert matcher.flush() == "##"
    assert matcher.found is None
    assert matcher.flush() == ""


def test_pushes_after_the_stop_string_show_nothing() -> None:
    matcher = StopMatcher(["."])
    assert matcher.push("a.b") == ("a", ".")
    assert matcher.push("c") == ("", ".")
    assert matcher.flush() == ""


def test_the_match_that_begins_first_wins() -> None:
    assert StopMatcher(["cd", "bcde"]).push("abcdef") == ("a", "bcde")


def test_of_matches_that_begin_together_the_longest_wins() -> None:
    assert StopMatcher(["b", "bc"]).push("abcd") == ("a", "bc")


def test_a_complete_match_does_not_wait_for_a_longer_one_that_begins_with_it() -> None:
    assert StopMatcher(["\n", "\n\n"]).push("a\n") == ("a", "\n")


def test_a_match_waits_while_one_that_begins_earlier_is_possible() -> None:
    matcher = StopMatcher(["bc", "abcd"])
    assert matcher.push("xabc") == ("x", None)
    assert matcher.push("d") == ("", "abcd")


def test_a_waiting_match_counts_once_the_earlier_one_is_impossible() -> None:
    matcher = StopMatcher(["bc", "abcd"])
    assert matcher.push("xabc") == ("x", None)
    assert matcher.push("e") == ("a", "bc")


def test_a_waiting_match_counts_at_the_end_of_the_text() -> None:
    matcher = StopMatcher(["bc", "abcd"])
    assert matcher.push("xabc") == ("x", None)
    assert matcher.flush() == "a"
    assert matcher.found == "bc"


def test_without_stop_strings_all_text_passes_at_once() -> None:
    assert StopMatcher([]).push("anything") == ("anything", None)


@given(stops, st.lists(small, max_size=8))
def test_the_text_shown_never_depends_on_the_cuts(stop: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    shown, found = run(stop, pieces)
    assert shown == expected(stop, text)
    assert (found is None) == (shown == text and not any(s in text for s in stop))


@given(stops, small)
def test_the_stop_string_named_stands_where_the_text_ends(stop: list[str], text: str) -> None:
    for pieces in ([text], list(text)):
        shown, found = run(stop, pieces)
        assert found is None or text.startswith(found, len(shown))


@given(stops, st.lists(small, max_size=8))
def test_less_than_a_stop_string_is_ever_held_back(stop: list[str], pieces: list[str]) -> None:
    matcher = StopMatcher(stop)
    shown = pushed = 0
    for piece in pieces:
        text, found = matcher.push(piece)
        if found is not None:
            return
        shown, pushed = shown + len(text), pushed + len(piece)
        assert pushed - shown <= max(map(len, stop), default=1) - 1


def test_too_many_stop_strings_are_refused() -> None:
    assert len(stop_strings([str(i) for i in range(256)])) == 256
    with pytest.raises(ArgumentError, match="There are 95,000 stop strings; at most 256"):
        stop_strings([str(i) for i in range(95_000)])


def test_stop_strings_that_are_too_long_together_are_refused() -> None:
    assert stop_strings("x" * 8192)
    for value in ("x" * 8193, ["x" * 4096, "y" * 4097]):
        with pytest.raises(ArgumentError, match="8,193 characters together; at most 8,192"):
            StopMatcher(stop_strings(value))


@pytest.mark.parametrize("value", [b"ab", {"a": 1}, len, 3])
def test_stop_strings_that_are_no_texts_are_named(value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"stop must be text or a list of texts, not {type(value).__name__}"):
        stop_strings(value)


def test_a_character_costs_one_step_however_many_stop_strings_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    matcher = StopMatcher(["a" * length + "b" for length in range(1, 100)])
    steps = 0
    step = type(matcher._automaton).step

    def counted(automaton: Any, state: int, symbol: Any) -> int:
        nonlocal steps
        steps += 1
        return step(automaton, state, symbol)

    monkeypatch.setattr(type(matcher._automaton), "step", counted)
    for _ in range(1000):
        matcher.push("a")
    assert steps == 1000
    assert matcher.push("b") == ("", "a" * 99 + "b")


SPECIAL = {"<|end|>": 7, "<|end|>!": 8, "<s>": 9}


def test_a_stop_string_that_names_a_special_token_ends_the_text_there() -> None:
    matcher = StopMatcher(["<|end|>"], SPECIAL)
    assert matcher.push("ab") == ("ab", None)
    assert matcher.push_special(9) == ("", None)
    assert matcher.push("c") == ("c", None)
    assert matcher.push_special(7) == ("", "")
    assert matcher.push("d") == ("", "")


def test_a_special_token_may_be_part_of_a_stop_string() -> None:
    matcher = StopMatcher(["x<|end|>\n"], SPECIAL)
    assert matcher.push("ax") == ("a", None)
    assert matcher.push_special(7) == ("", None)
    assert matcher.push("b") == ("xb", None)
    assert matcher.push("x") == ("", None)
    assert matcher.push_special(7) == ("", None)
    assert matcher.push("\nc") == ("", "x\n")


def test_a_special_token_spelled_in_plain_characters_stops_too() -> None:
    assert StopMatcher(["<|end|>"], SPECIAL).push("a<|end|>b") == ("a", "<|end|>")


def test_the_longest_special_token_is_meant() -> None:
    assert StopMatcher(["<|end|>!"], SPECIAL).special == {8}


def test_special_tokens_that_no_stop_string_names_do_not_part_the_text() -> None:
    matcher = StopMatcher(["ab", "<s>"], SPECIAL)
    assert matcher.push("a") == ("", None)
    assert matcher.push_special(7) == ("", None)
    assert matcher.push("b") == ("", "ab")
