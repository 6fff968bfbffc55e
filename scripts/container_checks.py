"""What a container of this project is asked before it is trusted: each check takes a running one, and says what it saw.

Knows neither how it was started nor how the outcome is shown.
"""

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import requests
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, EventStreamError

from scripts.emulator.containers import Attached, Container
from scripts.emulator.errors import REGION
from scripts.emulator.journal import Journal
from scripts.emulator.limits import Limits
from scripts.emulator.server import Deployment, Emulator

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "Hello"
TOKENS = 8
DRAINED_TOKENS = 200  # of the stream that runs when SIGTERM comes
TIMEOUT_S = 120.0
STARTED_S = 60.0
PROCESS_MARK = "serving.wsgi"  # gunicorn's command line, once the entry point has become it
JSON = {"ContentType": "application/json"}


class CheckFailed(Exception):
    """What was wrong, in a line."""


def first_process(container: Container) -> str:
    """Process 1 is the server itself, so that it gets SIGTERM."""
    command = container.first_process()
    if PROCESS_MARK not in command:
        raise CheckFailed(f"process 1 is {command!r}, not the server: does the entry point exec?")
    return " ".join(Path(word).name for word in command.split()[:3])


def whole(container: Container) -> str:
    """`POST /invocations`."""
    answer = _post(container, _asked(TOKENS))
    with answer:
        return repr(answer.json()[0]["generated_text"])


def streamed(container: Container) -> str:
    """`POST /invocations` with `stream`: several events, the last of them with the text, and a newline at the end."""
    with _post(container, _asked(TOKENS, stream=True)) as answer:
        reads = [data for data in answer.iter_content(None) if data]
    events = _events(b"".join(reads))
    if events[-1]["generated_text"] is None:
        raise CheckFailed("the last event has no generated_text")
    if len(events) > 1 and len(reads) == 1:
        raise CheckFailed("all events came at once")
    return f"{len(events)} tokens in {len(reads)} reads"


def conformance(container: Container, only: list[str]) -> str:
    """`scripts/conformance.py`, whole or in part."""
    command = [sys.executable, "scripts/conformance.py", "--json", "--url", f"http://{container.address}"]
    command += [f"--only={pattern}" for pattern in only]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == 2:  # it has said why
        raise CheckFailed("it could not be run")
    told = json.loads(done.stdout.splitlines()[-1])
    if told["failed"]:
        name, reason = next(iter(told["failures"].items()))
        raise CheckFailed(f"{told['failed']} rows differ, first {name}: {reason}")
    return f"{told['passed']} rows pass, {told['skipped']} do not apply"


def through_boto3(container: Container, storage: Path) -> str:
    """Unmodified boto3 and the emulator: whole, streamed, a session, asynchronous, a refusal, a hang-up."""
    journal = Journal(lambda line: None)
    attached = Attached(str(container.address))
    deployment = Deployment(limits=Limits(ping_interval_s=1.0))
    with Emulator(deployment, lambda: attached, storage, journal) as emulator:
        if not emulator.fleet.wait_in_service(STARTED_S):
            raise CheckFailed("; ".join(journal.breaches) or "it did not get into service")
        with contextlib.closing(_client(emulator.url)) as client:
            try:
                parts = _boto3_calls(client, storage)
            except (BotoCoreError, ClientError, EventStreamError) as error:
                raise CheckFailed(str(error)) from error
    if journal.breaches:
        raise CheckFailed(journal.breaches[0])
    return f"whole, streamed ({parts} parts), a session, asynchronous, 424, hang-up"


def drain(container: Container, grace_s: float) -> str:
    """SIGTERM while a stream runs: the stream ends as it should, the exit code is 0, nobody is killed."""
    with _post(container, _asked(DRAINED_TOKENS, stream=True)) as answer:
        chunks = answer.iter_content(None)
        first = next(chunks)
        rest: list[bytes] = []
        reader = threading.Thread(target=_collect, args=(chunks, rest))
        reader.start()
        stop = container.stop(grace_s)
        reader.join()
    assert stop is not None
    if stop.killed or stop.exit_code != 0:
        raise CheckFailed(str(stop))
    events = _events(b"".join([first, *rest]))
    cut = events[-1].get("generated_text") is None
    if cut and "error" not in events[-1]:
        raise CheckFailed("the stream that ran was cut off without an event that says so")
    if written := container.written_to():
        raise CheckFailed(f"the model directory was written to: {written}")
    how = "its stream got the error event" if cut else "its stream was finished"
    return f"{stop}; {how} ({len(events)} events)"


