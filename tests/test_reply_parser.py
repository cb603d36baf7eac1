"""Replies taken apart: reasoning, text and calls, the same however the text arrives."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from melt_runtime.server.reply_parser import Reading, ReplyParser, reasoning_tokens
from melt_runtime.server.tool_formats import FORMATS, HERMES, JSON_LIST, ToolFormat

BY_NAME = {one.name: one for one in (*FORMATS, JSON_LIST)}
NAMES = {"get_weather", "add", "os.list"}
Parts = list[tuple[str, str]]  # kind, and text; a call is "call NUMBER NAME"


def parts(format: ToolFormat, text: str, thinking: bool | None, cuts: list[int]) -> Parts:
    parser = ReplyParser(Reading(format, NAMES, thinking))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    said = [one for piece in pieces for one in parser.feed(piece)] + parser.finish()
    found: Parts = []
    for one in said:
        kind = f"{one.kind} {one.call}" if one.kind in ("call", "arguments") else one.kind
        if found and found[-1][0] == kind:
            found[-1] = (kind, found[-1][1] + one.text)
        else:
            found.append((kind, one.text))
    return found


def read(format: str, text: str, thinking: bool | None = None) -> Parts:
    """Return a reply's parts, which must not depend on how it arrives."""
    whole = parts(BY_NAME[format], text, thinking, [])
    assert parts(BY_NAME[format], text, thinking, list(range(1, len(text)))) == whole
    chance = random.Random(text)
    for _ in range(20):
        cuts = sorted(chance.sample(range(len(text) + 1), min(3, len(text))))
        assert parts(BY_NAME[format], text, thinking, cuts) == whole
    return whole


CALL = '{"name": "add", "arguments": {"a": 1, "b": "}\\"{"}}'
ARGUMENTS = '{"a": 1, "b": "}\\"{"}'


def call(name: str, arguments: str) -> Parts:
    return [("call 0", name), ("arguments 0", arguments)]


ONE = call("add", ARGUMENTS)
TWO: Parts = [*ONE, ("call 1", "get_weather"), ("arguments 1", "{}")]


@pytest.mark.parametrize(
    ("format", "text", "expected"),
    [
        ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", ONE),
        ("hermes", f"Let me see.\n\n<tool_call>{CALL}</tool_call>\n", [("text", "Let me see."), *ONE]),
        ("hermes", f'<tool_call>{CALL}</tool_call>\n<tool_call>{{"name":"get_weather"}}</tool_call>', TWO),
        ("hermes", f"<tool_call>{CALL}", ONE),  # the closing tag may be a token that ends the reply
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', call("add", '{"a": 1}')),
        ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}', call("add", '{"a": 1}')),
        ("hermes", '<tool_call>{"id": 5, "name": "add", "arguments": null, "x": [1]}', call("add", "{}")),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": [1, {"b', call("add", '{"a": [1, {"b')),
        ("mistral list", f"[TOOL_CALLS][{CALL}]", ONE),
        ("mistral list", f'Well[TOOL_CALLS] [{CALL},{{"name":"get_weather"}}]', [("text", "Well"), *TWO]),
        ("mistral", f"[TOOL_CALLS]add[ARGS]{ARGUMENTS}", ONE),
        ("mistral", f"[TOOL_CALLS]add[CALL_ID]a1b2c3d4e[ARGS] {ARGUMENTS}[TOOL_CALLS]get_weather[ARGS]{{}}", TWO),
        ("llama", CALL.replace("arguments", "parameters"), ONE),
        ("llama", f'\n<|python_tag|>{CALL}; {{"name": "get_weather", "parameters": {{}}}}', TWO),
        ("pythonic", '[add(a=1, b="}\\"{"), get_weather()]', TWO),
        ("pythonic", "[os.list(of=[None, 1.5], deep=True)]", call("os.list", '{"of": [null, 1.5], "deep": true}')),
        ("json list", f'[{CALL}, {{"name": "get_weather"}}]', TWO),
    ],
)  # fmt: skip
def test_calls_are_found_in_every_format(format: str, text: str, expected: Parts) -> None:
    assert read(format, text) == expected


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("hermes", "Use <tool_call> and <tool_cal or <"),
        ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call> there'),
        ("hermes", "<tool_call>add(1)</tool_call>"),
        ("hermes", "<tool_call>{} is empty"),
        ("hermes", '<tool_call>{"name": add}'),
        ("hermes", '<tool_call>{"name": "add"x'[:-3]),
        ("hermes", "<tool_call>"),
        ("hermes", " \n "),
        ("hermes", f'<tool_call>{{"{"k" * 600}": 1}}'),
        ("mistral list", "[TOOL_CALLS]add"),
        ("mistral", "[TOOL_CALLS]" + "x" * 600),
        ("mistral", "[TOOL_CALLS]sub[ARGS]{}"),
        ("llama", '{"answer": 42} is right'),
        ("llama", "  The answer is {}."),
        ("llama", '{"name": "Ann", "parameters": {}}'),
        ("pythonic", "[add(1)]"),
        ("pythonic", "[add(a=b)]"),
        ("pythonic", "[1, 2] is a list"),
        ("pythonic", "[" * 5000),
        ("pythonic", "[add(**{})]"),
    ],
)
def test_what_is_no_call_of_an_offered_function_stays_text(format: str, text: str) -> None:
    assert read(format, text) == [("text", text)]


def test_a_call_is_found_behind_a_marker_that_opens_none() -> None:
    text = f"Say <tool_call> or <tool_call>{CALL}</tool_call>"
    assert read("hermes", text) == [("text", "Say <tool_call> or"), *ONE]


