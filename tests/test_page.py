"""The server's page in a browser: it is typed into and clicked, and answered by the small model."""

import re
from pathlib import Path

import mlx.core as mx
import pytest
import serving
from browser import browser_path, chromium, opened

from ds4mlx import load

PAGE = Path(__file__).parents[1] / "ds4mlx" / "server" / "page"
ADD = "Write a function that adds two numbers."

pytestmark = pytest.mark.skipif(browser_path() is None, reason="there is no Chromium here")


@pytest.fixture(scope="module")
def server(embedded_dir):
    with serving.serving(*load(embedded_dir, dtype=mx.float32)) as served:
        yield served


@pytest.fixture(scope="module")
def browser():
    with chromium(browser_path()) as started:
        yield started


def say(page, text):
    """Type a message; the last answer, when it is over."""
    page.fill("#message", text)
    page.press("#message", "Enter")
    return over(page)


def over(page):
    page.wait_for_selector(".answer[aria-busy=false]:last-child")
    return page.locator(".answer:last-child")


def set_options(page, **fields):
    page.locator("#options").evaluate("options => { options.open = true }")
    for name, value in fields.items():
        field = page.locator(f"#settings [name={name}]")
        if name in ("reasoning_effort", "tool_choice"):
            field.select_option(value)
        else:
            field.fill(value)


def test_what_the_server_refuses_is_said_in_its_words(browser, server):
    with opened(browser, server.url) as page:
        set_options(page, tools="[1]")
        assert page.locator("#options").get_attribute("open") is not None
        refused = say(page, ADD).locator(".wrong").inner_text()
        assert refused and "400" not in refused
        set_options(page, tools="[")
        page.fill("#message", ADD)
        page.press("#message", "Enter")
        assert page.inner_text("#notice").startswith("The tools are no JSON")
        assert all("status of 400" in fault for fault in page.faults)


def test_the_page_needs_neither_mouse_nor_width(browser, server):
    with opened(browser, server.url, has_touch=True, color_scheme="dark") as page:
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


def test_nothing_in_the_page_is_inline_or_foreign(server):
    status, headers, html = server.ask("GET", "/")
    assert status == 200
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert not re.search(r"\sstyle=|\son\w+=|<style|<script(?![^>]*\ssrc=)", html.decode())
    for path in PAGE.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|innerHTML|outerHTML|insertAdjacentHTML|eval\(", text), path
