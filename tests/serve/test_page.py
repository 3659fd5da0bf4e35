"""The page at / in a real browser, wide and narrow, light and dark: talks, what goes wrong, an extraction.

Needs Debian's `chromium`.
"""

import json
import re
import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium (Debian: apt-get install chromium)")
WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
SPEED = re.compile(r"\d+ tokens? · [\d.]+ tokens/s · first after [\d.]+ s · prompt \d+ tokens")
ASK = "**/v1/chat/completions"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, server, key):
    """Opens the page as a new visitor, with the key."""
    pages = []

    def visit(viewport=WIDE, scheme="light", *, script=None, with_key=True):
        page = browser.new_context(viewport=viewport, color_scheme=scheme).new_page()
        pages.append(page)
        page.wrong, page.asked, page.bodies = [], [], []
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("request", lambda request: page.bodies.append(json.loads(request.post_data or "{}")))
        page.set_default_timeout(60_000)
        if script:
            page.add_init_script(script)
        page.goto(server)
        page.wait_for_selector("#key-form:visible")
        if with_key:
            give_key(page, key)
        return page

    yield visit
    for page in pages:
        assert page.wrong == []
        assert all(url.startswith((server, "data:")) for url in page.asked)  # No asset from anywhere else.
        page.context.close()


def give_key(page, key):
    page.fill("#key", key)
    page.press("#key", "Enter")
    page.wait_for_selector("#model:has-text('tiny')")
    assert page.is_hidden("#key-form")


def send(page, text):
    page.fill("#message", text)
    page.press("#message", "Enter")


def wait_for_answer(page):
    page.wait_for_function("!running.size")


def settings(page, **values):
    """As a visitor sets them, in the drawer where there is one."""
    if page.is_visible("#menu"):
        page.click("#menu")
    for name, value in values.items():
        page.fill(f"#{name}", str(value))
    page.press(f"#{name}", "Tab")
    if page.is_visible("#menu"):
        page.keyboard.press("Escape")


def titles(page):
    return page.locator("#talks .open").all_inner_texts()


