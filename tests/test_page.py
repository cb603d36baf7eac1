"""The page at / in a headless Chromium: it streams, colours, measures and asks nobody but its server."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from browsing import Visit, chromium
from conftest import MakePackage
from melt_runtime import Package, Runtime
from serving import Server, eventually

CHECKPOINT = Path(__file__).parent.parent / "examples" / "addition-melt"
PROBLEM = "4829173+3917458="
Open = Callable[..., Visit]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def package(browser: Any, make_package: MakePackage) -> Path:
    """The addition model; ``browser`` first, so that nothing is exported where there is none."""
    return make_package(CHECKPOINT, max_batch=32)


@pytest.fixture(scope="module")
def adding(package: Path) -> Iterator[Server]:
    """A server of the addition model, two at once."""
    with Server(package, "--slots", 2, "--name", "addition") as server:
        yield server


@pytest.fixture
def visit(browser: Any) -> Iterator[Open]:
    """A function of a URL and Playwright's options -> a page, closed at the end."""
    opened: list[Visit] = []

    def visit(url: str, **options: Any) -> Visit:
        opened.append(Visit(browser, url, **options))
        return opened[-1]

    yield visit
    for one in opened:
        one.close()


@pytest.fixture
def page(visit: Open, adding: Server) -> Visit:
    """The addition model's page, ready."""
    page = visit(adding.url)
    page.until("#name", "addition")
    return page


def counted(page: Visit, slots: int = 2) -> str:
    """What the gauge says of the memory."""
    page.page.locator("#moved", has_text="moved by").wait_for()
    assert page.text("#bytes").endswith(f" for {slots} slots")
    return page.text("#bytes")


def test_it_answers_what_is_typed_as_the_runtime_does(page: Visit, package: Path) -> None:
    answer = page.answer(PROBLEM)
    expected = Runtime.load(package).generate(PROBLEM)
    assert answer.text_content() == expected.text == "8746631"
    assert page.text("p.user") == PROBLEM
    assert "8 tokens, 4.00 loops each" in page.page.locator("p.note").last.text_content()
    assert not page.complaints


def test_it_shows_the_packages_example_prompt(page: Visit) -> None:
    assert page.page.locator("#text").get_attribute("placeholder") == f"For example: {PROBLEM}"


def test_each_token_has_the_colour_of_its_loops(page: Visit, package: Path) -> None:
    page.dial("Exit threshold", "ArrowLeft")
    assert page.text("#exit-shown") == "0.99"
    tokens = page.tokens(page.answer(PROBLEM))
    expected = Runtime.load(package).generate(PROBLEM, exit_threshold=0.99)
    depth = expected.depth[expected.prompt_tokens - 1 :]
    assert [text for text, _ in tokens] == list(expected.text)
    assert [title for _, title in tokens] == [f"{d} loop{'s' * (d > 1)}" for d in depth[: len(tokens)]]
    assert len(set(depth[: len(tokens)])) > 1
    colours = page.page.locator(".token").evaluate_all("all => all.map(one => getComputedStyle(one).backgroundColor)")
    assert len(set(zip(tokens, colours, strict=True))) == len(set(tokens))
    assert len(set(colours)) == len({title for _, title in tokens})


def test_moving_the_loops_changes_the_answer_and_moves_no_byte_of_state(page: Visit, package: Path) -> None:
    before = counted(page)
    page.answer(PROBLEM)
    page.dial("Loops", "ArrowLeft", 3)
    assert page.text("#loops-shown") == "1"
    shallow = page.answer(PROBLEM)
    assert {title for _, title in page.tokens(shallow)} == {"1 loop"}
    assert shallow.text_content() == Runtime.load(package).generate(PROBLEM, loops=1).text != "8746631"
    page.until("#moved", "moved by 0 bytes at 1 to 4 loops")
    assert counted(page) == before


def test_an_answer_is_seen_while_it_comes_and_stop_frees_its_slot(visit: Open, server: Server) -> None:
    page = visit(server.url)
    answer = page.ask("hello")
    page.some(5)
    assert answer.get_attribute("aria-busy") == "true"
    assert server.metrics()["melt_requests_running"] == 1
    page.page.get_by_role("button", name="Stop").click()
    page.page.get_by_text("stopped").wait_for()
    assert answer.get_attribute("aria-busy") == "false"
    eventually(lambda: server.metrics()["melt_requests_running"] == 0)
    assert not page.complaints


def test_a_chat_goes_on_with_what_was_said_until_a_new_one_begins(visit: Open, server: Server) -> None:
    page = visit(server.url)
    asked: list[Any] = []
    page.page.on("request", lambda one: asked.append(one.post_data_json) if one.post_data else None)
    for text in ("one", "two"):
        page.ask(text)
        page.some(5)
        page.page.get_by_role("button", name="Stop").click()
        page.page.get_by_role("button", name="Send").wait_for()
    page.page.get_by_role("button", name="New chat").click()
    assert page.page.locator(".user, .assistant").count() == 0
    page.ask("three")
    page.page.get_by_role("button", name="Stop").click()
    roles = [[message["role"] for message in one["messages"]] for one in asked]
    assert roles == [["user"], ["user", "assistant", "user"], ["user"]]


