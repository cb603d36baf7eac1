"""The page's chats in a headless Chromium: Markdown, editing, asking again, and what the browser keeps."""

from __future__ import annotations

import json
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import test_page
from browsing import Visit
from conftest import MakeCheckpoint, MakePackage
from serving import Server
from test_page import PROBLEM, Open

adding, browser, package, page, visit = (
    getattr(test_page, name) for name in ("adding", "browser", "package", "page", "visit")
)

MARKDOWN = """# Title
Some **bold**, *slanted* and ~~old~~ words, `a * b * c` and snake_case_name, 2 * 3 * 4.

1. one
   - inner
2. two

> said

```python
def f(a):
    return "**a**"
```

| a | b |
|---|---|
| 1 | [site](https://example.org/x_(y)) |

https://example.org/a_b_c. End"""


@pytest.fixture
def chatting(visit: Open, server: Server) -> Visit:
    """The page of a chat model, ready."""
    page = visit(server.url)
    page.until("#name", "tiny")
    return page


def replies(page: Visit, *texts: str, size: int = 7) -> list[dict[str, Any]]:
    """Let the server's chats answer with these texts in turn, in pieces of some characters. Returns what is asked."""
    asked: list[dict[str, Any]] = []
    left = list(texts)

    def reply(route: Any) -> None:
        asked.append(route.request.post_data_json)
        text = left.pop(0)
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        events = [
            {"choices": [{"delta": {"content": one}, "depth": [1 + n % 4], "finish_reason": None}]}
            for n, one in enumerate(pieces)
        ]
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        route.fulfill(content_type="text/event-stream", body="".join([*lines, "data: [DONE]\n\n"]))

    page.page.route("**/v1/chat/completions", reply)
    return asked


def test_reasoning_is_shown_apart_from_the_answer(chatting: Visit) -> None:
    deltas = [{"reasoning_content": "let me <b>see</b>"}, {"content": "42"}]
    lines = [{"choices": [{"delta": delta, "depth": [2], "finish_reason": None}]} for delta in deltas]
    body = "".join(f"data: {json.dumps(line)}\n\n" for line in lines) + "data: [DONE]\n\n"
    chatting.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body))
    assert chatting.answer("x").text_content() == "42"
    assert chatting.text("main details p") == "let me <b>see</b>"
    chatting.page.reload()
    chatting.page.locator("main details").wait_for()
    assert chatting.text("main details p") == "let me <b>see</b>"


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_markdown_is_shown_as_what_it_means_however_it_is_cut_into_tokens(chatting: Visit, size: int) -> None:
    replies(chatting, MARKDOWN, size=size)
    answer = chatting.answer("x")

    def texts(selector: str) -> list[str]:
        return answer.locator(selector).all_text_contents()

    assert texts("h2") == ["Title"]
    assert (texts("strong"), texts("em"), texts("del")) == (["bold"], ["slanted"], ["old"])
    assert texts("p code") == ["a * b * c"]
    assert "snake_case_name, 2 * 3 * 4." in texts("p")[0]
    assert texts("ol > li > ul > li") == ["inner"]
    assert answer.locator("ol > li").count() == 2
    assert texts("blockquote") == ["said"]
    assert texts("pre code") == ['def f(a):\n    return "**a**"']
    assert (texts("th"), texts("td")) == (["a", "b"], ["1", "site"])
    links = answer.locator("a").evaluate_all("all => all.map(one => one.href)")
    assert links == ["https://example.org/x_(y)", "https://example.org/a_b_c"]
    assert not chatting.complaints


HOSTILE = """<script>document.title = 'taken'</script><img src=x onerror="document.title='taken'">
[a](javascript:document.title='taken') [b](data:text/html,x) ![c](https://example.org/x.png) [d](//example.org)
[e](" onmouseover="document.title='taken') <a href="javascript:1">f</a> [g](JaVaScRiPt:1) [h](java&#115;cript:1)
```"><img src=x onerror="document.title='taken'">
<iframe src="https://example.org"></iframe>
```
| <img src=x> | <svg onload=alert(1)> |
|---|---|
| `<b>` | [<i>](https://example.org/"onclick="alert(1)) |
"""