def roles_and_contents(page):
    return [[m["role"], m["content"]] for m in page.bodies[-1]["messages"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_a_first_talk(visit, viewport, scheme):
    page = visit(viewport, scheme)
    settings(page, system="be brief", temperature=0.5, top_p=0.001, max_tokens=7)  # The likeliest token, each time.
    send(page, "hello\nthere " + "x" * 300)
    wait_for_answer(page)
    body = page.bodies[-1]
    assert {name: body[name] for name in ("temperature", "top_p", "max_tokens")} == {
        "temperature": 0.5, "top_p": 0.001, "max_tokens": 7}
    assert roles_and_contents(page)[0] == ["system", "be brief"]
    turns = page.locator(".turn")
    assert turns.count() == 2
    assert turns.nth(0).locator(".text").inner_text().startswith("hello\nthere xxx")
    note = turns.nth(1).locator(".note").inner_text()
    assert SPEED.match(note)
    assert note.startswith("7 tokens ")
    assert note.endswith(" · cut at the limit")
    assert "cut at the limit" in page.inner_text("#chat-status")
    first = turns.nth(1).locator(".text").text_content()
    send(page, "again")
    wait_for_answer(page)
    assert roles_and_contents(page)[2:] == [["assistant", first], ["user", "again"]]

    below = page.evaluate("at('turns').scrollHeight - at('turns').scrollTop - at('turns').clientHeight")
    assert below < 2  # The end is in view.
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    for selector in ("#message", "#send", "#turns", "#chat-status"):
        box = page.locator(selector).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= viewport["width"]
        assert box["y"] + box["height"] <= viewport["height"]
    below = page.locator("#chat-status").bounding_box()["y"] - page.locator("#message").bounding_box()["y"]
    assert 0 < below < 120  # What happens is said where it is asked for.
    for text in ("#model", ".turn .text", ".turn .note", "#chat-status", "#send"):
        assert contrast(page, text) >= 4.5, text
    assert (lightness(page, "body", "behind") < 0.2) == (scheme == "dark")


LIGHTNESS = """(selector, of) => {
    const parts = colour => colour.match(/[\\d.]+/g).map(Number);
    let node = document.querySelector(selector), colour = getComputedStyle(node).color;
    if (of === "behind") {
        while (node && parts(getComputedStyle(node).backgroundColor)[3] === 0) node = node.parentElement;
        colour = getComputedStyle(node).backgroundColor;
    }
    const [r, g, b] = parts(colour).map(x => x / 255).map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}"""


def lightness(page, selector, of):
    return page.evaluate(f"([selector, of]) => ({LIGHTNESS})(selector, of)", [selector, of])


def contrast(page, selector):
    """As WCAG has it: 4.5 is enough for text of any size."""
    low, high = sorted(lightness(page, selector, of) for of in ("text", "behind"))
    return (high + 0.05) / (low + 0.05)


def test_talks_are_kept(visit, key):
    page = visit()
    settings(page, max_tokens=4)
    send(page, "about foxes")
    wait_for_answer(page)
    page.click("#new")
    assert page.locator(".turn").count() == 0
    page.click("#new")  # An empty one is enough.
    assert titles(page) == ["New talk", "about foxes"]
    settings(page, system="be kind")
    send(page, "about dogs")
    wait_for_answer(page)
    page.fill("#message", "not sent yet")
    page.click("[aria-label='Rename about dogs']")
    page.keyboard.type("Dogs <b>")
    page.keyboard.press("Enter")
    assert titles(page) == ["Dogs <b>", "about foxes"]
    page.click("[aria-label='Rename Dogs <b>']")
    page.keyboard.type("never")
    page.keyboard.press("Escape")
    dogs = page.locator("#turns").inner_text()

    page.reload()
    page.wait_for_selector("#model:has-text('tiny')")  # The key is remembered for as long as the tab is there.
    assert titles(page) == ["Dogs <b>", "about foxes"]
    assert page.locator("#turns").inner_text() == dogs
    assert page.input_value("#message") == "not sent yet"
    assert page.input_value("#system") == "be kind"
    assert page.input_value("#max_tokens") == "4"
    page.click("#talks .open >> nth=1")
    assert page.locator(".turn .text").first.inner_text() == "about foxes"
    assert page.input_value("#message") == page.input_value("#system") == ""

    page.once("dialog", lambda dialog: dialog.dismiss())
    page.click("[aria-label='Delete about foxes']")
    assert len(titles(page)) == 2
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("[aria-label='Delete about foxes']")
    assert titles(page) == ["Dogs <b>"]
    assert page.locator("#turns").inner_text() == dogs
    page.reload()
    assert titles(page) == ["Dogs <b>"]

    other = page.context.new_page()  # A second tab asks for the key anew and shows the same talks.
    other.goto(page.url)
    assert titles(other) == ["Dogs <b>"]
    give_key(other, key)
    send(other, "and cats")
    wait_for_answer(other)
    page.wait_for_selector(".turn:has-text('and cats')")


def test_the_drawer_of_a_narrow_screen(visit):
    page = visit(NARROW)
    settings(page, max_tokens=3)
    assert page.is_hidden("#side")
    send(page, "about foxes")
    wait_for_answer(page)
    page.click("#menu")
    assert page.get_attribute("#menu", "aria-expanded") == "true"
    page.click("#new")
    assert page.is_hidden("#side")
    assert page.evaluate("document.activeElement.id") == "message"
    page.click("#menu")
    page.keyboard.press("Escape")
    assert page.is_hidden("#side")
    assert page.evaluate("document.activeElement.id") == "menu"
    page.click("#menu")
    page.click("#talks .open:has-text('about foxes')")
    assert page.is_hidden("#side")
    assert page.locator(".turn").count() == 2


ENDLESS = """{
    const real = window.fetch, piece = 'data: {"choices": [{"index": 0, "delta": {"content": "word "}}]}\\n\\n';
    window.endless = true;
    window.fetch = async (path, options) => !(window.endless && path.endsWith("completions")) ? real(path, options)
        : new Response(new ReadableStream({start(stream) {
            const timer = setInterval(() => stream.enqueue(new TextEncoder().encode(piece)), 20);
            options.signal.onabort = () => { clearInterval(timer); stream.error(options.signal.reason); };
        }}));
}"""
"""A model that writes until it is stopped, which the random one need not do."""


def test_stop_keeps_what_is_written(visit):
    page = visit(script=ENDLESS)
    for how in (lambda: page.click("#stop"), lambda: page.keyboard.press("Escape")):
        page.click("#new")
        send(page, "hello")
        page.wait_for_function("current.turns.at(-1).text.length > 5")
        assert page.is_hidden("#send")
        how()
        wait_for_answer(page)
        text, note = page.evaluate("[current.turns[1].text, current.turns[1].note]")
        assert text
        assert note.startswith("stopped after ")
        assert page.inner_text("#chat-status") == "Stopped."
        assert page.is_visible("#send")
    page.evaluate("window.endless = false")
    settings(page, max_tokens=3)
    send(page, "more")
    wait_for_answer(page)
    assert roles_and_contents(page) == [["user", "hello"], ["assistant", text], ["user", "more"]]

    page.evaluate("window.endless = true")
    send(page, "the last one")
    page.wait_for_function("current.turns.at(-1).text.length > 5")
    page.click("#new")  # It goes on while another talk is open, and can be stopped from there.
    assert page.is_visible("#send")
    page.click("[aria-label='Stop the answer in hello']")
    wait_for_answer(page)
    assert page.locator("[aria-label='Stop the answer in hello']").count() == 0
    page.click("#talks .open:has-text('hello') >> nth=0")
    assert page.locator(".note").last.inner_text().startswith("stopped after ")


def stream_of(*deltas, finish="stop"):
    """An answer as the server streams it."""
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks += [{"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]},
               {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 9}}] if finish else []
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + ("data: [DONE]\n\n" if finish else "")


def test_a_thought_is_folded_above_its_answer(visit):
    page = visit()
    thought = [{"reasoning_content": text} for text in ("91 is ", "7 <b>times</b> 13.")]
    answers = [stream_of({"role": "assistant", "content": ""}, *thought, {"content": "N"}, {"content": "o."}),
               stream_of(*thought, finish="length"), stream_of(*thought, finish=None), stream_of({"content": "Yes."})]
    page.route(ASK, lambda route: route.fulfill(body=answers.pop(0), content_type="text/event-stream"))
    send(page, "Is 91 a prime?")
    wait_for_answer(page)
    folded = page.locator(".turn .thought:visible")
    assert folded.count() == 1  # None above the question.
    assert folded.locator("summary").inner_text() == "Thought"
    assert folded.locator("div").is_hidden()
    assert page.locator(".turn .text").last.inner_text() == "No."
    assert SPEED.match(page.locator(".note").last.inner_text())
    folded.locator("summary").focus()
    page.keyboard.press("Enter")
    assert folded.locator("div").inner_text() == "91 is 7 <b>times</b> 13."
    assert contrast(page, ".turn.assistant .thought") >= 4.5
    page.reload()
    page.wait_for_selector("#model:has-text('tiny')")
    assert folded.locator("div").text_content() == "91 is 7 <b>times</b> 13."

    for note in ("cut at the limit", "broken off"):  # In the midst of a thought, which is kept.
        send(page, "and 97?")
        wait_for_answer(page)
        assert note in page.locator(".note").last.inner_text()
        assert page.locator(".thought").last.is_visible()
        assert page.locator(".turn .text").last.inner_text() == ""
    assert page.bodies[-1]["messages"][1] == {
        "role": "assistant", "content": "No.", "reasoning_content": "91 is 7 <b>times</b> 13."}
    send(page, "and 97?")
    wait_for_answer(page)
    assert page.locator(".thought").last.is_hidden()
    assert page.locator(".turn .text").last.inner_text() == "Yes."


def test_what_is_being_thought_is_said(visit):
    page = visit(script=ENDLESS.replace('"content"', '"reasoning_content"'))
    send(page, "hello")
    page.wait_for_function("current.turns.at(-1).thought.length > 5")
    assert page.locator(".thought summary:visible").inner_text() == "Thinking"
    assert page.locator(".note").last.inner_text() == "thinking"
    page.click("#stop")
    wait_for_answer(page)
    assert page.locator(".thought summary:visible").inner_text() == "Thought"
    assert page.locator(".note").last.inner_text().startswith("stopped after ")


def test_an_answer_outlives_the_page_it_was_written_on(visit):
    page = visit(script=ENDLESS)
    send(page, "hello")
    page.wait_for_function("current.turns.at(-1).text.length > 5")
    page.reload()
    assert len(page.locator(".turn .text").nth(1).inner_text()) > 5
    assert page.locator(".note").last.inner_text() == "broken off: the page was closed"


def test_what_goes_wrong_is_said_below_the_message(visit, key):
    page = visit(with_key=False)
    assert page.inner_text("#key-status") == "The server asks for an API key."
    page.fill("#key", "wrong")
    page.click("text=Use key")
    page.wait_for_selector("#key-status:has-text('does not take this API key')")
    send(page, "hello")
    page.wait_for_selector("#chat-status.error:has-text('does not take the API key')")
    assert page.input_value("#message") == "hello"  # Nothing that was written is lost.
    assert page.locator(".turn").count() == 0
    give_key(page, key)
    assert page.inner_text("#chat-status") == ""

    settings(page, max_tokens=0)
    page.press("#message", "Enter")
    page.wait_for_selector("#chat-status.error:has-text('Max tokens: ')")
    settings(page, max_tokens=5000)
    page.press("#message", "Enter")
    wait_for_answer(page)
    assert page.bodies[-1]["max_tokens"] == 5000

    page.route(ASK, lambda route: route.abort())
    send(page, "anyone?")
    page.wait_for_selector("#chat-status.error:has-text('cannot be reached')")
    page.unroute(ASK)
    page.route(ASK, lambda route: route.fulfill(status=429, json={"error": {"message": "the queue is full"}}))
    page.press("#message", "Enter")
    page.wait_for_selector("#chat-status.error:has-text('The queue is full')")
    page.unroute(ASK)
    page.route(ASK, lambda route: route.fulfill(status=502, body="<html>"))
    page.press("#message", "Enter")
    page.wait_for_selector("#chat-status.error:has-text('status 502')")
    page.unroute(ASK)
    piece = 'data: {"choices": [{"index": 0, "delta": {"content": "half"}, "finish_reason": null}]}\n\n'
    error = 'data: {"error": {"message": "too slow"}}\n\n'
    for end, problem in (("", "The connection broke off"), (error, "too slow")):
        body = piece + end
        page.route(ASK, lambda route: route.fulfill(body=body, content_type="text/event-stream"))  # noqa: B023
        send(page, "anyone?")
        wait_for_answer(page)
        assert problem in page.inner_text("#chat-status.error")
        assert page.locator(".turn").last.inner_text().endswith(f"broken off: {page.inner_text('#chat-status')}")
        page.unroute(ASK)


def test_storage_that_is_broken_full_or_forbidden(visit):
    good = {"id": "a", "name": "kept", "system": "", "draft": "", "time": 1, "turns": [{"role": "user", "text": "x"}]}
    bad = ["{", "null", "[]", json.dumps(good | {"turns": [None]}), json.dumps(good | {"turns": 5}), json.dumps(good)]
    stored = {"lfm_jax.talk.a": json.dumps(good), "lfm_jax.settings": "]", "lfm_jax.current": "nobody",
              **{f"lfm_jax.talk.bad{i}": text for i, text in enumerate(bad)}}
    page = visit(script=f"""if (!localStorage.ready) Object.assign(localStorage, {json.dumps(stored)}, {{ready: 1}})""")
    assert page.inner_text("#chat-status") == "6 saved talks could not be read and are left out."
    assert titles(page) == ["kept"]
    page.reload()
    page.wait_for_selector("#model:has-text('tiny')")
    assert titles(page) == ["kept"]
    assert page.inner_text("#chat-status") == ""
    assert page.evaluate("localStorage['lfm_jax.broken.bad0']") == "{"  # Out of the way, and not thrown away.
    settings(page, max_tokens=3)
    page.evaluate("""for (let n = 2 ** 23, text = ""; n >= 1; n /= 2) {
        try { localStorage.filler = text + "x".repeat(n); text += "x".repeat(n); } catch { /* Full: less of it. */ }
    }""")
    send(page, "more")
    wait_for_answer(page)
    assert "storage is full" in page.inner_text("#chat-status.error")
    assert "cut at the limit" in page.inner_text("#chat-status.error")
    assert page.locator(".turn").count() == 3

    page = visit(script="""for (const store of ["localStorage", "sessionStorage"])
        Object.defineProperty(window, store, {get() { throw new DOMException("no", "SecurityError") }})""")
    assert "keeps no talks" in page.inner_text("#chat-status.error")
    settings(page, max_tokens=3)
    send(page, "hello")
    wait_for_answer(page)
    assert page.locator(".turn").count() == 2


def test_an_extraction(visit):
    page = visit()
    page.click("#tab-extract")
    assert page.is_hidden("#chat")
    page.click("#extract-send")
    page.wait_for_selector("#extract-status:has-text('tokens/s')")
    data = json.loads(page.text_content("#result"))
    assert set(data) == {"name", "place", "year"}
    assert 0 <= data["year"] <= 2100
    endless = '{"type": "array", "items": {"type": "string", "minLength": 50}, "minItems": 999}'
    page.fill("#schema", endless)
    page.click("#extract-send")
    page.wait_for_selector("#extract-status.error:has-text('cut at the limit')")
    assert page.text_content("#result").startswith("[")
    page.route(ASK, lambda route: None)  # Never answered.
    for how in (lambda: page.click("#extract-stop"), lambda: page.keyboard.press("Escape")):
        page.click("#extract-send")
        page.wait_for_selector("#extract-stop:visible")
        how()
        page.wait_for_selector("#extract-status:has-text('Stopped.')")
        assert page.is_visible("#extract-send")
    page.unroute(ASK)
    page.fill("#schema", "{")
    page.click("#extract-send")
    page.wait_for_selector("#extract-status.error:has-text('The schema is not JSON')")
    page.fill("#schema", '{"type": "strange"}')
    page.click("#extract-send")
    page.wait_for_selector("#extract-status.error:has-text('JSON schema')")


def test_everything_has_a_name_and_the_keyboard_reaches_it(visit):
    page = visit()
    settings(page, max_tokens=3)
    send(page, "hello")
    wait_for_answer(page)
    nameless = page.evaluate("""[...document.querySelectorAll("button, input, textarea, [role]")].filter(node =>
        !node.matches("[role=status]") && !(node.ariaLabel || node.getAttribute("aria-labelledby") ||
          node.labels?.length || node.textContent.trim())).map(node => node.outerHTML)""")
    assert nameless == []
    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-extract"
    assert page.is_visible("#extract")
    page.keyboard.press("ArrowLeft")
    assert page.is_visible("#chat")
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.ariaLabel || "
                                  "document.activeElement.className"))
    assert {"new", "open", "Rename hello", "Delete hello", "system", "temperature", "top_p", "max_tokens", "tab-chat",
            "turns", "message", "send"} <= reached
    page.fill("#message", "one")
    page.press("#message", "Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#message") == "one\ntwo"


def test_text_is_text(visit):
    page = visit()
    settings(page, max_tokens=3)
    send(page, "<img src=x onerror=\"window.hacked = true\"><b>bold</b>")
    wait_for_answer(page)
    assert page.locator(".turn .text").nth(0).inner_text().startswith("<img")
    assert titles(page)[0].startswith("<img")
    assert page.evaluate("window.hacked") is None