def test_it_asks_no_other_origin_and_could_not(page: Visit, adding: Server, server: Server) -> None:
    page.answer(PROBLEM)
    page.dial("Loops", "ArrowLeft")
    assert {re.sub(r"^(\w+://[^/]+).*", r"\1", url) for url in page.requests if not url.startswith("data:")} == {
        adding.url
    }
    assert not page.complaints
    assert page.page.evaluate("url => fetch(url).then(() => 'told', () => 'refused')", adding.url + "/health") == "told"
    assert (
        page.page.evaluate("url => fetch(url).then(() => 'told', () => 'refused')", server.url + "/health") == "refused"
    )
    assert "Content Security Policy" in page.complaints[0]


def test_html_in_questions_and_answers_stays_text(page: Visit) -> None:
    html = "<img src=x onerror=\"document.title='taken'\"><b>bold</b>"
    reply = '{"choices": [{"text": %s, "depth": [2], "finish_reason": "stop"}]}'
    body = f"data: {reply % json.dumps(html)}\n\ndata: [DONE]\n\n"
    page.page.route("**/v1/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    answer = page.answer(html)
    assert answer.text_content() == page.text("p.user") == html
    assert page.page.locator("main :is(img, b)").count() == 0
    assert page.page.title() == "addition"


def test_what_the_server_refuses_is_shown_and_the_text_comes_back(page: Visit) -> None:
    page.page.get_by_label("Message").fill("1" * 400)
    page.page.get_by_label("Message").press("Enter")
    page.page.get_by_role("alert").filter(has_text="400 tokens do not fit").wait_for()
    assert page.page.get_by_label("Message").input_value() == "1" * 400
    assert page.page.locator(".assistant").count() == 0


def test_a_stream_that_is_cut_or_fails_says_so_and_keeps_what_came(page: Visit) -> None:
    part = 'data: {"choices": [{"text": "12", "depth": [2], "finish_reason": null}]}\n\n'
    failure = 'data: {"error": {"message": "the backend failed"}}\n\n'
    bodies = [part, part + failure]
    page.page.route("**/v1/completions", lambda route: route.fulfill(body=bodies.pop(0)))
    for said in ("The connection ended before the answer did.", "the backend failed"):
        answer = page.answer("x")
        assert page.page.get_by_role("alert").last.text_content() == said
        assert answer.text_content() == "12"


def test_a_server_that_is_gone_is_said_to_be(visit: Open, package: Path) -> None:
    with Server(package, "--name", "addition", "--slots", 2) as server:
        page = visit(server.url)
        page.until("#name", "addition")
        server.process.kill()
        server.end()
        page.ask(PROBLEM)
        page.page.get_by_role("alert").filter(has_text="The server does not answer.").wait_for()
        assert page.page.get_by_label("Message").input_value() == PROBLEM
        page.until("#moved", "The server does not answer.")


def test_it_asks_for_an_api_key_until_one_is_right_and_remembers_it(visit: Open, package: Path) -> None:
    with Server(package, "--name", "addition", "--slots", 2, MELT_API_KEYS="sesame") as server:
        page = visit(server.url)
        field = page.page.get_by_label("This server asks for an API key.")
        field.fill("wrong")
        field.press("Enter")
        page.page.get_by_text("The last one was refused.").wait_for()
        field.fill("sesame")
        page.page.get_by_role("button", name="Use it").click()
        page.until("#name", "addition")
        assert page.answer(PROBLEM).text_content() == "8746631"
        counted(page)
        page.page.reload()
        page.until("#name", "addition")
        assert not field.is_visible()


def test_without_the_key_it_says_what_is_missing_and_asks_again_later(visit: Open, package: Path) -> None:
    with Server(package, "--name", "addition", "--slots", 2, MELT_API_KEYS="sesame") as server:
        page = visit(server.url)
        page.page.get_by_role("button", name="Cancel").click()
        page.page.get_by_role("alert").filter(has_text="asks for an API key, and none was given").wait_for()
        page.page.get_by_label("Message").fill(PROBLEM)
        page.page.get_by_label("Message").press("Enter")
        page.page.get_by_label("This server asks for an API key.").fill("sesame")
        page.page.get_by_role("button", name="Use it").click()
        page.page.locator(".assistant[aria-busy=false]").wait_for()
        assert page.text(".assistant") == "8746631"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read_in_light_and_dark(visit: Open, adding: Server, scheme: str) -> None:
    page = visit(adding.url, color_scheme=scheme)
    page.until("#name", "addition")
    page.dial("Exit threshold", "ArrowLeft")
    page.answer(PROBLEM)
    page.answer("1" * 400)
    ratios = page.page.evaluate(CONTRAST)
    assert {
        ".token",
        "p.note",
        "p.user",
        "p.error",
        "#moved",
        "#send",
        "label",
        "#scale b",
        "h2",
        ".small",
    } <= ratios.keys()
    assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}


