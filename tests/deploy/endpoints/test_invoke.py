"""invoke.py as real boto3 sends it: what is asked, how answers are read, and that nothing is sent twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from deploy.endpoints.conftest import REGION, event_stream

ROOT = Path(__file__).parents[3]
NEW = "abc; Expires=2026-11-21T10:00:00Z"


@pytest.fixture
def invoke(run, runtime):
    pytest.importorskip("boto3", reason="boto3 is not installed")

    def invoke(*arguments, **keywords):
        return run("invoke", "--region", REGION, *arguments, aws=runtime, **keywords)

    return invoke


def test_a_question_goes_to_the_endpoint_and_its_answer_is_printed(invoke, runtime):
    runtime.answers.append((200, {"Content-Type": "application/json"}, b'[{"generated_text": "\xc3\xa9"}]'))
    assert json.loads(invoke("--name", "mine", "--inference-id", "id-1", "Hello").out) == [{"generated_text": "é"}]
    [asked] = runtime.asked
    assert asked.path == "/endpoints/mine/invocations"
    assert asked.body == {"inputs": "Hello", "parameters": {"max_new_tokens": 100}, "stream": False}
    assert asked.headers["x-amzn-sagemaker-inference-id"] == "id-1"
    assert "x-amzn-sagemaker-session-id" not in asked.headers


def test_a_component_is_named_in_the_request(invoke, runtime):
    runtime.answers.append((200, {}, b"{}"))
    invoke("--component", "french", "--chat", "Bonjour")
    [asked] = runtime.asked
    assert asked.headers["x-amzn-sagemaker-inference-component"] == "french"
    assert asked.body["messages"] == [{"role": "user", "content": "Bonjour"}]


def test_a_session_is_begun_used_and_closed(invoke, runtime):
    runtime.answers += [
        (200, {"X-Amzn-SageMaker-New-Session-Id": NEW}, b""),
        (200, {}, b"[]"),
        (200, {"X-Amzn-SageMaker-Closed-Session-Id": "abc"}, b""),
    ]
    assert invoke("--session", "NEW_SESSION").out == "abc\n"
    invoke("--session", "abc", "Hello")
    assert invoke("--close", "abc").out == "closed abc\n"
    begun, used, closed = runtime.asked
    assert begun.body == {"requestType": "NEW_SESSION"}
    assert closed.body == {"requestType": "CLOSE"}
    sessions = [asked.headers["x-amzn-sagemaker-session-id"] for asked in (begun, used, closed)]
    assert sessions == ["NEW_SESSION", "abc", "abc"]


@pytest.mark.parametrize("status", [500, 503, 429])
def test_nothing_is_sent_twice(status, invoke, runtime):
    runtime.answers += [(status, {}, b'{"message": "busy"}')] * 3
    assert "busy" in invoke("Hello", expect=1).err
    assert len(runtime.asked) == 1


def test_the_containers_own_words_are_shown(invoke, runtime):
    message = {"OriginalStatusCode": 422, "OriginalMessage": '{"error":"`inputs` must be non empty"}', "Message": "x"}
    headers = {"Content-Type": "application/json", "X-Amzn-ErrorType": "ModelError"}
    runtime.answers.append((424, headers, json.dumps(message).encode()))
    assert invoke("", expect=1).err == '{"error":"`inputs` must be non empty"}\n'


def test_an_answer_of_the_queue_is_waited_for_in_s3(invoke, runtime):
    missing = (404, {}, b"<Error><Code>NoSuchKey</Code></Error>")
    places = {
        "X-Amzn-SageMaker-OutputLocation": "s3://answers/1.out",
        "X-Amzn-SageMaker-FailureLocation": "s3://answers/failures/1.out",
    }
    accepted = (202, places, b'{"InferenceId": "1"}')
    runtime.answers += [accepted, missing, missing, (200, {}, b'[{"generated_text": "late"}]')]
    done = invoke("--async", "--poll", "0.01", "Hello")
    assert json.loads(done.out) == [{"generated_text": "late"}]
    assert [asked.path.partition("?")[0] for asked in runtime.asked] == [
        "/endpoints/weir/async-invocations", "/answers/1.out", "/answers/failures/1.out", "/answers/1.out",
    ]  # fmt: skip
    assert runtime.asked[0].body["inputs"] == "Hello"
    runtime.answers += [accepted, missing, (200, {}, b'{"error": "too long"}')]
    assert "too long" in invoke("--async", "--poll", "0.01", "Hello", expect=1).err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "a prompt is needed"),
        (("--session", "NEW_SESSION", "Hello"), "stands alone"),
        (("--async", "--stream", "Hello"), "--async goes with"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, words, run):
    assert words in run("invoke", *arguments, expect=2).err


def test_a_stream_is_read_however_it_is_cut(load):
    events = load("invoke").events
    whole = (
        'data:{"token":{"text":"é\U0001f600"}}\n\n: ping\n\ndata: {"token":{"text":"b"}}\n\ndata: [DONE]\n\n'.encode()
    )
    expected = [{"token": {"text": "é\U0001f600"}}, {"token": {"text": "b"}}]
    for size in range(1, len(whole)):
        parts = [whole[start : start + size] for start in range(0, len(whole), size)]
        assert list(events(parts)) == expected


@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [
        ((), [{"token": {"text": "Sé", "special": False}}, {"token": {"text": "</s>", "special": True}}]),
        (("--chat",), [{"choices": [{"delta": {"role": "assistant"}}]}, {"choices": [{"delta": {"content": "Sé"}}]}]),
    ],
)
def test_a_stream_is_printed(arguments, tokens, invoke, runtime):
    text = "".join(f"data: {json.dumps(token, ensure_ascii=False)}\n\n" for token in tokens) + "data: [DONE]\n\n"
    runtime.answers.append(
        (200, {"Content-Type": "application/vnd.amazon.eventstream"}, event_stream(text.encode(), 7))
    )
    assert invoke("--stream", *arguments, "Hello").out == "Sé\n"
    [asked] = runtime.asked
    assert asked.path == "/endpoints/weir/invocations-response-stream"
    assert asked.body["stream"] is True


def test_an_error_in_a_stream_is_one(invoke, runtime):
    frames = event_stream(b'data: {"error": "out of time", "error_type": "generation"}\n\n', 9)
    runtime.answers.append((200, {"Content-Type": "application/vnd.amazon.eventstream"}, frames))
    assert "out of time" in invoke("--stream", "Hello", expect=1).err


def test_without_a_region_two_things_to_do_are_named():
    pytest.importorskip("boto3", reason="boto3 is not installed")
    command = [sys.executable, ROOT / "sagemaker" / "invoke.py", "Hello"]
    environment = {"PATH": os.environ["PATH"], "HOME": "/nowhere", "AWS_EC2_METADATA_DISABLED": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "NoRegionError" in done.stderr
    assert "sagemaker_emulator.py -- " in done.stderr
