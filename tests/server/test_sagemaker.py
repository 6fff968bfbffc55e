"""A real server, started as SageMaker starts the image: its entry point, the word `serve`, and only variables."""

import json
import re
import signal
import time
from collections.abc import Callable

import psutil
import pytest
import requests
from server.conftest import ROOT, Server

pytestmark = pytest.mark.server

ENTRY_POINT = ("-IS", str(ROOT / "container" / "entrypoint.py"))
SESSION = "X-Amzn-SageMaker-Session-Id"
ASKED = {"inputs": "a", "parameters": {"max_new_tokens": 6, "ignore_eos": True, "return_full_text": False}}
LONG = {"inputs": "a", "parameters": {"max_new_tokens": 4000, "ignore_eos": True, "details": True}}
CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4, "model": ""}


@pytest.fixture
def serve(model_directory):
    """A function that starts the server with more variables; all of them end with the test."""
    servers: list[Server] = []

    def start(**environ: str) -> Server:
        said = {
            "WEIR_HOSTNAME": "127.0.0.1", "DEVICE": "cpu", "KV_CACHE_MEMORY": "16MiB", "MAX_BATCH_SIZE": "8",
            "MAX_BATCH_PREFILL_TOKENS": "256",
        }  # fmt: skip
        platform = {
            "HF_MODEL_ID": str(model_directory), "SM_NUM_GPUS": "", "HF_MODEL_QUANTIZE": "", "SAGEMAKER_PROGRAM": "",
            "SAGEMAKER_REGION": "eu-west-1", "SAGEMAKER_BIND_TO_PORT": "0", "PORT": "80",
        }  # fmt: skip
        servers.append(Server(["serve"], {**said, **platform, **environ}, ENTRY_POINT))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def invoke(server, body, **headers) -> requests.Response:
    return server.post("/invocations", body, headers={name.replace("_", "-"): value for name, value in headers.items()})


def wait_leased(server, enough: Callable[[int], bool]) -> None:
    """Until a step's numbers say that sessions keep enough blocks, or few enough."""
    limit = time.monotonic() + 20
    while not enough(int(re.search(r"^weir_kv_blocks_leased (\d+)", server.get("/metrics").text, re.MULTILINE)[1])):
        assert time.monotonic() < limit
        assert server.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1}}).status_code == 200


def test_the_platforms_whole_conversation(serve):
    server = serve().wait_listening()
    for method in ("GET", "POST"):
        assert requests.request(method, server.url + "/ping", timeout=2).status_code in (200, 503)
    server.wait_line("Ready")
    for method in ("GET", "HEAD", "POST"):
        answer = requests.request(method, server.url + "/ping", timeout=2)
        assert (answer.status_code, answer.content) == (200, b"")
    assert "gunicorn" in " ".join(psutil.Process(server.process.pid).cmdline()), "the entry point has become the server"
    text = invoke(server, ASKED, X_Amzn_SageMaker_Inference_Id="order-7")
    assert text.headers["x-request-id"] == "order-7"
    [answer] = text.json()
    alone = requests.post(
        server.url + "/invocations",
        data=(json.dumps(ASKED) + "\n") * 2,
        headers={"Content-Type": "application/jsonlines", "Accept": "application/jsonlines"},
        timeout=30,
    )
    assert [json.loads(line) for line in alone.text.splitlines()] == [[answer], [answer]]
    plain = invoke(server, ASKED, Accept="text/plain")
    assert (plain.text, plain.headers["content-type"]) == (answer["generated_text"], "text/plain; charset=utf-8")
    streamed = invoke(server, ASKED, Accept="text/event-stream")
    assert streamed.headers["content-type"] == "text/event-stream"
    assert streamed.text.endswith("\n\n")
    route = "route=/v1/chat/completions"
    assert invoke(server, CHAT, X_Amzn_SageMaker_Custom_Attributes=route).json()["object"] == "chat.completion"
    assert invoke(server, CHAT, X_Amzn_SageMaker_Adapter_Identifier="mine").status_code == 404
    assert server.get("/execution-parameters").json()["MaxConcurrentTransforms"] == 8
    family = server.processes()
    server.signal(signal.SIGTERM)
    assert server.wait_exit() == 0
    assert not psutil.wait_procs(family, timeout=10)[1]


def test_a_session_from_its_beginning_to_its_end(serve):
    server = serve(SAGEMAKER_SESSIONS_EXPIRATION="600").wait_ready()
    begun = invoke(server, {"requestType": "NEW_SESSION"}, X_Amzn_SageMaker_Session_Id="NEW_SESSION")
    session = re.fullmatch(r"([\w-]+); Expires=[\d:T-]+Z", begun.headers["X-Amzn-SageMaker-New-Session-Id"])[1]
    chat = {**CHAT, "messages": [{"role": "user", "content": "a long story " * 20}], "temperature": 0}
    first, again = (invoke(server, chat, X_Amzn_SageMaker_Session_Id=session).json() for _ in range(2))
    assert first["choices"] == again["choices"]
    wait_leased(server, lambda blocks: blocks > 10)
    closed = invoke(server, {"requestType": "CLOSE"}, X_Amzn_SageMaker_Session_Id=session)
    assert closed.headers["X-Amzn-SageMaker-Closed-Session-Id"] == session
    over = invoke(server, chat, X_Amzn_SageMaker_Session_Id=session)
    assert (over.status_code, over.json()["error_type"]) == (400, "unknown_session")
    wait_leased(server, lambda blocks: blocks == 0)


def test_a_long_answer_comes_back_before_the_platform_gives_up(serve):
    server = serve(RESPONSE_DEADLINE="0.5", STREAM_DEADLINE="0.5").wait_ready()
    whole = invoke(server, LONG)
    assert (whole.status_code, whole.headers["x-response-cut"]) == (200, "deadline")
    [answer] = whole.json()
    assert answer["details"]["finish_reason"] == "length"
    assert 0 < answer["details"]["generated_tokens"] < 4000
    *_, last = invoke(server, {**LONG, "stream": True}).text.removesuffix("\n\n").split("\n\n")
    event = json.loads(last.removeprefix("data: "))
    assert event["details"]["finish_reason"] == "length"
    assert event["generated_text"]


def test_sigterm_lets_a_stream_end(serve):
    server = serve().wait_ready()
    asked = {"inputs": "a", "stream": True, "parameters": {"max_new_tokens": 400, "ignore_eos": True}}
    with server.post("/invocations", asked, stream=True) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.signal(signal.SIGTERM)
        *_, last = (line for line in lines if line)
    assert json.loads(last.removeprefix(b"data: "))["generated_text"]
    assert server.wait_exit() == 0
