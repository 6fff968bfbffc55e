"""The pages as files: what a browser is given, and what nobody is."""

import re

import pytest

from serving.api.docs import DOCS_FILES, PLAYGROUND_FILES

FILES = [f"/docs/{name}" for name in DOCS_FILES] + [f"/playground/{name}" for name in PLAYGROUND_FILES]
PAGES = ["/docs/", "/playground"]
TYPES = {"js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8", "svg": "image/svg+xml"}


def test_docs_lead_to_their_page(client):
    response = client.get("/docs")
    assert (response.status_code, response.headers["location"], response.data) == (303, "/docs/", b"")


@pytest.mark.parametrize("path", PAGES)
def test_pages_are_html(client, path):
    response = client.get(path)
    assert (response.status_code, response.content_type) == (200, "text/html; charset=utf-8")


@pytest.mark.parametrize("path", FILES)
def test_files_have_their_content_type(client, path):
    response = client.get(path)
    assert (response.status_code, response.content_type) == (200, TYPES[path.rpartition(".")[2]])
    assert response.data


@pytest.mark.parametrize("path", [*PAGES, "/docs/docs.js", "/playground/playground.js", "/api-doc/openapi.json"])
def test_only_this_origin_is_allowed_and_nothing_inline(client, path):
    headers = client.get(path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", PAGES)
def test_pages_name_no_other_origin_and_have_nothing_inline(client, path):
    html = client.get(path).text
    assert not re.search(r"https?:|src=\"//|href=\"//", html)
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script>", html)


@pytest.mark.parametrize("path", [*PAGES, "/docs/swagger-ui-bundle.js"])
def test_a_browser_that_has_it_is_told_so(client, path):
    first = client.get(path)
    assert first.headers["cache-control"] == "no-cache"
    again = client.get(path, headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.data) == (304, b"")


@pytest.mark.parametrize("path", [*PAGES, *FILES, "/docs", "/api-doc/openapi.json"])
def test_head_is_get_without_a_body(client, path):
    head, whole = client.head(path), client.get(path)
    assert (head.status_code, head.data) == (whole.status_code, b"")
    assert head.headers.get("content-length") == whole.headers.get("content-length")


@pytest.mark.parametrize(
    "path",
    [
        "/docs/../app.py",
        "/docs/..%2fapp.py",
        "/docs/%2e%2e/%2e%2e/settings.py",
        "/docs//etc/passwd",
        "/docs/swagger-ui.js",
        "/docs/index.html",
        "/docs/docs.html",
        "/playground/playground.html",
        "/playground/../docs.js",
        "/playground/..%2f..%2ferrors.py",
        "/playground/",
        "/playground/playground.js/",
        "/docs/docs.js%00",
    ],
)
def test_nothing_else_can_be_read(client, path):
    response = client.get(path)
    assert (response.status_code, response.data) == (404, b"")


@pytest.mark.parametrize("path", ["/docs", *PAGES, *FILES, "/api-doc/openapi.json"])
def test_the_key_guards_the_pages_too(serve, path):
    client = serve(api_key="k").client
    assert client.get(path).status_code == 401
    assert client.get(path, headers={"authorization": "Bearer k"}).status_code in (200, 303)


@pytest.mark.parametrize("path", [*PAGES, "/docs/docs.js"])
def test_pages_are_only_read(client, path):
    response = client.post(path)
    assert (response.status_code, response.headers["allow"]) == (405, "GET,HEAD")
