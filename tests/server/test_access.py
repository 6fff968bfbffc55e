"""What a real server lets in: who knows a key, and requests within their limits."""

import socket
from urllib.parse import urlsplit

import pytest

pytestmark = pytest.mark.server


def exchange(server, request: bytes) -> tuple[int, bytes]:
    """The status of the answer to these bytes, and all of it."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        connection.sendall(request)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return int(answer.split(b" ", 2)[1]), answer


def head(line: bytes = b"GET /health HTTP/1.1", *fields: bytes) -> bytes:
    return b"\r\n".join([line, b"host: weir", *fields, b"connection: close", b"", b""])


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (head(), 200),
        (head(b"GET /" + b"x" * 4000 + b" HTTP/1.1"), 404),
        (head(b"GET /" + b"x" * 5000 + b" HTTP/1.1"), 414),
        (head(b"GET /health HTTP/1.1", b"x-long: " + b"y" * 8000), 200),
        (head(b"GET /health HTTP/1.1", b"x-long: " + b"y" * 9000), 431),
        (head(b"GET /health HTTP/1.1", *(b"x-%d: y" % number for number in range(97))), 200),
        (head(b"GET /health HTTP/1.1", *(b"x-%d: y" % number for number in range(101))), 431),
        (head(b"nonsense"), 400),
    ],
    ids=["plain", "url", "long url", "field", "long field", "fields", "too many fields", "nonsense"],
)
def test_a_head_within_its_limits_is_read_and_no_other(server, request_bytes, status):
    found, answer = exchange(server, request_bytes)
    assert found == status, answer[:200]
    assert b"Traceback" not in answer


def test_names_of_our_headers_are_in_lower_case(server):
    _, answer = exchange(server, head(b"GET /info HTTP/1.1", b"X-Request-Id: 7"))
    names = [line.split(b":")[0] for line in answer.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]]
    assert {name for name in names if name != name.lower()} <= {b"Server", b"Date", b"Connection"}
    assert b"\r\nx-request-id: 7\r\n" in answer
    assert b"\r\ncontent-length: " in answer


def test_keys_come_from_a_file_and_bodies_have_a_limit(start, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first\nsecond\n")
    environ = {"GIT_SHA": "0123abc", "DOCKER_LABEL": "sha-0123abc"}
    server = start(f"--api-key=@{keys}", "--payload-limit=1000", environ=environ).wait_ready()
    assert server.get("/ping").status_code == 200
    assert server.get("/info").status_code == 401
    for key in ("first", "second"):
        bearer = {"Authorization": f"Bearer {key}"}
        info = server.get("/info", headers=bearer).json()
        assert (info["sha"], info["docker_label"]) == ("0123abc", "sha-0123abc")
        assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}, headers=bearer).status_code == 200
    large = {"inputs": "a" * 1000}
    assert server.post("/generate", large, headers=bearer).status_code == 413
    assert server.post("/generate", large).status_code == 401
    assert not [line for line in server.lines if "first" in line or "second" in line]
