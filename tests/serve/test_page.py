"""The page at / in a real browser: a chat that streams, an extraction, errors. Needs Debian's `chromium`."""

import json
import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server, key):
    context = browser.new_context()
    page = context.new_page()
    page.wrong = []
    page.asked = []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(server)
    page.fill("#key", key)
    yield page
    assert page.wrong == []
    assert all(url.startswith(server) for url in page.asked)  # No asset from anywhere else.
    context.close()


def test_a_chat(page):
    page.fill("#message", "hello")
    page.press("#message", "Enter")
    page.wait_for_function("document.getElementById('status').textContent.includes('tokens in')", timeout=60_000)
    turns = page.locator(".turn")
    assert turns.count() == 2
    assert turns.nth(0).inner_text() == "hello"
    first = turns.nth(1).text_content()
    assert page.evaluate("messages[1].content") == first != ""
    page.evaluate("messages[1].content = 'yes'")  # A random model talks until its context is full.
    page.fill("#message", "again")
    page.click("text=Send")
    answered = "document.querySelectorAll('.turn').length === {} && at('stop').disabled"
    page.wait_for_function(answered.format(4), timeout=60_000)
    assert page.evaluate("messages.map(m => m.role)") == ["user", "assistant"] * 2
    page.click("text=Forget")
    assert turns.count() == 0


def test_an_extraction(page):
    page.click("text=Extract >> nth=0")
    assert page.is_hidden("#chat")
    page.click("#extract-form button")
    page.wait_for_function("document.getElementById('status').textContent.endsWith('tokens')", timeout=60_000)
    data = json.loads(page.text_content("#result"))
    assert set(data) == {"name", "place", "year"}
    assert 0 <= data["year"] <= 2100
    page.fill("#schema", '{"type": "array", "items": {"type": "string", "minLength": 50}, "minItems": 999}')
    page.click("#extract-form button")
    page.wait_for_function("document.getElementById('status').textContent.startsWith('The answer was cut at')",
                           timeout=60_000)
    assert page.text_content("#result").startswith("[")
    page.fill("#schema", "{")
    page.click("#extract-form button")
    page.wait_for_function("document.getElementById('status').textContent.startsWith('The schema is not JSON')")
    page.fill("#schema", '{"type": "strange"}')
    page.click("#extract-form button")
    page.wait_for_function("document.getElementById('status').textContent.includes('JSON schema is')")


def test_what_goes_wrong_is_shown(page):
    page.fill("#key", "wrong")
    page.fill("#message", "hello")
    page.click("text=Send")
    page.wait_for_selector(".turn.error")
    assert "API key is missing or wrong" in page.locator(".turn.error").inner_text()


def test_text_is_text(page):
    page.fill("#message", "<img src=x onerror=\"window.hacked = true\"><b>bold</b>")
    page.click("text=Send")
    page.wait_for_function("document.querySelectorAll('.turn').length === 2 && at('stop').disabled", timeout=60_000)
    assert page.locator(".turn").nth(0).inner_text().startswith("<img")
    assert page.evaluate("window.hacked") is None
