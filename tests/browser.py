"""A browser without a screen, from the system's packages, and what a page does in it."""

import contextlib
import os
import shutil
import subprocess
from urllib.parse import urlsplit

from playwright.sync_api import expect, sync_playwright

NAMES = ("chromium", "google-chrome", "chromium-browser")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
PATIENCE = 60_000  # milliseconds after which a test gives up


def browser_path():
    """Of a Chromium that runs, or None; $CHROMIUM names another."""
    for name in (os.environ.get("CHROMIUM"), *NAMES, MAC):
        path = shutil.which(name) if name else None
        # Some systems have a command of that name which only says what to install.
        if path and subprocess.call([path, "--version"], stdout=subprocess.DEVNULL) == 0:
            return path
    return None


@contextlib.contextmanager
def chromium(path):
    """The browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, url, **options):
    """A page that neither fails, nor is refused anything, nor asks another host."""
    context = browser.new_context(viewport={"width": 1000, "height": 800}, **options)
    context.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    page, faults, hosts = context.new_page(), [], set()
    page.on("console", lambda message: faults.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.goto(url)
    page.faults = faults
    yield page
    assert hosts == {urlsplit(url).netloc}
    context.close()
