"""Who may call: browsers of which origins, and who knows which key."""

import pytest

ROUTES = [
    ("GET", "/info"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/demo/model"),
    ("GET", "/v1/models/unknown"),
    ("POST", "/"),
    ("POST", "/ping"),
    ("POST", "/generate"),
    ("POST", "/generate_stream"),
    ("POST", "/invocations"),
    ("POST", "/vertex"),
    ("POST", "/tokenize"),
    ("POST", "/chat_tokenize"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
]
VARY = "origin, access-control-request-method, access-control-request-headers"


def test_every_answer_may_be_read_by_browsers(client):
    for response in (client.get("/health"), client.post("/generate", json={}), client.get("/nowhere")):
        assert response.headers["access-control-allow-origin"] == "*"
        assert response.headers["vary"] == VARY


@pytest.mark.parametrize("path", ["/generate", "/nowhere"])
def test_preflights_are_answered_directly(serve, path):
    response = serve(api_key="k").client.options(path, headers={"origin": "https://a.example"})
    assert (response.status_code, response.data) == (200, b"")
    assert response.headers["access-control-allow-methods"] == "GET,POST"
    assert response.headers["access-control-allow-headers"] == "content-type,authorization"
    assert response.headers["access-control-allow-origin"] == "*"


def test_named_origins_are_echoed_and_others_are_not(serve):
    client = serve(cors=("https://a.example", "https://b.example")).client
    allowed = client.get("/health", headers={"origin": "https://b.example"})
    other = client.get("/health", headers={"origin": "https://c.example"})
    assert allowed.headers["access-control-allow-origin"] == "https://b.example"
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(("method", "path"), [*ROUTES, ("GET", "/nowhere"), ("PUT", "/health")])
def test_the_key_guards_everything_that_is_not_public(serve, method, path):
    client = serve(api_key="gehéim").client
    response = client.open(path, method=method, json={"inputs": "x"})
    assert response.status_code == 401
    message = "Invalid or missing API key"
    wrapped = {"message": message, "type": "authentication_error", "param": None, "code": "invalid_api_key"}
    assert response.json == {
        "error": wrapped if path.startswith("/v1/") else message,
        "error_type": "unauthorized",
    }
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["access-control-allow-origin"] == "*"


def test_no_route_is_forgotten(serve):
    server = serve(api_key="k")
    asked = [(rule.rule, method) for rule in server.app.url_map.iter_rules() for method in rule.methods - {"OPTIONS"}]
    open_to_all = {
        (path, method) for path, method in asked if server.client.open(path, method=method).status_code != 401
    }
    assert open_to_all == {(path, method) for path in ("/", "/health", "/ping") for method in ("GET", "HEAD")}


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/", "/health", "/ping"])
def test_health_needs_no_key(serve, method, path):
    assert serve(api_key="k").client.open(path, method=method).status_code == 200


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer Key", 200),
        ("bearer Key", 200),
        ("Bearer key", 401),
        ("Bearer Key2", 401),
        ("Bearer ", 401),
        ("Bearer", 401),
        ("Basic Key", 401),
        ("Key", 401),
        ("Bearer K\xe9y", 401),
        ("", 401),
    ],
)
def test_keys_are_compared_exactly(serve, header, status):
    response = serve(api_key="Key").client.get("/info", headers={"authorization": header})
    assert response.status_code == status


@pytest.mark.parametrize(
    ("key", "status"), [("one", 200), ("two words", 200), ("drei", 200), ("", 401), ("one\ntwo", 401)]
)
def test_any_of_several_keys_lets_in(serve, key, status):
    client = serve(api_key="one\n\n  two words  \r\ndrei\n").client
    header = "Bearer " + key.replace("\n", " ")
    assert client.get("/info", headers={"authorization": header}).status_code == status


def cached(server, key, path, body):
    """The prompt tokens that the prefix cache spared a request."""
    before = len(server.steps)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    assert server.client.post(path, json=body, headers=headers).status_code == 200
    return sum(step.cached_tokens for step in server.steps[before:])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"inputs": "a prompt of some blocks, say:ok"}),
        ("/v1/completions", {"prompt": "a prompt of some blocks, say:ok"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a prompt, say:ok"}]}),
        ("/vertex", {"instances": [{"inputs": "a prompt of some blocks, say:ok"}]}),
    ],
)
def test_keys_never_share_cached_prefixes_and_one_key_does(serve, path, body):
    server = serve(api_key="one\ntwo")
    assert cached(server, "one", path, body) == 0
    assert cached(server, "two", path, body) == 0
    assert cached(server, "one", path, body) >= 24
    assert cached(server, "two", path, body) >= 24


def test_without_keys_everybody_shares(serve):
    server = serve()
    body = {"inputs": "a prompt of some blocks, say:ok"}
    assert [cached(server, None, "/generate", body) > 0 for _ in range(2)] == [False, True]