def test_nothing_that_a_model_says_becomes_html_or_loads_anything(chatting: Visit) -> None:
    deep = ">" * 5000 + " x\n\n" + "".join(" " * n + "- y\n" for n in range(300)) + "*_" * 3000 + "[" * 5000 + "`" * 999
    replies(chatting, HOSTILE, deep, HOSTILE + deep, size=100)
    requests = len(chatting.requests)
    for text in (HOSTILE.replace("\n", " "), "deep", "both"):
        chatting.answer(text)
    assert chatting.page.locator("main :is(img, script, iframe, svg, b, i)").count() == 0
    attributes = chatting.page.evaluate(
        "() => [...new Set([...document.querySelectorAll('main *')].flatMap(one => one.getAttributeNames()))]"
    )
    allowed = {"class", "style", "title", "href", "target", "rel", "start", "tabindex", "type", "aria-busy", "role"}
    assert set(attributes) <= allowed
    links = chatting.page.locator("main a").evaluate_all("all => all.map(one => [one.protocol, one.rel])")
    assert {tuple(one) for one in links} == {("https:", "noopener noreferrer nofollow")}
    assert chatting.page.title() == "tiny"
    asked = {url.rpartition("/v1/")[2] for url in chatting.requests[requests:]}
    assert asked <= {"chat/completions", "state"}
    assert not chatting.complaints


def test_a_question_is_edited_and_an_answer_regenerated_in_its_place(chatting: Visit) -> None:
    asked = replies(chatting, "first", "second", "third", "fourth")
    button = chatting.page.get_by_role("button", name="Regenerate")
    chatting.answer("one")
    chatting.answer("two")
    button.last.click()
    chatting.page.get_by_text("third").wait_for()
    chatting.page.locator(".asked").first.hover()
    chatting.page.get_by_role("button", name="Edit").first.click()
    chatting.page.get_by_label("Edited question").fill("uno")
    chatting.page.get_by_label("Edited question").press("Enter")
    chatting.page.get_by_text("fourth").wait_for()
    said = [[message["content"] for message in one["messages"]] for one in asked]
    assert said == [["one"], ["one", "first", "two"], ["one", "first", "two"], ["uno"]]
    assert chatting.page.locator(".user, .assistant").all_text_contents() == ["uno", "fourth"]


def test_a_regenerated_answer_that_fails_leaves_the_old_one(chatting: Visit) -> None:
    replies(chatting, "the old one")
    chatting.answer("one")
    chatting.page.route("**/v1/chat/completions", lambda route: route.abort())
    chatting.page.get_by_role("button", name="Regenerate").click()
    chatting.page.get_by_role("alert").filter(has_text="does not answer").wait_for()
    assert chatting.page.locator(".user, .assistant").all_text_contents() == ["one", "the old one"]


def test_the_system_prompt_and_the_most_tokens_go_with_each_question(chatting: Visit) -> None:
    asked = replies(chatting, "a", "b")
    chatting.page.get_by_label("System prompt").fill("be brief")
    chatting.page.get_by_label("Max tokens").fill("7")
    chatting.answer("one")
    chatting.page.get_by_label("Max tokens").fill("")
    chatting.answer("two")
    assert [one.get("max_tokens") for one in asked] == [7, None]
    assert [one["messages"][0] for one in asked] == 2 * [{"role": "system", "content": "be brief"}]


def test_what_is_copied_is_the_answers_own_text(chatting: Visit) -> None:
    chatting.context.grant_permissions(["clipboard-read", "clipboard-write"])
    replies(chatting, MARKDOWN)
    answer = chatting.answer("x")
    chatting.page.get_by_role("button", name="Copy", exact=True).last.click()
    chatting.page.get_by_role("button", name="Copied").wait_for()
    assert chatting.page.evaluate("navigator.clipboard.readText()") == MARKDOWN
    answer.get_by_role("button", name="Copy code").click()
    answer.get_by_role("button", name="Copied").wait_for()
    assert chatting.page.evaluate("navigator.clipboard.readText()") == 'def f(a):\n    return "**a**"'


def test_chats_are_kept_in_the_browser_opened_again_and_deleted(chatting: Visit) -> None:
    replies(chatting, "alpha", "beta", "gamma")
    chatting.page.get_by_label("System prompt").fill("be brief")
    chatting.answer("first chat")
    chatting.page.get_by_role("button", name="New chat").click()
    chatting.answer("second chat")
    chatting.page.reload()
    chatting.page.locator("#chats").get_by_role("button", name="first chat", exact=True).click()
    chatting.answer("more")
    shown = chatting.page.locator(".user, .assistant").all_text_contents()
    assert shown == ["first chat", "alpha", "more", "gamma"]
    assert chatting.page.get_by_label("System prompt").input_value() == "be brief"
    assert chatting.page.locator(".token").first.get_attribute("title") == "1 loop"
    chatting.page.get_by_role("button", name="Delete chat: first chat").click()
    assert chatting.page.locator("#chats li").count() == 1
    chatting.page.on("dialog", lambda dialog: dialog.accept())
    chatting.page.get_by_role("button", name="Delete all").click()
    chatting.page.get_by_text("Chats are kept in this browser only.").wait_for()
    assert chatting.page.evaluate("localStorage.getItem('melt-chats')") == "[]"


