"""Unmodified boto3 and openai clients, the emulator, and a container that does what each test asks of it."""

import dataclasses
import json
import re
import socket
import threading
from datetime import UTC, datetime
from pathlib import Path

import openai
import pytest
import requests
from botocore.exceptions import ClientError, EventStreamError, ReadTimeoutError
from deploy.conftest import LIMITS, PATIENCE_S, bytes_of, invoke, stream

from scripts.emulator.containers import Attached
from scripts.emulator.tokens import make_token

TYPE = {"Content-Type": "text/event-stream"}


def refusal(call, *arguments, **parameters) -> dict:
    """The error of a call, as boto3 parsed it."""
    with pytest.raises(ClientError) as caught:
        call(*arguments, **parameters)
    return caught.value.response


def read(response) -> bytes:
    with response["Body"] as body:
        return body.read()


def test_a_whole_answer_comes_back_byte_for_byte(emulate, client_of, stand_in):
    client = client_of(emulate())
    body = bytes(range(256)) * 100
    answer = client.invoke_endpoint(EndpointName="weir", Body=body, ContentType="application/x-thing")
    assert read(answer) == body
    assert answer["ContentType"] == "application/json"
    assert answer["InvokedProductionVariant"] == "AllTraffic"
    assert stand_in.received[0][0] == "/invocations"
    assert stand_in.received[0][2] == body


def test_only_the_platforms_headers_reach_the_container(emulate, client_of, stand_in):
    client = client_of(emulate())
    client.meta.events.register(
        "before-send.sagemaker-runtime.InvokeEndpoint",
        lambda request, **_: request.headers.update(
            {"X-Mine": "secret", "Cookie": "a=b", "X-Forwarded-For": "1.2.3.4"}
        ),
    )
    read(invoke(client, Accept="application/json", CustomAttributes="route=/v1/models", InferenceId="me-1"))
    headers = stand_in.received[0][1]
    length = len(stand_in.received[0][2])
    assert headers == {
        "host": stand_in.url.removeprefix("http://"),
        "content-length": str(length),
        "content-type": "application/json",
        "accept": "application/json",
        "x-amzn-sagemaker-custom-attributes": "route=/v1/models",
        "x-amzn-sagemaker-inference-id": "me-1",
    }


def test_accept_travels_under_another_name_in_a_streaming_call(emulate, client_of, stand_in):
    stand_in.go.release()
    answer = stream(client_of(emulate()), parts=["a\n"], Accept="text/event-stream")
    assert b"".join(bytes_of(answer["Body"])) == b"a\n"
    headers = stand_in.received[0][1]
    assert headers["accept"] == "text/event-stream"
    assert not {name for name in headers if name.startswith("x-amzn")}


def test_only_the_platforms_headers_come_back(emulate, client_of):
    sent = {"X-Compute-Time": "1", "X-Amzn-SageMaker-Custom-Attributes": "left=3", "Set-Cookie": "a=b"}
    emulator = emulate()
    answer = invoke(client_of(emulator), headers=sent, say="{}")
    read(answer)
    assert answer["CustomAttributes"] == "left=3"
    got = answer["ResponseMetadata"]["HTTPHeaders"]
    assert not {"x-compute-time", "set-cookie"} & got.keys()
    assert any("x-compute-time" in line and "note" in line for line in emulator.journal.lines)


def test_custom_attributes_beyond_the_limit_are_refused_one_way_and_dropped_the_other(emulate, client_of):
    emulator = emulate()
    client = client_of(emulator)
    error = refusal(invoke, client, CustomAttributes="x" * 1025)
    assert error["Error"]["Code"] == "ValidationError"
    assert "1024" in error["Error"]["Message"]
    answer = invoke(client, say="{}", headers={"X-Amzn-SageMaker-Custom-Attributes": "x" * 1025})
    read(answer)
    assert "CustomAttributes" not in answer
    assert "dropped" in emulator.journal.breaches[0]


@pytest.mark.parametrize("status", [400, 422, 429, 500, 503, 302])
def test_every_failure_of_the_container_is_a_424_with_its_own_words_inside(emulate, client_of, stand_in, status):
    client = client_of(emulate(), retries={"total_max_attempts": 3})
    said = '{"error":"no","error_type":"validation"}'
    for call in (invoke, stream):
        error = refusal(call, client, status=status, say=said)
        assert error["ResponseMetadata"]["HTTPStatusCode"] == 424
        assert error["Error"]["Code"] == "ModelError"
        assert error["OriginalStatusCode"] == status
        assert error["OriginalMessage"] == said
        assert error["LogStreamArn"].startswith(
            "arn:aws:logs:us-east-1:111122223333:log-group:/aws/sagemaker/Endpoints/weir"
        )
        assert f"error ({status}) from primary" in error["Error"]["Message"]
    assert len(stand_in.received) == 2  # a 429 or 503 of ours is no throttling to boto3: nothing is sent again