def _boto3_calls(client: Any, storage: Path) -> int:
    call = {"EndpointName": "weir", **JSON}
    with client.invoke_endpoint(**call, Body=json.dumps(_asked(TOKENS)))["Body"] as body:
        text = json.load(body)[0]["generated_text"]
    asked = json.dumps(_asked(TOKENS, stream=True))
    parts = list(_parts(client.invoke_endpoint_with_response_stream(**call, Body=asked)))
    if (streamed_text := _events(b"".join(parts))[-1]["generated_text"]) != text:
        raise CheckFailed(f"streamed {streamed_text!r}, whole {text!r}")
    next(_parts(client.invoke_endpoint_with_response_stream(**call, Body=asked)))
    _session(client, call)
    queued = client.invoke_endpoint_async(EndpointName="weir-async", **JSON, Body=json.dumps(_asked(TOKENS)))
    stored = storage / queued["OutputLocation"].removeprefix("s3://")
    pause = threading.Event()
    for _ in range(int(TIMEOUT_S / 0.05)):
        if stored.exists():
            break
        pause.wait(0.05)
    if not stored.exists() or json.loads(stored.read_bytes())[0]["generated_text"] != text:
        raise CheckFailed("the asynchronous answer was not stored, or is another")
    try:
        client.invoke_endpoint(**call, Body=json.dumps(_asked(0)))
    except client.exceptions.ModelError as error:
        if error.response["OriginalStatusCode"] != 422:
            raise CheckFailed(f"a bad request gave {error.response['OriginalStatusCode']}, not 422") from error
    else:
        raise CheckFailed("a request for no tokens was answered")
    return len(parts)


def _session(client: Any, call: dict[str, str]) -> None:
    opened = client.invoke_endpoint(**call, SessionId="NEW_SESSION", Body=b'{"requestType": "NEW_SESSION"}')
    opened["Body"].close()
    session = opened.get("NewSessionId", "").partition(";")[0]
    if not session:
        raise CheckFailed("NEW_SESSION opened no session")
    client.invoke_endpoint(**call, SessionId=session, Body=json.dumps(_asked(TOKENS)))["Body"].close()
    closed = client.invoke_endpoint(**call, SessionId=session, Body=b'{"requestType": "CLOSE"}')
    closed["Body"].close()
    if closed.get("ClosedSessionId") != session:
        raise CheckFailed(f"CLOSE was answered with {closed.get('ClosedSessionId')!r}, not {session!r}")


def _client(url: str) -> Any:
    return boto3.client(
        "sagemaker-runtime",
        endpoint_url=url,
        region_name=REGION,
        aws_access_key_id="emulator",
        aws_secret_access_key="emulator",
        config=Config(read_timeout=TIMEOUT_S, retries={"total_max_attempts": 1}),
    )


def _parts(answer: Any) -> Iterator[bytes]:
    with contextlib.closing(answer["Body"]) as events:
        for event in events:
            yield event["PayloadPart"]["Bytes"]


def _asked(tokens: int, *, stream: bool = False) -> dict[str, Any]:
    parameters = {"max_new_tokens": tokens, "ignore_eos": True}
    return {"inputs": PROMPT, "parameters": parameters, "stream": stream}


def _post(container: Container, body: dict[str, Any]) -> requests.Response:
    try:
        answer = requests.post(f"http://{container.address}/invocations", json=body, stream=True, timeout=TIMEOUT_S)
    except requests.RequestException as error:
        raise CheckFailed(f"no answer: {error}") from error
    if answer.status_code != 200:
        with answer:
            raise CheckFailed(f"status {answer.status_code}: {answer.text[:200]}")
    return answer


def _collect(chunks: Iterator[bytes], found: list[bytes]) -> None:
    with contextlib.suppress(requests.RequestException):
        found.extend(chunks)


def _events(stream: bytes) -> list[dict[str, Any]]:
    if not stream.endswith(b"\n\n"):
        raise CheckFailed(f"the stream ends with {stream[-40:]!r}")
    return [json.loads(event.removeprefix(b"data:")) for event in stream.split(b"\n\n") if event.startswith(b"data:")]
