"""The server's page in a browser: it is typed into and clicked, and answered by the small model.

$DS4MLX_PICTURE names a file to which a picture of it goes; the one in docs/ was made so.
"""

import json
import os
import re
from pathlib import Path

import pytest
from browser import browser_path, chromium, opened
from playwright.sync_api import expect

PAGE = Path(__file__).parents[1] / "ds4mlx" / "server" / "page"
ADD = "Write a function that adds two numbers."
TIMER = {
    "type": "function",
    "function": {
        "name": "set_timer",
        "description": "Start a timer.",
        "parameters": {
            "type": "object",
            "properties": {"minutes": {"type": "integer"}, "label": {"type": "string"}},
            "required": ["minutes", "label"],
        },
    },
}
# Notes each text that the answer's parts have had, as they grow.
RECORD = """() => {
    window.seen = { thought: new Set(), answer: new Set(), note: new Set(), running: new Set() };
    const parts = { thought: ".thinking .text", answer: ".answer > .text", note: ".note", running: "#running" };
    new MutationObserver(() => {
        for (const [name, selector] of Object.entries(parts)) {
            for (const part of document.querySelectorAll(selector)) seen[name].add(part.textContent);
        }
    }).observe(document.body, { childList: true, subtree: true, characterData: true });
}"""
SEEN = "() => Object.fromEntries(Object.entries(seen).map(([name, texts]) => [name, [...texts]]))"

pytestmark = pytest.mark.skipif(browser_path() is None, reason="there is no Chromium here")


@pytest.fixture(scope="module")
def browser():
    with chromium(browser_path()) as started:
        yield started


@pytest.fixture
def page(browser, served):
    with opened(browser, served.url) as page:
        yield page
        assert page.faults == []


def say(page, text):
    """Type a message; the last answer, when it is over."""
    page.fill("#message", text)
    page.press("#message", "Enter")
    return over(page)


def over(page):
    page.wait_for_selector(".answer[aria-busy=false]:last-child")
    return page.locator(".answer:last-child")


def reused(answer):
    return int(re.search(r"(\d+) of them reused", answer.locator(".note").inner_text())[1])


def set_options(page, **fields):
    page.locator("#options").evaluate("options => { options.open = true }")
    for name, value in fields.items():
        field = page.locator(f"#settings [name={name}]")
        if name in ("reasoning_effort", "tool_choice"):
            field.select_option(value)
        else:
            field.fill(value)


def test_thinking_and_answer_come_piece_by_piece(page):
    set_options(page, temperature="0")
    page.evaluate(RECORD)
    answer = say(page, ADD)
    seen = page.evaluate(SEEN)
    for name in ("thought", "answer"):
        longest = max(seen[name], key=len)
        assert sum(longest.startswith(text) for text in seen[name]) > 4, name
    assert any(re.fullmatch(r"[\d.]+ tokens/s", note) for note in seen["note"])
    assert "1" in seen["running"]
    assert not answer.locator(".thinking > .text").is_visible()
    answer.locator("summary").click()
    assert "add" in answer.locator(".thinking > .text").inner_text()
    assert answer.locator("pre code").inner_text().startswith("def add(a, b):")
    assert re.search(
        r"\d+ tokens · [\d.]+ tokens/s · prompt 13 tokens, \d+ of",
        answer.locator(".note").inner_text(),
    )
    assert page.inner_text("#notice") == "The answer is complete."
    assert page.inner_text("#model") == "ds4-tiny"


def test_a_call_is_shown_and_its_result_goes_back(page):
    set_options(page, tools=json.dumps([TIMER]), temperature="0")
    page.locator("#options").evaluate("options => { options.open = false }")
    answer = say(page, "Set a timer of 5 minutes for the tea.")
    assert answer.locator(".call h3").inner_text() == "set_timer"
    assert json.loads(answer.locator(".call .code").inner_text())["minutes"] == 5
    answer.locator(".call textarea").fill('{"timer": 7}')
    page.click("#send")
    last = over(page)
    assert page.locator(".results .code").inner_text() == '{"timer": 7}'
    assert "7" in last.locator("> .text").inner_text()
    assert reused(last) > 300
    page.locator(".thinking summary").first.click()
    page.mouse.move(0, 0)
    expect(page.locator("#running")).to_have_text("0")
    page.screenshot(path=os.environ.get("DS4MLX_PICTURE"))


def test_thinking_and_answer_are_stopped_and_the_question_edited(page):
    set_options(page, temperature="0")
    say(page, ADD)
    set_options(page, temperature="5", seed="1")  # noise, which does not end by itself
    page.fill("#message", "Write a function that multiplies two numbers.")
    page.press("#message", "Enter")
    page.click("#answer-now")
    expect(page.locator(".answer:last-child > .text")).not_to_be_empty()
    page.keyboard.press("Escape")
    stopped = over(page)
    assert stopped.locator(".note").inner_text().startswith("stopped")
    expect(page.locator("#running")).to_have_text("0")
    set_options(page, temperature="0")
    page.locator(".user:nth-last-child(2) button").click()
    assert page.evaluate("document.activeElement.value").startswith("Write a function that mult")
    page.keyboard.press("Escape")
    page.keyboard.press("Enter")  # the button has the focus again
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("Write a function that subtracts two numbers.")
    page.keyboard.press("Enter")
    answer = over(page)
    assert page.locator(".turn.user").count() == page.locator(".turn.answer").count() == 2
    assert "def sub" in answer.inner_text()
    assert reused(answer) > 13
    answer.get_by_role("button", name="Retry").click()
    assert "def sub" in over(page).inner_text()
    assert page.locator(".turn.answer").count() == 2


def test_text_is_only_ever_text(page):
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    set_options(page, max_tokens="1", reasoning_effort="none")
    answer = say(page, hostile)
    assert page.locator(".user .text").inner_text() == hostile
    assert page.locator("img, #turns script").count() == 0
    assert "cut at the most tokens" in answer.locator(".note").inner_text()


def test_what_the_server_refuses_is_said_in_its_words(browser, served):
    with opened(browser, served.url) as page:
        set_options(page, tools="[1]")
        assert page.locator("#options").get_attribute("open") is not None
        refused = say(page, ADD).locator(".wrong").inner_text()
        assert refused and "400" not in refused
        set_options(page, tools="[")
        page.fill("#message", ADD)
        page.press("#message", "Enter")
        assert page.inner_text("#notice").startswith("The tools are no JSON")
        assert all("status of 400" in fault for fault in page.faults)


def test_the_page_needs_neither_mouse_nor_width(browser, served):
    with opened(browser, served.url, has_touch=True, color_scheme="dark") as page:
        page.set_viewport_size({"width": 360, "height": 640})
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.emulate_media(color_scheme="light")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
        set_options(page)
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(wide) <= 0
        reached = set()
        for _ in range(16):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.id || document.activeElement.name"))
        assert {"new", "message", "send", "reasoning_effort", "tools"} <= reached


def test_nothing_in_the_page_is_inline_or_foreign(served):
    status, headers, html = served.ask("GET", "/")
    assert status == 200
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert not re.search(r"\sstyle=|\son\w+=|<style|<script(?![^>]*\ssrc=)", html.decode())
    for path in PAGE.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|innerHTML|outerHTML|insertAdjacentHTML|eval\(", text), path
