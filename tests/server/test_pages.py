"""The pages in a real browser, Chromium, over a real server with the demo model."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import jsonschema
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from server.conftest import Server

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
REFUSED = re.compile("Failed to load resource: the server responded with a status of 422")  # Chromium's own word
SECONDS = 60_000  # milliseconds that an answer may take on a busy machine

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed"),
]


@pytest.fixture(scope="module")
def demo() -> Iterator[Server]:
    """A server with the demo model."""
    server = Server(["--hostname=127.0.0.1", "--port=0", "--device=cpu", "--kv-cache-memory=32MiB"], {})
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, demo) -> Iterator[Page]:
    """A fresh page; at its end nothing may have been asked of another origin, nor said on the console."""
    context = browser.new_context(viewport={"width": 1280, "height": 860}, base_url=demo.url)
    page = context.new_page()
    page.set_default_timeout(SECONDS)
    foreign, said = [], []
    page.on("request", lambda asked: asked.url.startswith((demo.url + "/", "data:")) or foreign.append(asked.url))
    page.on("console", lambda message: REFUSED.match(message.text) or said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    yield page
    context.close()
    assert (foreign, said) == ([], [])


def settled(page: Page, count: int = 1) -> str:
    """What the last of `count` answers took, once it is there."""
    line = page.locator("#talk .meta, #answer .meta").nth(count - 1)
    line.wait_for()
    return line.inner_text()


def code(page: Page, language: str) -> str:
    if not page.locator("#snippet").is_visible():
        page.click("#code summary")
    page.click(f"#code-{language}")
    return page.locator("#snippet").inner_text()


def run(command: list[str]) -> str:
    """What a program writes."""
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True).stdout


def choose_grammar(page: Page, kind: str, source: str) -> None:
    page.select_option("#grammar-kind", kind)
    page.fill("#grammar", source)


def test_the_docs_show_every_route_and_try_one_out(page, demo):
    page.goto("/docs")
    operations = [
        (path, method)
        for path, operations in demo.get("/api-doc/openapi.json").json()["paths"].items()
        for method in operations
    ]
    expect(page.locator(".opblock")).to_have_count(len(operations))
    page.click("[id$=-post_generate] .opblock-summary-control")
    page.click("[id$=-post_generate] .execute")
    answer = page.locator("[id$=-post_generate] .live-responses-table .response-col_description pre").first
    expect(answer).to_contain_text("generated_text")


def test_the_playground_says_whom_it_talks_to(page):
    page.goto("/playground")
    expect(page.locator("#served")).to_contain_text("weir-demo")
    for unlabelled in page.locator("input, textarea, select").all():
        assert unlabelled.evaluate("field => field.labels.length") > 0


def test_chat_streams_an_answer_and_goes_on_from_it(page):
    page.goto("/playground")
    page.uncheck("#sample")
    page.fill("#system", "You are brief.")
    page.fill("#message", "What is a river?")
    page.press("#message", "Enter")
    first = settled(page)
    assert re.search(r"\d+ tokens?·?\s*first after \d+ ms", first), first
    text = page.locator("#talk .turn:not(.user) .text").first.inner_text()
    assert len(text.split()) > 3
    page.fill("#message", "And a lake?")
    page.click("#send")
    settled(page, 2)
    sent = json.loads(
        code(page, "curl").partition("-d '")[2].removesuffix("'\n").removesuffix("'").replace("'\\''", "'")
    )
    assert [message["role"] for message in sent["messages"]] == ["system", "user", "assistant", "user"]
    assert sent["messages"][2]["content"] == text
    assert (sent["temperature"], sent["stream"]) == (0, True)


def test_text_of_a_model_is_never_markup(page):
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            content_type="application/json",
            body=json.dumps(
                {
                    "choices": [
                        {
                            "message": {"content": "<img src=x onerror=alert(1)><b>bold</b>"},
                            "logprobs": None,
                            "finish_reason": "stop",
                        }
                    ],
                    "usage": {"completion_tokens": 3},
                }
            ),
        ),
    )
    page.goto("/playground")
    page.uncheck("#stream")
    page.fill("#message", "<i>me</i>")
    page.press("#message", "Enter")
    settled(page)
    assert page.locator("#talk .text").all_inner_texts() == ["<i>me</i>", "<img src=x onerror=alert(1)><b>bold</b>"]
    assert page.locator("#talk img, #talk b, #talk i").count() == 0


def test_tokens_are_coloured_and_explained(page):
    page.goto("/playground#raw")
    page.check("#logprobs")
    page.fill("#seed", "18446744073709551615")
    page.click("#generate")
    assert "seed 18446744073709551615" in settled(page)
    tokens = page.locator("#answer .token")
    assert tokens.count() > 3
    for token in tokens.all():
        assert re.search(r"\bp[1-5]\b", token.get_attribute("class"))
    tokens.nth(2).hover()
    tip = page.locator("#tip")
    expect(tip).to_contain_text(re.compile(r"id \d+ · [\d.]+ %, logprob -?[\d.]+"))
    assert page.locator("#tip tr").count() >= 3
    assert page.locator("#tip tr.chosen").count() <= 1
    page.locator("#answer .text").focus()
    page.keyboard.press("Home")
    first = tip.inner_text()
    page.keyboard.press("ArrowRight")
    expect(tip).not_to_have_text(first)
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()


def test_chat_tokens_are_coloured_too(page):
    page.goto("/playground")
    page.check("#logprobs")
    page.fill("#message", "What is a river?")
    page.press("#message", "Enter")
    settled(page)
    page.locator("#talk .token").nth(1).hover()
    expect(page.locator("#tip tr").nth(2)).to_be_visible()


@pytest.mark.parametrize("tab", ["chat", "raw"])
def test_a_schemas_answer_is_valid_and_shown_so(page, tab):
    page.goto("/playground" if tab == "chat" else "/playground#raw")
    choose_grammar(page, "json", json.dumps(PERSON))
    page.fill("#message" if tab == "chat" else "#prompt", "A person as JSON:")
    page.click("#send" if tab == "chat" else "#generate")
    settled(page)
    expect(page.locator(".verdict")).to_have_text("Valid JSON of the schema")
    jsonschema.validate(json.loads(page.locator(".pretty").inner_text()), PERSON)


def test_an_expressions_answer_matches(page):
    page.goto("/playground#raw")
    choose_grammar(page, "regex", "[a-c]{3}-[0-9]{2}")
    page.click("#generate")
    settled(page)
    expect(page.locator(".verdict")).to_have_text("Matches the expression")
    assert re.fullmatch("[a-c]{3}-[0-9]{2}", page.locator("#answer .text").inner_text())


def test_what_breaks_the_schema_is_named(page):
    answer = {"generated_text": '{"name": "somebody with a long name", "size": 1}'}
    details = {"finish_reason": "length", "generated_tokens": 1, "seed": 1, "prefill": [], "tokens": []}
    page.route("**/generate", lambda route: route.fulfill(json={**answer, "details": details}))
    page.goto("/playground#raw")
    page.uncheck("#stream")
    choose_grammar(page, "json", json.dumps(PERSON))
    page.click("#generate")
    settled(page)
    verdict = page.locator(".verdict.bad").inner_text()
    assert "lacks age" in verdict
    assert ".name is longer than 12" in verdict
    assert ".size may not be there" in verdict


def test_stop_ends_the_request(page, demo):
    page.goto("/playground#raw")
    page.fill("#max-tokens", "2000")
    choose_grammar(page, "regex", "[a-z ]{4000,}")  # it cannot end soon
    page.fill("#prompt", "again and again and again and again and")
    page.uncheck("#sample")
    page.click("#generate")
    page.locator("#answer .text").filter(has_text=re.compile(r"\w")).wait_for()
    page.locator("#panel-raw [data-stop]").click()
    assert "stopped by you" in settled(page)
    expect(page.locator("#generate")).to_be_enabled()
    failed = 'tgi_request_failure{err="dropped"}'
    page.wait_for_timeout(500)
    assert failed in demo.get("/metrics").text


def test_errors_are_shown_as_the_server_says_them(page, demo):
    page.goto("/playground#raw")
    page.uncheck("#stream")
    page.fill("#top-k", "-3")
    page.click("#generate")
    page.fill("#top-k", "")
    problem = page.locator("#answer .problem")
    expect(problem).to_contain_text("`top_k` must be strictly positive")
    page.check("#stream")
    page.fill("#stop", "\n".join("abcdefgh"))
    page.click("#generate")
    expect(problem).to_contain_text("`stop` supports up to 4 stop sequences. Given: 8")


def test_a_schema_that_is_no_json_is_not_sent(page):
    page.goto("/playground#raw")
    choose_grammar(page, "json", "{")
    page.click("#generate")
    expect(page.locator("#answer .problem")).to_contain_text("The schema is not JSON")


def test_the_curl_snippet_runs(page):
    page.goto("/playground#raw")
    page.fill("#prompt", 'It\'s "quoted" \\ $HOME `id`\nand Ünïcode 🙂:')
    page.fill("#seed", "7")
    page.fill("#max-tokens", "12")
    page.uncheck("#stream")
    page.click("#generate")
    settled(page)
    shown = page.locator("#answer .text").inner_text()
    ran = run(["sh", "-c", code(page, "curl")])
    assert json.loads(ran)["generated_text"].strip() == shown.strip()
    page.check("#stream")
    page.click("#generate")
    settled(page)
    ran = run(["sh", "-c", code(page, "curl")])
    assert json.loads(ran.strip().split("\n\n")[-1].removeprefix("data: "))["generated_text"].strip() == shown.strip()


@pytest.mark.parametrize("tab", ["chat", "raw"])
@pytest.mark.parametrize("language", ["curl", "hub", "openai"])
def test_code_says_every_parameter(page, tab, language):
    page.goto("/playground" if tab == "chat" else "/playground#raw")
    for name, value in (
        ("temperature", "0.6"),
        ("top-p", "0.9"),
        ("seed", "12"),
        ("max-tokens", "34"),
        ("stop", "END"),
    ):
        page.fill(f"#{name}", value)
    page.fill("#key", "very secret")
    snippet = code(page, language)
    maximum = "max_new_tokens" if tab == "raw" and language != "openai" else "max_tokens"
    says = (lambda name: f'"{name}": ') if language == "curl" else (lambda name: f"{name}=")
    for name, value in (("temperature", "0.6"), ("top_p", "0.9"), ("seed", "12"), (maximum, "34")):
        assert says(name) + value in snippet
    assert "END" in snippet
    assert "very secret" not in snippet
    assert "WEIR_API_KEY" in snippet


@pytest.mark.parametrize("tab", ["chat", "raw"])
@pytest.mark.parametrize("language", ["hub", "openai"])
@pytest.mark.parametrize("stream", [True, False])
def test_the_python_snippets_give_the_same_answer(page, tab, language, stream):
    page.goto("/playground" if tab == "chat" else "/playground#raw")
    page.uncheck("#sample")
    page.fill("#max-tokens", "10")
    page.set_checked("#stream", stream)
    page.fill("#message" if tab == "chat" else "#prompt", "What is Deep Learning?")
    page.click("#send" if tab == "chat" else "#generate")
    settled(page)
    shown = page.locator("#talk .turn:not(.user) .text, #answer .text").first.inner_text()
    assert run([sys.executable, "-c", code(page, language)]).strip() == shown.strip()


def test_a_narrow_page_fits_its_screen(browser, demo):
    context = browser.new_context(viewport={"width": 360, "height": 720}, base_url=demo.url, color_scheme="dark")
    page = context.new_page()
    page.goto("/playground")
    assert not page.locator("#temperature").is_visible()
    page.click("#settings summary")
    assert page.locator("#temperature").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    context.close()


def test_tabs_follow_the_keyboard(page):
    page.goto("/playground")
    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#panel-raw")).to_be_visible()
    expect(page.locator("#panel-chat")).to_be_hidden()
    expect(page.locator("#tab-raw")).to_be_focused()
    expect(page.locator("#tab-raw")).to_have_attribute("aria-selected", "true")
    assert page.locator("#top-k").is_visible()
    assert not page.locator("#system").is_visible()
