"""The real server behind the emulator: what only a decoder that makes tokens can show."""

import dataclasses
import json
import re
import subprocess
import sys
import time
from datetime import UTC, datetime

import openai
import pytest
from botocore.exceptions import EventStreamError
from deploy.conftest import LIMITS, PATIENCE_S, bytes_of, invoke, stream
from models.lora_files import random_adapter
from server.conftest import ROOT

from scripts.emulator.containers import Attached
from scripts.emulator.tokens import make_token

pytestmark = pytest.mark.server

LONG = {"inputs": "a", "parameters": {"max_new_tokens": 4000, "ignore_eos": True}}  # not meant to end
SHORT = {"inputs": "a", "parameters": {"max_new_tokens": 4, "ignore_eos": True}}


@pytest.fixture
def behind(start, emulate):
    """A server, and an emulator in front of it."""

    def behind(**deployment):
        server = start().wait_ready()
        return server, emulate(lambda: Attached(server.url), **deployment)

    return behind


def running(server) -> int:
    found = re.search(r"^tgi_batch_current_size (\d+)", server.get("/metrics").text, re.MULTILINE)
    return int(found[1]) if found else 0


def wait_idle(server) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while running(server):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_tokens_arrive_while_others_are_made_and_hanging_up_ends_them(behind, client_of):
    server, emulator = behind()
    answer = stream(client_of(emulator), **LONG, stream=True)
    parts = bytes_of(answer["Body"])
    text = b""
    while text.count(b"\n\n") < 3:
        text += next(parts)
    events = [json.loads(event.removeprefix(b"data: ")) for event in text.split(b"\n\n")[:3]]
    assert [event["index"] for event in events] == [1, 2, 3]
    assert running(server) == 1  # three tokens are here, and the answer is being made
    parts.close()
    wait_idle(server)
    assert not emulator.journal.breaches


def test_the_deadline_of_a_whole_answer_ends_its_generation(behind, client_of):
    server, emulator = behind(limits=dataclasses.replace(LIMITS, invoke_s=0.5))
    client = client_of(emulator)
    with pytest.raises(client.exceptions.ModelError, match="Your invocation timed out"):
        invoke(client, **LONG)
    wait_idle(server)


def test_a_refusal_keeps_its_words_and_an_answer_its_shape(behind, client_of):
    _, emulator = behind()
    client = client_of(emulator)
    with pytest.raises(client.exceptions.ModelError) as caught:
        invoke(client, inputs="a", parameters={"max_new_tokens": 0})
    assert caught.value.response["OriginalStatusCode"] == 422
    assert json.loads(caught.value.response["OriginalMessage"])["error_type"] == "validation"
    with invoke(client, **SHORT)["Body"] as body:
        assert list(json.load(body)[0]) == ["generated_text"]
    answer = stream(client, **SHORT, stream=True)
    assert b"".join(bytes_of(answer["Body"])).endswith(b"\n\n")
    assert answer["ContentType"] == "text/event-stream"


def test_a_session_is_opened_used_whole_and_streamed_and_closed(behind, client_of):
    _, emulator = behind(instances=1)
    client = client_of(emulator)
    opened = invoke(client, SessionId="NEW_SESSION", requestType="NEW_SESSION")
    opened["Body"].close()
    session = opened["NewSessionId"].partition(";")[0]
    invoke(client, SessionId=session, **SHORT)["Body"].close()
    assert b"".join(bytes_of(stream(client, SessionId=session, **SHORT, stream=True)["Body"])).endswith(b"\n\n")
    closed = invoke(client, SessionId=session, requestType="CLOSE")
    closed["Body"].close()
    assert closed["ClosedSessionId"] == session
    with pytest.raises(client.exceptions.ModelError) as caught:
        invoke(client, SessionId=session, **SHORT)
    assert caught.value.response["OriginalStatusCode"] == 400
    assert not emulator.journal.breaches


def test_a_route_of_the_openai_api_and_an_empty_model(behind, client_of):
    _, emulator = behind()
    client = client_of(emulator)
    asked = {"model": "", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    with invoke(client, CustomAttributes="route=/v1/chat/completions", **asked)["Body"] as body:
        assert json.load(body)["object"] == "chat.completion"
    base = f"{emulator.url}/endpoints/weir/openai/v1"
    with openai.OpenAI(base_url=base, api_key=make_token(datetime.now(UTC)), max_retries=0) as openai_client:
        chunks = list(openai_client.chat.completions.create(**asked, stream=True))
    assert chunks[0].object == "chat.completion.chunk"
    assert len(chunks) >= 2


def test_a_server_that_is_killed_breaks_its_stream(behind, client_of):
    server, emulator = behind(limits=dataclasses.replace(LIMITS, ping_interval_s=60.0))
    parts = bytes_of(stream(client_of(emulator), **LONG, stream=True)["Body"])
    next(parts)
    for process in server.processes():
        process.kill()
    with pytest.raises(EventStreamError, match="ModelStreamError"):
        list(parts)


def test_the_command_serves_this_project_and_our_own_client(model_directory, tmp_path):
    """As the help's first example, with `sagemaker/invoke.py` for a client."""
    small = ["--env=KV_CACHE_MEMORY=16MiB", "--env=OMP_NUM_THREADS=1", "--env=OMP_WAIT_POLICY=passive"]
    client = [sys.executable, "sagemaker/invoke.py", "--stream", "--max-new-tokens=4", "Hello"]
    done = subprocess.run(
        [sys.executable, "scripts/sagemaker_emulator.py", "--port=0", *small, "--", *client],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert re.search(r"weir/1 stopped in [\d.]+ s, exit code 0", done.stderr)


def test_an_adapter_component_answers_for_itself(start, emulate, client_of, model_directory, tmp_path):
    french = str(random_adapter(model_directory, tmp_path / "fr", 1))
    server = start(environ={"SAGEMAKER_MAX_NUMBER_OF_ADAPTERS_IN_MEMORY": "1"}).wait_ready()
    emulator = emulate(lambda: Attached(server.url), components=("base",), adapters={"french": french})
    client = client_of(emulator)

    def told(component: str) -> str:
        answer = invoke(client, **SHORT, InferenceComponentName=component)
        return json.loads(answer["Body"].read())[0]["generated_text"]

    assert told("french") != told("base")
    assert told("base") == server.post("/", SHORT).json()[0]["generated_text"]
    named = {**SHORT, "parameters": {**SHORT["parameters"], "adapter_id": "french"}}
    assert told("french") == server.post("/", named).json()[0]["generated_text"]
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "model": ""}
    answer = invoke(client, **chat, InferenceComponentName="french")
    assert json.loads(answer["Body"].read())["model"] == "french"
    assert not emulator.journal.breaches