@pytest.mark.parametrize(
    ("format", "text", "expected"),
    [
        ("hermes", f"<tool_call>{CALL[:-1]}</tool_call>", ONE),
        ("hermes", f"<tool_call>{CALL[:-1]}\n</tool_call> Done.", [*ONE, ("text", " Done.")]),
        ("hermes", f'<tool_call>{CALL[:-1]}</tool_call><tool_call>{{"name":"get_weather"}}</tool_call>', TWO),
        ("hermes", f'<tool_call>{CALL[:-1]}<tool_call>{{"name":"get_weather"}}</tool_call>', TWO),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1</tool_call>', call("add", '{"a": 1')),
        ("hermes", f"<tool_call>{CALL}</tool_ca", ONE),
        ("hermes", f"<tool_call>{CALL[:-1]}</tool_ca", ONE),
        ("hermes", f"<tool_call>{CALL[:-1]} oh", [*ONE, ("text", " oh")]),
        ("mistral list", f"[TOOL_CALLS][{CALL[:-1]}]", ONE),
        ("mistral list", f"[TOOL_CALLS][{CALL[:-1]}] Done.", [*ONE, ("text", " Done.")]),
        ("mistral", "[TOOL_CALLS]add[ARGS]now", [("call 0", "add"), ("text", "now")]),
        ("llama", f"{CALL[:-1]} oh", [*ONE, ("text", " oh")]),
    ],
)
def test_a_call_with_a_broken_end_is_a_call_and_leaves_no_part_of_a_tag(
    format: str, text: str, expected: Parts
) -> None:
    assert read(format, text) == expected


def test_a_call_of_no_offered_function_that_lacks_its_end_is_text_with_whole_tags() -> None:
    text = '<tool_call>{"name": "unknown", "arguments": {"a": 1</tool_call>'
    assert read("hermes", text) == [("text", text)]
    early = '<tool_call>{"arguments": {"a": 1</tool_call>'
    assert read("hermes", early) == [("text", early)]


def test_text_behind_a_broken_second_call_is_not_lost() -> None:
    assert read("llama", f"{CALL}; but why") == [*ONE, ("text", "; but why")]
    assert read("mistral list", f'[TOOL_CALLS][{CALL}, {{"name": "x"}}]') == [*ONE, ("text", ', {"name": "x"}]')]


@pytest.mark.parametrize(
    ("text", "begun", "expected"),
    [
        ("<think>\nWhy not?\n</think>\n\nYes.", False, [("reasoning", "Why not?"), ("text", "Yes.")]),
        ("Why  not?</think>Yes.", True, [("reasoning", "Why  not?"), ("text", "Yes.")]),
        ("<think></think>Yes.", False, [("text", "Yes.")]),
        ("<think>cut short </thi", False, [("reasoning", "cut short </thi")]),
        ("cut short", True, [("reasoning", "cut short")]),
        ("Yes, <think> is a tag </think>", False, [("text", "Yes, <think> is a tag </think>")]),
        ("\n <thin", False, [("text", "\n <thin")]),
        ("<think>a</think>\n", False, [("reasoning", "a")]),
        (f"<think>a</think>\n<tool_call>{CALL}</tool_call>", False, [("reasoning", "a"), *ONE]),
        (f"<think><tool_call>{CALL}</think>b", False, [("reasoning", f"<tool_call>{CALL}"), ("text", "b")]),
    ],
)  # fmt: skip
def test_reasoning_is_split_off_at_the_beginning(text: str, begun: bool, expected: Parts) -> None:
    assert read("hermes", text, begun) == expected


@pytest.mark.parametrize(
    ("texts", "begun", "count"),
    [
        (["<think>", "a", "b", "</think>", "\n", "c"], False, 4),
        (["a", "b</think>c", "d"], True, 2),
        (["a", "b"], True, 2),
        (["<think>", "a"], False, 2),
        (["a", "<think>", "b"], False, 0),
        (["<th"], False, 0),
        ([], True, 0),
        (["a"], None, None),
    ],
)
def test_tokens_of_reasoning_are_counted_with_its_tags(texts: list[str], begun: bool | None, count: int | None) -> None:
    assert reasoning_tokens(Reading(HERMES, NAMES, begun), texts) == count


def test_arguments_arrive_as_they_are_written() -> None:
    parser = ReplyParser(Reading(HERMES, NAMES, None))
    pieces = ("<tool_call>{", '"name": "add', '", ', '"arguments": {"a', '": 1}', "}")
    seen = [[(one.kind, one.text) for one in parser.feed(piece)] for piece in pieces]
    assert seen == [[], [], [("call", "add")], [("arguments", '{"a')], [("arguments", '": 1}')], []]


@given(st.text(alphabet='<tool_cal>/{}[]",:;\\ na"me1', max_size=60), st.sampled_from(sorted(BY_NAME)), st.booleans())
def test_any_text_is_read_to_its_end_however_it_arrives(text: str, format: str, thinking: bool) -> None:
    whole = parts(BY_NAME[format], text, thinking, [])
    assert parts(BY_NAME[format], text, thinking, list(range(1, len(text)))) == whole
    if "think" not in text and not any(kind.startswith("call") for kind, _ in whole) and not thinking:
        assert "".join(one for _, one in whole) == text


@given(st.dictionaries(st.text(max_size=5), st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists)))
def test_any_arguments_are_returned_as_written(arguments: dict[str, Any]) -> None:
    text = json.dumps(arguments)
    found = parts(HERMES, f'<tool_call>\n{{"name": "add", "arguments": {text}}}\n</tool_call>', None, [])
    assert found == [("call 0", "add"), ("arguments 0", text)]