def test_parts_arrive_as_they_are_made_and_end_anywhere(emulate, client_of, stand_in):
    """The container makes each piece only after the client has all of the one before."""
    pieces = [f'data: {{"n":{n},"text":"ä€\U0001f600"}}\n\n' for n in range(6)]
    answer = stream(client_of(emulate(largest_part=7)), parts=pieces, headers=TYPE)
    assert answer["ContentType"] == "text/event-stream"
    assert answer["InvokedProductionVariant"] == "AllTraffic"
    parts = []
    whole = "".join(pieces).encode()
    released = 0
    for data in bytes_of(answer["Body"]):
        parts.append(data)
        got = b"".join(parts)
        assert whole.startswith(got)
        if released < len(pieces) and got == "".join(pieces[: released + 1]).encode():
            stand_in.go.release()
            released += 1
    assert got == whole
    assert max(map(len, parts)) <= 7
    with pytest.raises(UnicodeDecodeError):  # a client that decodes parts one by one is found out
        [part.decode() for part in parts]


def test_a_container_that_breaks_off_gives_a_model_stream_error(emulate, client_of, stand_in):
    answer = stream(client_of(emulate()), parts=["data: 1\n\n", "BREAK"], headers=TYPE)
    stand_in.go.release()
    got = []
    with pytest.raises(EventStreamError) as caught:
        got.extend(bytes_of(answer["Body"]))
    assert b"".join(got) == b"data: 1\n\n"
    assert caught.value.response["Error"]["Code"] == "ModelStreamError"
    assert "reset or closed" in caught.value.response["Error"]["Message"]


def test_a_stream_beyond_its_deadline_gives_a_model_stream_error(emulate, client_of):
    emulator = emulate(limits=dataclasses.replace(LIMITS, stream_s=0.5))
    answer = stream(client_of(emulator), parts=["data: 1\n\n", "never"], headers=TYPE)
    with pytest.raises(EventStreamError, match="did not complete sending the inference response in the allotted time"):
        list(bytes_of(answer["Body"]))


def test_the_platforms_own_failure_can_be_tried(emulate, client_of, stand_in):
    answer = stream(client_of(emulate(break_streams_after=2, largest_part=1)), parts=["abcdef\n"] * 4000, headers=TYPE)
    got = []
    with pytest.raises(EventStreamError) as caught:
        got.extend(bytes_of(answer["Body"]))
    assert caught.value.response["Error"]["Code"] == "InternalStreamFailure"
    stand_in.push_until_gone()


def test_a_whole_answer_has_sixty_seconds_whatever_the_client_allows(emulate, client_of, stand_in):
    emulator = emulate(limits=dataclasses.replace(LIMITS, invoke_s=0.3))
    error = refusal(invoke, client_of(emulator), wait=True)
    assert error["Error"]["Code"] == "ModelError"
    assert error["OriginalStatusCode"] == 0
    assert error["OriginalMessage"].startswith("Your invocation timed out while waiting for a response")


def test_boto3_sends_a_slow_request_again_unless_told_not_to(emulate, client_of, stand_in):
    """The trap: one call of the client's, and the container computes it three times."""
    emulator = emulate()
    patient = client_of(emulator, read_timeout=0.5, retries={"total_max_attempts": 1})
    with pytest.raises(ReadTimeoutError):
        invoke(patient, wait=True)
    assert emulator.fleet.invocations == 1
    default = client_of(emulator, read_timeout=0.5, retries={"mode": "standard"})
    with pytest.raises(ReadTimeoutError):
        invoke(default, wait=True)
    assert emulator.fleet.invocations == 1 + 3


def test_a_client_that_hangs_up_in_a_stream_ends_it_in_the_container(emulate, client_of, stand_in):
    answer = stream(client_of(emulate()), parts=[f"data: {n}\n\n" for n in range(4000)], headers=TYPE)
    parts = bytes_of(answer["Body"])
    next(parts)
    parts.close()
    stand_in.push_until_gone()