def test_a_chat_that_goes_on_in_two_tabs_loses_no_answer(chatting: Visit, server: Server) -> None:
    other = copy(chatting)
    asked = replies(chatting, "alpha", "gamma")
    chatting.answer("one")
    other.page = chatting.context.new_page()
    other.page.goto(server.url)
    other.until("#name", "tiny")
    replies(other, "beta", "delta")
    other.answer("two")
    chatting.page.get_by_text("beta").wait_for()
    chatting.answer("three")
    assert [one["content"] for one in asked[-1]["messages"]] == ["one", "alpha", "two", "beta", "three"]
    other.page.get_by_text("gamma").wait_for()

    held: list[Any] = []
    chatting.page.route("**/v1/chat/completions", lambda route: held.append(route))
    chatting.ask("four")
    other.answer("five")
    event = {"choices": [{"delta": {"content": "epsilon"}, "depth": [1], "finish_reason": None}]}
    held[0].fulfill(content_type="text/event-stream", body=f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n")
    chatting.until("#send", "Send")
    kept = chatting.page.evaluate("keptChats().map(one => one.turns.map(turn => turn.content))")
    before = ["one", "alpha", "two", "beta", "three", "gamma"]
    assert kept == [[*before, "four", "epsilon"], [*before, "five", "delta"]]


def test_the_browser_keeps_no_more_than_fits_and_survives_what_it_cannot_read(chatting: Visit) -> None:
    replies(chatting, "answer", "another")
    chatting.page.evaluate(
        """() => { for (let n = 0; n < 60; n++) {
            const turns = [{ role: "user", content: "x".repeat(n < 59 ? 9 : 9e5) }];
            keepChat({ ...freshChat(), title: "chat " + n, turns });
        } }"""
    )
    chatting.answer("newest")
    assert chatting.page.evaluate("keptChats().length") == 50
    assert chatting.page.evaluate("keptChats()[0].title") == "newest"
    said = {"role": "assistant", "content": "a", "note": "", "thinking": ""}
    opening = {"id": "x", "model": "", "title": "", "system": "", "changed": 1}
    torn = [[said | {"pieces": []}], [{"role": "user", "content": "q"}, said | {"pieces": [[1e15, 1]]}]]
    chats = json.dumps([opening | {"turns": turns} for turns in torn])
    for broken in ("{", '{"a": 1}', '[null, 3, {"id": "x"}, {"turns": [{}]}]', chats):
        chatting.page.evaluate("text => localStorage.setItem('melt-chats', text)", broken)
        chatting.page.reload()
        chatting.until("#name", "tiny")
        assert chatting.page.locator("#chats li").count() == 0
    assert not chatting.complaints


def test_a_browser_that_keeps_nothing_says_so(visit: Open, server: Server) -> None:
    page = visit(server.url)
    page.until("#name", "tiny")
    replies(page, "answer")
    page.page.evaluate("() => { Storage.prototype.setItem = () => { throw new Error('full'); }; }")
    page.answer("x")
    page.page.get_by_text("does not keep this chat").wait_for()
    assert page.text(".assistant") == "answer"


def test_an_idle_page_asks_nothing(visit: Open, adding: Server) -> None:
    page = visit("about:blank")
    page.page.clock.install()
    page.page.goto(adding.url)
    page.until("#name", "addition")
    page.answer(PROBLEM)
    page.page.locator("#moved", has_text="moved by").wait_for()
    page.page.wait_for_load_state("networkidle")
    before = len(page.requests)
    page.page.clock.fast_forward(600_000)
    page.page.wait_for_load_state("networkidle")
    assert len(page.requests) == before


def test_the_memory_is_explained_in_the_packages_own_bytes(page: Visit, package: Path) -> None:
    words = page.text("#memory-words")
    assert "57.3 kB of state at 1 loop per token and 57.3 kB at 4" in words
    assert "With a cache per loop it would take 180.2 kB." in words
    assert page.page.locator("#bars dd").count() == 3


def test_a_model_that_does_not_loop_has_neither_tint_nor_sliders_of_depth(
    visit: Open, make_checkpoint: MakeCheckpoint, make_package: MakePackage
) -> None:
    flat = make_package(make_checkpoint(tokenizer=True, total_ut_steps=1))
    with Server(flat) as server:
        page = visit(server.url)
        page.until("#name", "tiny")
        assert not page.page.get_by_label("Loops", exact=True).is_visible()
        assert not page.page.get_by_label("Exit threshold").is_visible()
        page.page.get_by_label("Max tokens").fill("5")
        assert page.answer("hello").text_content()
        assert page.page.locator(".token, #scale b").count() == 0
        assert "loops each" not in page.text("main p.note")
        assert "does not loop" in page.text("#memory-words")
