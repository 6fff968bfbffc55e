"""Whatever comes in over a socket, the server answers or hangs up: no crash, no hang, no leak, no trace of code.

At a tenth of its scale in an ordinary run; `make test-soak` runs it whole. The requests of a seed are always the same,
so that a fault is found again with the number that the failure names.
"""

import contextlib
import copy
import gzip
import json
import os
import random
import re
import select
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil
import pytest
from server.conftest import SMALL

pytestmark = [pytest.mark.server, pytest.mark.soak]

SCALE = float(os.environ.get("WEIR_TEST_SCALE", "1"))
REQUESTS = max(100, round(1000 * SCALE))
SEED = int(os.environ.get("WEIR_TEST_SEED", "3"))
THREADS = 16
BOUND_S = 60.0  # of one request, on a machine that does much else
# Main, engine and two more of the server, its two pools of two, tokenizers' pool; a leak would be a hundred.
MOST_THREADS = 12 + (os.cpu_count() or 1)
DELIBERATE = {  # statuses from 500 on that are part of the contract, and what their bodies say
    501: ("Unsupported transfer coding",),
    503: ("not_ready",),
}

MESSAGE = {"role": "user", "content": "What is Deep Learning?"}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {
    "type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}}}  # fmt: skip
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NATIVE = {"inputs": "What is Deep Learning?", "parameters": {
    "max_new_tokens": 4, "details": True, "do_sample": True, "seed": 7, "temperature": 0.7, "top_k": 5, "top_p": 0.9,
    "typical_p": 0.9, "repetition_penalty": 1.1, "frequency_penalty": 0.1, "stop": ["x"], "truncate": 100,
    "top_n_tokens": 2, "return_full_text": True, "best_of": 1}}  # fmt: skip
GUIDED = {"inputs": "a", "parameters": {"max_new_tokens": 4, "grammar": {"type": "json", "value": SCHEMA}}}
PATTERN = {"inputs": "a", "parameters": {"max_new_tokens": 4, "grammar": {"type": "regex", "value": "[ab]{1,3}"}}}
CHAT = {"messages": [{"role": "system", "content": "Be brief."}, MESSAGE], "max_tokens": 4, "temperature": 0.5,
        "logprobs": True, "top_logprobs": 2, "stop": ["x"], "n": 1, "seed": 1, "logit_bias": {"5": 1.0},
        "stream_options": {"include_usage": True}, "presence_penalty": 0.5}  # fmt: skip
TOOLS = {"messages": [MESSAGE], "max_tokens": 4, "tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": True}
CALLED = {"messages": [MESSAGE, {"role": "assistant", "content": None, "tool_calls": [
    {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "x"}]}],
    "max_tokens": 4}  # fmt: skip
FORMATTED = {"messages": [MESSAGE], "max_tokens": 4, "response_format": {
    "type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}}  # fmt: skip
COMPLETION = {"prompt": ["What is Deep Learning?", "Weir"], "max_tokens": 4, "temperature": 0.5, "logprobs": 2,
              "echo": True, "n": 1, "stop": "x", "seed": 1}  # fmt: skip
VERTEX = {"instances": [{"inputs": "a", "parameters": {"max_new_tokens": 4}}, {"messages": [MESSAGE], "max_tokens": 4}]}
# Every body is right, so that its neighbours lie deep in the server.
BODIES = [
    ("/", NATIVE), ("/", {**NATIVE, "stream": True}), ("/generate", NATIVE), ("/generate", GUIDED),
    ("/generate", PATTERN), ("/generate_stream", NATIVE), ("/generate_stream", GUIDED),
    ("/v1/chat/completions", CHAT), ("/v1/chat/completions", {**CHAT, "stream": True}),
    ("/v1/chat/completions", TOOLS), ("/v1/chat/completions", {**TOOLS, "stream": True}),
    ("/v1/chat/completions", CALLED), ("/v1/chat/completions", FORMATTED), ("/v1/completions", COMPLETION),
    ("/v1/completions", {**COMPLETION, "stream": True}), ("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 4}),
    ("/invocations", NATIVE), ("/invocations", CHAT), ("/invocations", COMPLETION), ("/vertex", VERTEX),
    ("/tokenize", NATIVE), ("/chat_tokenize", CHAT),
]  # fmt: skip
GETS = ["/", "/health", "/ping", "/info", "/metrics", "/v1/models", "/v1/models/x", "/docs", "/docs/", "/playground",
        "/api-doc/openapi.json"]  # fmt: skip
ODD_PATHS = ["/%00", "/generate%00", "/../../etc/passwd", "/docs/../../etc/passwd", "/docs/%2e%2e/%2e%2e/etc/passwd",
             "//generate", "/v1/models/%00", "/v1/models/" + "a" * 3000, "/%ff%fe", "/v1/models/%F0%9F%A6%A6", "*",
             "/?" + "a=b&" * 900, "/generate?inputs=%zz", "http://other/generate", "/docs/..%5c..%5cx", "/\u00e9",
             "/playground/../info", "/" + "x" * 9000, "", "/#a", "/;/", "/v1//models", "/docs/%"]  # fmt: skip
METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "get", "X" * 40, "PO ST", ""]
ODD_VALUES = [
    None, True, False, 0, 1, -1, 2, 1.0, 0.5, 1e-45, 1e308, -0.0, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 2**64,
    10**30, "", "x", "\x00", "\ud800", "\u202e", "\ufeff", "a" * 5000, "\U0001f9a6" * 300, "<|im_start|>", "{{ 7*7 }}",
    "{% for x in range(10**9) %}{% endfor %}", [], [[]], {}, {"": None}, [None], ["a"] * 50, [0] * 300,
    {"a": {"b": []}},
    "data:image/png;base64,AAAA", "![](http://127.0.0.1:1/x)", "Infinity", "1e999", "\r\nx-evil: 1", "(a+)+$", "(((((",
]  # fmt: skip
FIELDS = ["stream", "n", "best_of", "tools", "grammar", "echo", "suffix", "stop", "typo", "model", "response_format",
          "adapter_id", "decoder_input_details", "chat_template_kwargs", "min_p", "stop_token_ids", "tool_choice",
          "watermark"]  # fmt: skip
BAD_CHUNKS = [b"zz\r\n", b"-1\r\n", b"ffffffffffffffff\r\n", b"5\r\nab", b"\r\n\r\n",
              b"1;" + b"e" * 9000 + b"\r\na\r\n0\r\n\r\n", b"3\r\nabcXX0\r\n\r\n", b"0\r\nTrailer: x\r\n\r\n",
              b"0x3\r\nabc\r\n0\r\n\r\n", b"+3\r\nabc\r\n0\r\n\r\n"]  # fmt: skip
RAW = [b"", b"{", b"[", b"nul", b"NaN", b"[NaN]", b'{"inputs": NaN}', b'{"inputs": "a"', b'"', b"\x00", b"\xff\xfe{}",
       b'{"inputs":"\\ud800"}', b'{"inputs":"\xed\xa0\x80"}', b"[" * 100_000, b'{"a":' * 50_000, b"1" * 20_000,
       b'{"inputs":"a","inputs":"b"}', b"{}{}", b'{"inputs":"a"}garbage', b'{"inputs":"\\u0000"}', b"-", b"1e99999",
       b'{"messages":[],"inputs":1}', b"\xef\xbb\xbf{}", b'{"inputs":"a","parameters":{"seed":1e400}}']  # fmt: skip
ODD_HEADERS = [
    "content-type: text/plain", "content-type: application/json; charset=utf-16", "content-type: application/json;;;=",
    "content-type: \u00e9", "content-type:", "content-encoding: gzip", "accept-encoding: gzip;q=x",
    "expect: 100-continue",
    "expect: nonsense", "x: " + "y" * 20_000, "x" * 9000 + ": y", "traceparent: 00-zz-zz-zz",
    "traceparent: " + "0" * 900,
    "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "x-request-id: " + "a" * 500,
    "x-request-id: \x01\x02", "x-request-id: a\u00ff", "authorization: Bearer \u00ff", "authorization: " + "B" * 7000,
    "x-strict-status: true", "origin: null", "origin: " + "o" * 500, "host: ", "host: a, b", "connection: upgrade",
    "upgrade: websocket", "cookie: a=b; " * 50, "range: bytes=0-1", "bad header", "bad header : x", ": empty",
    "a\x00b: c",
    "te: trailers", "x-forwarded-proto: https", "forwarded: for=x", "content-length: 3", "if-none-match: *",
    "x_under_score: 1", "proxy-connection: keep-alive",
]  # fmt: skip
HTTP = re.compile(rb"HTTP/1\.[01] (\d{3}) [^\r\n]*\r\n")


@dataclass
class Sent:
    """One request as bytes, and how they are sent."""

    number: int
    manner: str
    chunks: list[bytes]
    pause_s: float = 0.0
    leave_after: int | None = None
    half_close: bool = False
    note: str = ""


def mutated(rng: random.Random, value, depth: int = 0):
    """A neighbour of a JSON value: one or a few places in it are something else."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        changed, name = dict(value), rng.choice(list(value))
        draw = rng.random()
        if draw < 0.15:
            del changed[name]
        elif draw < 0.25:
            changed[rng.choice(FIELDS)] = rng.choice(ODD_VALUES)
        else:
            changed[name] = mutated(rng, value[name], depth + 1)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        changed = list(value)
        changed[rng.randrange(len(value))] = mutated(rng, rng.choice(value), depth + 1)
        return changed
    return copy.deepcopy(rng.choice(ODD_VALUES))


def body_of(rng: random.Random, value) -> bytes:
    """A value as bytes; sometimes cut, doubled, in another encoding, or none at all."""
    draw = rng.random()
    if draw < 0.12:
        return rng.choice(RAW)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        value = mutated(rng, value)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    if draw < 0.18:
        return text[: rng.randrange(len(text) + 1)]
    if draw < 0.22:
        return gzip.compress(text)
    if draw < 0.25:
        return text.decode("utf-8", "surrogatepass").encode("utf-16", "surrogatepass")
    if draw < 0.29:
        place = rng.randrange(len(text) + 1)
        return text[:place] + rng.randbytes(3) + text[place:]
    if draw < 0.33 and text.startswith(b"{") and len(text) > 2:
        return text[:-1] + b"," + text[1:]
    return text


def chunked(rng: random.Random, body: bytes) -> bytes:
    """A body in chunks, good or bad."""
    if rng.random() < 0.5:
        half = len(body) // 2
        parts = [part for part in (body[:half], body[half:]) if part]
        return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    return rng.choice(BAD_CHUNKS)


def request_of(number: int) -> Sent:
    """The request of a number; the same whenever it is asked for."""
    rng = random.Random(SEED * 1_000_003 + number)
    path, value = rng.choice(BODIES)
    draw = rng.random()
    if draw < 0.60:  # a wrong body, sent well
        body = body_of(rng, value)
        return Sent(number, "body", [head("POST", path, [f"content-length: {len(body)}"]) + body], note=path)
    good = json.dumps(value).encode()
    if draw < 0.72:  # odd headers
        lines = rng.sample(ODD_HEADERS, rng.choice([1, 1, 2, 3]))
        lines += [line for line in lines if rng.random() < 0.2]
        if rng.random() < 0.03:
            lines += [f"h{index}: x" for index in range(200)]
        if not any(line.startswith("content-length") for line in lines):
            lines.append(f"content-length: {len(good)}")
        return Sent(number, "headers", [head("POST", path, lines) + good], note=str(lines)[:200])
    if draw < 0.79:  # odd paths and methods
        method = rng.choice(METHODS)
        target = rng.choice([rng.choice(ODD_PATHS), rng.choice(GETS), path])
        version = rng.choice(["HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTX/1.1", ""])
        line = head(method, target, ["content-length: 0"], version)
        return Sent(number, "routes", [line], note=f"{method} {target[:60]} {version}")
    if draw < 0.85:  # lengths that lie, chunks, both at once
        return lying(rng, number, path, good)
    if draw < 0.89:  # a slow sender
        whole = head("POST", path, [f"content-length: {len(good)}"]) + good
        pieces = [whole[index : index + 40] for index in range(0, len(whole), 40)]
        return Sent(number, "slow", pieces, pause_s=rng.choice([0.0, 0.005, 0.02]), note=path)
    if draw < 0.93:  # gone in the middle of the request
        whole = head("POST", path, [f"content-length: {len(good)}"]) + good
        cut = rng.randrange(1, len(whole))
        return Sent(number, "cut", [whole[:cut]], leave_after=rng.choice([0, None]), half_close=rng.random() < 0.5)
    if draw < 0.97:  # gone in the middle of the answer
        body = json.dumps({"inputs": "a", "parameters": {"max_new_tokens": 400, "ignore_eos": True}}).encode()
        path = rng.choice(["/generate_stream", "/generate"])
        whole = head("POST", path, [f"content-length: {len(body)}"]) + body
        half = rng.random() < 0.3
        return Sent(number, "leave", [whole], leave_after=rng.choice([0, 1, 400]), half_close=half, note=path)
    pair = rng.choice(["/tokenize", "/generate"]), {"inputs": "a", "parameters": {"max_new_tokens": 1}}
    body = json.dumps(pair[1]).encode()
    one = head("POST", pair[0], [f"content-length: {len(body)}"], close=False) + body
    return Sent(number, "pipelined", [one * rng.choice([2, 3]) + head("GET", "/health", [])])


def lying(rng: random.Random, number: int, path: str, good: bytes) -> Sent:
    """Lengths that are none, or are not true."""
    kind = rng.randrange(6)
    if kind == 0:
        wrong = rng.choice(["-1", "abc", "9" * 30, "+5", "0x10", "", "1, 2", " 3 ", str(len(good) - 5), "1_0"])
        return Sent(number, "length", [head("POST", path, [f"content-length: {wrong}"]) + good], note=wrong)
    if kind == 1:
        far = [f"content-length: {len(good) + 50}"]
        return Sent(number, "length", [head("POST", path, far) + good], half_close=True, note="too far")
    if kind == 2:
        both = ["transfer-encoding: chunked", f"content-length: {len(good)}"]
        return Sent(number, "length", [head("POST", path, both) + chunked(rng, good)], half_close=True, note="both")
    if kind == 3:
        odd = rng.choice(["chunked, chunked", "gzip, chunked", "identity", "Chunked ", "x", "chunked\x0b", "gzip"])
        bytes_ = head("POST", path, [f"transfer-encoding: {odd}"]) + chunked(rng, good)
        return Sent(number, "chunks", [bytes_], half_close=True, note=odd)
    bytes_ = head("POST", path, ["transfer-encoding: chunked"]) + chunked(rng, good)
    return Sent(number, "chunks", [bytes_], half_close=True)


def head(method: str, path: str, lines: list[str], version: str = "HTTP/1.1", *, close: bool = True) -> bytes:
    """The head of a request; a JSON content type unless a line says another."""
    every = ["host: weir", *lines]
    if not any(line.lower().startswith("content-type") for line in lines):
        every.append("content-type: application/json")
    if close:
        every.append("connection: close")
    return "\r\n".join([f"{method} {path} {version}", *every, "", ""]).encode("utf-8", "surrogatepass")


def answered(sent: Sent, address: tuple[str, int]) -> bytes:
    """Send a request in its manner; what came back until the server hung up or the client left.

    Raises:
        TimeoutError: nothing more came, and the server did not hang up.
    """
    with socket.create_connection(address, timeout=BOUND_S) as client:
        received = bytearray()
        try:
            for chunk in sent.chunks:
                client.sendall(chunk)
                time.sleep(sent.pause_s)
            if sent.half_close:
                client.shutdown(socket.SHUT_WR)
            if sent.manner == "cut" and not sent.half_close:
                return b""  # a request without its end: the server waits for it until the client leaves
            deadline = time.monotonic() + BOUND_S
            while sent.leave_after is None or len(received) < sent.leave_after:
                if not select.select([client], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    raise TimeoutError
                if not (fresh := client.recv(65536)):
                    break
                received += fresh
        except TimeoutError:
            raise
        except OSError:
            pass  # hung up while the rest of the request was on its way
        if sent.manner == "leave":
            with contextlib.suppress(OSError):
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        return bytes(received)


def fault_in(answer: bytes) -> str | None:
    """What is wrong with the bytes of one or several answers; None for nothing."""
    if not answer:
        return None  # it hung up: a request that is no HTTP has no answer
    if b"Traceback" in answer or b'File "/' in answer:
        return "a trace of code"
    rest = answer
    while rest:
        if (line := HTTP.match(rest)) is None:
            return "no HTTP"
        lines, separator, rest = rest.partition(b"\r\n\r\n")
        if not separator:
            return "no end of the headers"
        status, headers = int(line[1]), lines.lower().split(b"\r\n")[1:]
        if any(b":" not in one or min(one) < 32 for one in headers):
            return "a header that is none"
        body, rest = _body(headers, rest, empty=status in (204, 304) or status < 200)
        if body is None:
            return None  # cut by the client's leaving
        if status >= 500 and not any(said.encode() in body for said in DELIBERATE.get(status, ())):
            return f"status {status}"
        if b'"internal"' in body or b"Internal server error" in body:
            return "an internal error"
    return None


def _body(headers: list[bytes], rest: bytes, *, empty: bool) -> tuple[bytes | None, bytes]:
    """The body of the first answer in `rest`, and what follows it."""
    if empty:
        return b"", rest
    length = next((int(one.partition(b":")[2]) for one in headers if one.startswith(b"content-length:")), None)
    if length is not None:  # the answer to HEAD names a length and has no body
        return rest[:length], rest[length:]
    if b"transfer-encoding: chunked" not in headers:
        return rest, b""
    body = b""
    while True:
        size, separator, rest = rest.partition(b"\r\n")
        if not separator:
            return None, b""
        count = int(size, 16)
        body, rest = body + rest[:count], rest[count + 2 :]
        if count == 0:
            return body, rest


def metric(server, name: str) -> float:
    lines = server.get("/metrics").text.splitlines()
    return next((float(line.split(" ")[1]) for line in lines if line.split(" ")[0] == name), 0.0)


def wait_idle(server) -> None:
    deadline = time.monotonic() + 20
    names = ("weir_kv_blocks_used", "tgi_batch_current_size", "tgi_queue_size")
    while any(values := [metric(server, name) for name in names]):
        assert time.monotonic() < deadline, dict(zip(names, values, strict=True))
        time.sleep(0.05)


def run(numbers: range, address: tuple[str, int]) -> tuple[list[str], dict[str | int, int]]:
    """Send the requests of these numbers, some at a time; what was wrong, and how many there were.

    They are counted by manner and by status.
    """
    lock, faults, counts = threading.Lock(), [], {}

    def one(number: int) -> None:
        sent = request_of(number)
        try:
            fault = fault_in(answer := answered(sent, address))
        except TimeoutError:
            fault, answer = f"no answer in {BOUND_S} s", b""
        status = HTTP.match(answer)
        with lock:
            counts[sent.manner] = counts.get(sent.manner, 0) + 1
            name = "hung up" if status is None else int(status[1])
            counts[name] = counts.get(name, 0) + 1
            if fault is not None:
                request = b"".join(sent.chunks)[:600]
                faults.append(
                    f"request {number} ({sent.manner} {sent.note}): {fault}\n  {request!r}\n  {answer[:300]!r}"
                )

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(one, numbers))
    return faults, counts


def fit(server, address) -> tuple[int, int, int]:
    """Once idle: the worker's memory, open files and threads."""
    wait_idle(server)
    worker: psutil.Process = server.processes()[1]
    deadline = time.monotonic() + 10
    while worker.num_fds() > 40 and time.monotonic() < deadline:  # connections that clients left are being closed
        time.sleep(0.1)
    return worker.memory_info().rss, worker.num_fds(), worker.num_threads()


def test_no_request_harms_the_server(start, capsys):
    server = start(plain=[*SMALL, "--max-concurrent-requests=64", "--max-total-tokens=512"]).wait_ready()
    host, _, port = server.url.removeprefix("http://").partition(":")
    address = (host, int(port))
    family = [process.pid for process in server.processes()[:3]]
    alone = {"inputs": "What is Deep Learning?", "parameters": {"max_new_tokens": 12}}
    expected = server.post("/generate", alone).json()
    warm = max(100, REQUESTS // 5)
    faults, counts = run(range(warm), address)
    memory, files, threads = fit(server, address)
    more, more_counts = run(range(warm, REQUESTS), address)
    faults += more
    memory_after, files_after, threads_after = fit(server, address)
    total = {name: counts.get(name, 0) + more_counts.get(name, 0) for name in {**counts, **more_counts}}
    with capsys.disabled():  # what was sent is a finding, too
        sys.stdout.write(
            f"\nfuzzed requests: {total}, faults: {len(faults)}; "
            f"{memory / 1e6:.1f} MB, {files} files, {threads} threads became "
            f"{memory_after / 1e6:.1f} MB, {files_after} files, {threads_after} threads\n"
        )
    # The mix reaches the depths, and is refused at every depth.
    assert total[200] > REQUESTS / 10, total
    assert {400, 404, 405, 415, 422} <= total.keys(), total
    assert not faults, f"{len(faults)} faults; the first:\n" + "\n".join(faults[:10])
    assert [process.pid for process in server.processes()[:3]] == family
    assert server.post("/generate", alone).json() == expected
    assert files_after <= files + 3, f"{files} open files became {files_after}"
    assert threads_after <= MOST_THREADS, f"{threads} threads became {threads_after}"
    assert memory_after - memory < 24e6, f"{memory / 1e6:.1f} MB became {memory_after / 1e6:.1f} MB"
    # Every permit is back: as many requests as there are permits are all taken in.
    with ThreadPoolExecutor(64) as pool:
        body = {"inputs": "a", "parameters": {"max_new_tokens": 2}}
        statuses = list(pool.map(lambda _: server.post("/generate", body).status_code, range(64)))
    assert statuses == [200] * 64
    server.stop()
    log = "\n".join(server.remaining_lines())
    assert "Traceback" not in log, log[log.index("Traceback") - 2000 :][:6000]
    assert " ERROR " not in log, next(line for line in server.lines if " ERROR " in line)


@pytest.mark.parametrize(
    "chunks", [b"0\r\nTrailer: x\r\n\r\n", b"+3\r\nabc\r\n0\r\n\r\n", b"3\r\nabcXX0\r\n\r\n", b"-1\r\n"]
)
def test_malformed_chunks_are_the_clients_fault(server, chunks):
    host, _, port = server.url.removeprefix("http://").partition(":")
    sent = Sent(0, "chunks", [head("POST", "/tokenize", ["transfer-encoding: chunked"]) + chunks], half_close=True)
    answer = answered(sent, (host, int(port)))
    assert answer.startswith(b"HTTP/1.1 400 "), answer


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (b"", None),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", None),
        (b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 404 NOT FOUND\r\ncontent-length: 0\r\n\r\n", None),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", None),
        (b'HTTP/1.1 503 X\r\n\r\n{"error_type":"not_ready"}', None),
        (b"HTTP/1.1 503 X\r\n\r\n", "status 503"),
        (b"HTTP/1.1 500 X\r\ncontent-length: 2\r\n\r\n{}", "status 500"),
        (b'HTTP/1.1 500 X\r\n\r\n{"error":"Incomplete generation"}', "status 500"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\nHTTP/1.1 500 X\r\n\r\n", "status 500"),
        (b'HTTP/1.1 200 OK\r\n\r\ndata: {"error":"Internal server error"}\n\n', "an internal error"),
        (b"HTTP/1.1 200 OK\r\n\r\nTraceback (most recent call last)", "a trace of code"),
        (b"garbage", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\ncontent-le", "no end of the headers"),
        (b"HTTP/1.1 200 OK\r\nno header\r\n\r\n", "a header that is none"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nabc", "no HTTP"),
    ],
)
def test_faults_are_seen(answer, fault):
    assert fault_in(answer) == fault


def test_a_number_always_makes_the_same_request():
    assert [request_of(number) for number in range(50)] == [request_of(number) for number in range(50)]