def test_on_a_phone_everything_fits_without_scrolling_sideways(visit: Open, adding: Server) -> None:
    page = visit(adding.url, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    page.until("#name", "addition")
    page.answer(PROBLEM)
    assert page.page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.page.locator("header").bounding_box()["height"] < 0.15 * 640
    for name in ("Send", "New chat", "Chats and settings"):
        box = page.page.get_by_role("button", name=name).bounding_box()
        assert box["height"] >= 36
        assert box["y"] + box["height"] <= 640
    assert page.page.locator("#talk").bounding_box()["height"] >= 360
    assert not page.page.get_by_role("slider", name="Loops").is_visible()
    page.page.get_by_role("button", name="Chats and settings").click()
    page.dial("Loops", "ArrowLeft")
    assert page.text("#loops-shown") == "3"
    page.page.keyboard.press("Escape")
    page.page.get_by_role("slider", name="Loops").wait_for(state="hidden")


def test_the_picture_in_the_docs_shows_the_page(visit: Open, adding: Server, tmp_path: Path) -> None:
    page = visit(adding.url, viewport={"width": 1120, "height": 790}, device_scale_factor=2)
    page.until("#name", "addition")
    page.answer(PROBLEM)
    page.dial("Exit threshold", "ArrowLeft")
    page.answer(PROBLEM)
    page.dial("Loops", "ArrowLeft", 3)
    page.answer(PROBLEM)
    page.until("#moved", "moved by 0 bytes at 1 to 4 loops")
    path = Path(os.environ.get("MELT_SCREENSHOT", tmp_path / "page.png"))
    page.page.screenshot(path=path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert path.stat().st_size > 20_000


# The least contrast of text against what lies under it, by WCAG, for each kind of text on the page.
CONTRAST = """() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const light = (...layers) => {
    for (const layer of layers) { context.fillStyle = layer; context.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const under = (element) => {
    const layers = [];
    for (let one = element; one; one = one.parentElement) layers.unshift(getComputedStyle(one).backgroundColor);
    return layers;
  };
  const ratio = (element) => {
    const layers = under(element);
    const [low, high] = [light(...layers), light(...layers, getComputedStyle(element).color)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const found = {};
  for (const name of ["h1", "label", "output", "#moved", "#bytes", "#scale", "#scale b", "#send", "#new", "h2",
    ".small", "#memory-words", "textarea", "p.user", ".assistant", "p.note", "p.error", ".token"]) {
    const ratios = [...document.querySelectorAll(name)].map(ratio);
    if (ratios.length) found[name] = Math.min(...ratios);
  }
  return found;
}"""


def test_auto_moves_the_loops_to_what_it_was_calibrated_with_and_back(
    visit: Open, package: Path, tmp_path: Path
) -> None:
    copy = Path(copytree(package, tmp_path / "package"))
    manifest = Package.open(copy).manifest
    found = {"criteria": "entropy:0.3", "quality": "1pt", "text": "sums", "tokens": 9, "loss": 0.5, "loops": 1.9}
    (copy / "manifest.json").write_text(manifest.with_exit({**found, "full_loops": 4, "most_loops": 2}).to_json())
    with Server(copy, "--slots", 1, "--name", "addition") as server:
        page = visit(server.url)
        page.until("#name", "addition")
        page.page.locator("#by").select_option(label="auto: entropy:0.3, 2 loops at most")
        assert page.text("#loops-shown") == "2"
        answer = page.answer(PROBLEM)
        assert answer.text_content() == Runtime.load(copy).generate(PROBLEM, exit="auto").text
        assert {title for _, title in page.tokens(answer)} <= {"1 loop", "2 loops"}
        page.page.locator("#by").select_option("gate")
        assert page.text("#loops-shown") == "4"
        assert not page.complaints


def test_tokens_leave_by_the_criterion_that_is_chosen(page: Visit, package: Path) -> None:
    page.page.locator("#by").select_option("entropy")
    page.page.locator("#exit").fill("0.7")
    answer = page.answer(PROBLEM)
    expected = Runtime.load(package).generate(PROBLEM, exit="entropy:0.30")
    assert answer.text_content() == expected.text
    tokens = [token.get_attribute("title") for token in answer.locator(".token").all()]
    said = expected.depth[expected.prompt_tokens - 1 :]
    assert [int(str(title).split()[0]) for title in tokens][: len(said)] == list(said[: len(tokens)])
    assert min(said) < 4
    assert not page.complaints