def test_a_client_that_hangs_up_before_an_answer_hangs_up_on_the_container(emulate, client_of):
    """With a bare socket for a container, which sees the end of its connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ended = threading.Event()

        def serve():
            while True:
                connection, _ = listener.accept()
                with connection:
                    if connection.recv(65536).startswith(b"GET /ping"):
                        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
                        continue
                    while connection.recv(65536):
                        pass
                    ended.set()
                    return

        thread = threading.Thread(target=serve)
        thread.start()
        port = listener.getsockname()[1]
        limits = dataclasses.replace(LIMITS, ping_interval_s=60.0)
        emulator = emulate(lambda: Attached(f"127.0.0.1:{port}"), limits=limits)
        with pytest.raises(ReadTimeoutError):
            invoke(client_of(emulator, read_timeout=0.5))
        assert ended.wait(PATIENCE_S)
        thread.join()


def test_twenty_five_megabytes_and_not_a_byte_more(emulate, client_of, stand_in):
    client = client_of(emulate())
    largest = 25 * 1024 * 1024
    assert len(read(client.invoke_endpoint(EndpointName="weir", Body=bytes(largest)))) == largest
    error = refusal(client.invoke_endpoint, EndpointName="weir", Body=bytes(largest + 1))
    assert error["ResponseMetadata"]["HTTPStatusCode"] == 413
    assert error["Error"]["Message"] == f"HTTP content length exceeded {largest} bytes."
    assert len(stand_in.received) == 1


def test_an_answer_that_is_too_large_is_an_error(emulate, client_of):
    emulator = emulate(limits=dataclasses.replace(LIMITS, payload_bytes=1000))
    error = refusal(invoke, client_of(emulator), say="x", times=1001)
    assert "too large" in error["OriginalMessage"]


def test_a_session_sticks_to_its_instance_and_is_closed(emulate, client_of, stand_in):
    emulator = emulate(instances=2)
    client = client_of(emulator)
    for spelling in ("X-Amzn-SageMaker-New-Session-Id", "X-Amzn-SageMaker-Session-Id"):
        opened = f"{spelling[17:20]}-1; Expires=2026-11-21T12:00:00Z"
        answer = invoke(client, SessionId="NEW_SESSION", requestType="NEW_SESSION", headers={spelling: opened})
        read(answer)
        assert answer["NewSessionId"] == opened
        assert stand_in.received[-1][1]["x-amzn-sagemaker-session-id"] == "NEW_SESSION"
        session = opened.partition(";")[0]
        home = emulator.fleet.sessions.instance_of(session)
        assert {emulator.fleet.route(session) for _ in range(20)} == {home}
        read(invoke(client, SessionId=session))
        assert stand_in.received[-1][1]["x-amzn-sagemaker-session-id"] == session
        closing = {"X-Amzn-SageMaker-Closed-Session-Id": session}
        answer = invoke(client, SessionId=session, requestType="CLOSE", headers=closing)
        read(answer)
        assert answer["ClosedSessionId"] == session
        assert emulator.fleet.sessions.instance_of(session) is None
    assert len({emulator.fleet.route(None) for _ in range(50)}) == 2
    assert not emulator.journal.breaches


def test_a_session_cannot_be_opened_by_a_stream_and_has_a_form(emulate, client_of, stand_in):
    emulator = emulate()
    client = client_of(emulator)
    error = refusal(stream, client, SessionId="NEW_SESSION")
    assert error["Error"]["Code"] == "ValidationError"
    error = refusal(invoke, client, SessionId="abc; Expires=2026-11-21T12:00:00Z")
    assert "semicolon" in error["Error"]["Message"]
    assert not stand_in.received
    read(invoke(client, SessionId="NEW_SESSION", headers={"X-Amzn-SageMaker-Session-Id": "a_b"}))
    assert "Expires" in emulator.journal.breaches[0]


def test_a_container_without_sessions_is_told_so(emulate, client_of):
    emulator = emulate()
    answer = invoke(client_of(emulator), SessionId="NEW_SESSION")
    read(answer)
    assert "NewSessionId" not in answer
    assert any("NewSessionId" in line for line in emulator.journal.lines)


def test_inference_components_have_to_be_named(emulate, client_of, stand_in):
    emulator = emulate(components=("chat",), adapters={"polite": "/adapters/polite"})
    path, _, body = stand_in.received.pop()
    assert path == "/adapters"
    assert json.loads(body) == {"name": "polite", "src": "/adapters/polite", "preload": True, "pin": False}
    client = client_of(emulator)
    error = refusal(invoke, client)
    assert error["Error"]["Message"].startswith("Inference Component Name header is required")
    assert error["Error"]["Code"] == "ValidationError"
    assert "chat, polite" in refusal(invoke, client, InferenceComponentName="other")["Error"]["Message"]
    read(invoke(client, InferenceComponentName="chat"))
    headers = stand_in.received.pop()[1]
    assert headers["x-amzn-sagemaker-inference-component"] == "chat"
    assert "x-amzn-sagemaker-adapter-identifier" not in headers
    stand_in.go.release()
    list(bytes_of(stream(client, parts=["a\n"], InferenceComponentName="polite")["Body"]))
    assert stand_in.received.pop()[1]["x-amzn-sagemaker-adapter-identifier"] == "polite"


def test_an_adapter_that_is_refused_fails_the_launch(emulate, stand_in):
    stand_in.adapters = 424
    emulator = emulate(serving=False, adapters={"polite": "/adapters/polite"})
    assert not emulator.fleet.wait_in_service(PATIENCE_S)
    assert "POST /adapters for polite was answered 424" in emulator.journal.breaches[0]


@pytest.mark.parametrize(
    ("call", "parameters", "said"),
    [
        (invoke, {"endpoint": "other"}, "Endpoint other of account 111122223333 not found"),
        (invoke, {"endpoint": "weir-async"}, "AsyncInferenceConfig"),
        (stream, {"endpoint": "weir-async"}, "AsyncInferenceConfig"),
        (invoke, {"TargetVariant": "blue"}, "Variant blue not found"),
        (invoke, {"TargetModel": "a.tar.gz"}, "multi-model"),
        (invoke, {"InferenceComponentName": "chat"}, "not found"),
        (invoke, {"InferenceId": "x" * 65}, "inferenceId"),
    ],
)
def test_what_the_platform_refuses_does_not_reach_the_container(emulate, client_of, stand_in, call, parameters, said):
    error = refusal(call, client_of(emulate()), **parameters)
    assert error["Error"]["Code"] == "ValidationError"
    assert said in error["Error"]["Message"]
    assert not stand_in.received


def test_an_unsigned_request_learns_how_to_sign(emulate, stand_in):
    answer = requests.post(emulate().url + "/endpoints/weir/invocations", data=b"{}", timeout=PATIENCE_S)
    assert answer.status_code == 403
    assert answer.headers["x-amzn-errortype"] == "MissingAuthenticationTokenException"
    assert "--aws-sigv4" in answer.json()["Message"]
    assert not stand_in.received


def test_another_service_is_told_apart(emulate):
    answer = requests.post(emulate().url + "/", data=b"{}", timeout=PATIENCE_S)
    assert answer.status_code == 404
    assert "moto" in answer.json()["Message"]


def wait_for(path: Path) -> bytes:
    done = threading.Event()
    for _ in range(int(PATIENCE_S / 0.02)):
        if path.exists():
            return path.read_bytes()
        done.wait(0.02)
    raise AssertionError(f"{path} was not written")


def place(root: Path, location: str) -> Path:
    return root / "s3" / location.removeprefix("s3://")


def test_asynchronous_answers_are_stored(emulate, client_of, stand_in, tmp_path):
    client = client_of(emulate())
    source = place(tmp_path, "s3://mine/question.json")
    source.parent.mkdir(parents=True)
    source.write_bytes(b'{"say": "from storage"}')
    asked = {"EndpointName": "weir-async", "ContentType": "application/json"}
    inline = client.invoke_endpoint_async(**asked, Body=b'{"say": "inline"}', InferenceId="job-1", Filename="a.json")
    stored = client.invoke_endpoint_async(**asked, InputLocation="s3://mine/question.json", S3OutputPathExtension="x/y")
    assert inline["InferenceId"] == "job-1"
    assert inline["OutputLocation"] == "s3://emulator/results/a.json"
    assert stored["OutputLocation"].startswith("s3://emulator/results/x/y/")
    assert wait_for(place(tmp_path, inline["OutputLocation"])) == b"inline"
    assert wait_for(place(tmp_path, stored["OutputLocation"])) == b"from storage"
    got = [headers for _, headers, _ in stand_in.received]
    assert all(headers["content-type"] == "application/json" for headers in got)
    assert {"job-1", stored["InferenceId"]} == {headers["x-amzn-sagemaker-inference-id"] for headers in got}


def test_asynchronous_failures_are_stored_too(emulate, client_of, tmp_path):
    client = client_of(emulate())
    asked = {"EndpointName": "weir-async", "ContentType": "application/json"}
    refused = client.invoke_endpoint_async(**asked, Body=b'{"status": 422, "say": "no"}')
    late = client.invoke_endpoint_async(**asked, Body=b'{"wait": true}', InvocationTimeoutSeconds=1)
    missing = client.invoke_endpoint_async(**asked, InputLocation="s3://mine/nothing")
    told = [json.loads(wait_for(place(tmp_path, one["FailureLocation"]))) for one in (refused, late, missing)]
    assert (told[0]["OriginalStatusCode"], told[0]["OriginalMessage"]) == (422, "no")
    assert told[1]["OriginalMessage"].startswith("Your invocation timed out")
    assert "cannot be read" in told[2]["Message"]
    assert not place(tmp_path, refused["OutputLocation"]).exists()


@pytest.mark.parametrize(
    ("parameters", "code"),
    [
        ({"Body": bytes(128_001)}, "413"),
        ({"Body": b"x", "InputLocation": "s3://a/b"}, "ValidationError"),
        ({}, "ValidationError"),
        ({"Body": b"x", "InvocationTimeoutSeconds": 3601}, "ValidationError"),
        ({"Body": b"x", "EndpointName": "weir"}, "ValidationError"),
    ],
)
def test_asynchronous_calls_have_limits_of_their_own(emulate, client_of, parameters, code):
    client = client_of(emulate())
    # boto3 itself refuses some of these; what it lets through, the emulator must not.
    client.meta.events.unregister("before-parameter-build")
    error = refusal(client.invoke_endpoint_async, **{"EndpointName": "weir-async", **parameters})
    assert error["Error"]["Code"] == code


def test_the_openai_client_is_answered_with_the_containers_own_words(emulate, stand_in):
    emulator = emulate(components=("chat",))
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": []}
    base = f"{emulator.url}/endpoints/weir/inference-components/chat/openai/v1"
    with openai.OpenAI(base_url=base, api_key=make_token(datetime.now(UTC)), max_retries=0) as client:
        asked = {"model": "", "messages": [{"role": "user", "content": "hi"}]}
        say = json.dumps({"id": "7", "object": "chat.completion", "created": 1, "model": "m", "choices": []})
        assert client.chat.completions.create(**asked, extra_body={"say": say}).id == "7"
        path, headers, body = stand_in.received[0]
        assert path == "/v1/chat/completions"
        assert json.loads(body)["model"] == ""
        assert headers["x-amzn-sagemaker-inference-component"] == "chat"
        assert "authorization" not in headers
        pieces = [f"data: {json.dumps(chunk)}\n\n", "data: [DONE]\n\n"]
        for _ in pieces:
            stand_in.go.release()
        found = client.chat.completions.create(**asked, stream=True, extra_body={"parts": pieces, "headers": TYPE})
        assert [one.id for one in found] == ["1"]
        with pytest.raises(openai.UnprocessableEntityError) as caught:  # no 424 on this path
            client.chat.completions.create(**asked, extra_body={"status": 422, "say": '{"error":{"message":"no"}}'})
        assert caught.value.body == {"message": "no"}
        with pytest.raises(openai.NotFoundError, match="nothing else below"):
            client.models.list()
    wrong = openai.OpenAI(base_url=base, api_key="sk-1", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError, match="generate_token"):
        wrong.chat.completions.create(**asked)


def test_a_broken_stream_breaks_on_the_openai_path_too(emulate, stand_in):
    base = f"{emulate().url}/endpoints/weir/openai/v1"
    stand_in.go.release()
    with openai.OpenAI(base_url=base, api_key=make_token(datetime.now(UTC)), max_retries=0) as client:
        body = {"parts": ["data: {}\n\n", "BREAK"], "headers": TYPE}
        found = client.chat.completions.create(model="", messages=[], stream=True, extra_body=body)
        with pytest.raises(openai.APIConnectionError):
            list(found)


def test_a_stream_of_lines_has_to_end_with_a_newline(emulate, client_of, stand_in):
    emulator = emulate()
    client = client_of(emulator)
    for _ in range(2):
        stand_in.go.release()
    list(bytes_of(stream(client, parts=["data: 1\n\n"], headers=TYPE)["Body"]))
    assert not emulator.journal.breaches
    list(bytes_of(stream(client, parts=["data: [DONE]"], headers=TYPE)["Body"]))
    assert "newline" in emulator.journal.breaches[0]


def test_what_is_enforced_is_documented():
    """Each figure of the limits stands in the table of the page."""
    page = (Path(__file__).parents[2] / "docs" / "sagemaker_emulator.md").read_text()
    for figure in ("2 s", "250 ms", "60 s", "8 minutes", "30 s", "25 MB", "128,000 bytes", "1,024", "12 hours"):
        assert re.search(rf"\|[^|\n]*{figure}", page), figure
