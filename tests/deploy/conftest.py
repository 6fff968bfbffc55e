"""A container of the test's own, the emulator in front of it, and real boto3 in front of that."""

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import boto3
import pytest
from botocore.config import Config
from server.conftest import model_directory, start
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

from scripts.emulator.containers import Attached
from scripts.emulator.journal import Journal
from scripts.emulator.limits import Limits
from scripts.emulator.server import Deployment, Emulator

__all__ = ["model_directory", "start"]  # fixtures: a real server with a tiny model

# So quick that a test of a deadline need not wait, and so long that nothing else meets one.
LIMITS = Limits(ping_interval_s=0.05, startup_s=20.0)
PATIENCE_S = 30.0


class Quiet(WSGIRequestHandler):
    def log_request(self, *args):
        pass


@dataclass
class StandIn:
    """A container that does what the body of a request says, and remembers what it got.

    Attributes:
        received: path, headers and body of every request but pings.
        health: the status of /ping; 0 lets it wait.
        adapters: the status of /adapters.
        pings: how many came.
        go: lets one step of a stream, or one waiting answer, go on.
        gone: set when a stream was closed before its end.
        url: where it listens.
    """

    received: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    health: int = 200
    adapters: int = 200
    pings: int = 0
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    gone: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def __call__(self, environ, start_response):
        request = Request(environ)
        if request.path == "/ping":
            self.pings += 1
            if not self.health:
                self.go.acquire(timeout=PATIENCE_S)
            return Response(status=self.health or 200)(environ, start_response)
        body = request.get_data()
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.received.append((request.path, headers, body))
        if request.path == "/adapters":
            return Response("said", self.adapters)(environ, start_response)
        asked = {}
        with contextlib.suppress(ValueError):
            asked = json.loads(body)
        return self.answer(asked, body)(environ, start_response)

    def answer(self, asked, body) -> Response:
        headers = asked.get("headers", {})
        kind = headers.get("Content-Type", "application/json")
        if "parts" in asked:
            return Response(self.stream(asked["parts"]), headers=headers, content_type=kind)
        if "wait" in asked:
            self.go.acquire(timeout=PATIENCE_S)
        said = asked.get("say", body) * asked.get("times", 1)
        return Response(said, asked.get("status", 200), headers, content_type=kind)

    def push_until_gone(self) -> None:
        """Let a stream go on until it notices that nobody reads it, which it does when it writes."""
        for _ in range(int(PATIENCE_S / 0.01)):
            self.go.release()
            if self.gone.wait(0.01):
                return
        raise AssertionError("the stream was never closed")

    def stream(self, parts: list[str]) -> Iterator[bytes]:
        """One part, then wait until the test has seen it. `BREAK` drops the connection."""
        finished = False
        try:
            for part in parts:
                if part == "BREAK":
                    raise ConnectionAbortedError
                yield part.encode()
                if not self.go.acquire(timeout=PATIENCE_S):
                    raise ConnectionAbortedError
            finished = True
        finally:
            if not finished:
                self.gone.set()


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    app = StandIn()
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    app.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield app
    for _ in range(100):
        app.go.release()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def emulate(stand_in, tmp_path):
    """Put an emulator in front of the stand-in, or of other containers; it ends with the test."""
    with contextlib.ExitStack() as stack:

        def emulate(make=None, *, serving=True, **deployment) -> Emulator:
            journal = Journal(lambda line: None)
            deployment = Deployment(**{"limits": LIMITS, **deployment})
            make = make or (lambda: Attached(stand_in.url))
            emulator = Emulator(deployment, make, tmp_path / "s3", journal)
            emulator.journal = journal
            stack.enter_context(emulator)
            if serving:
                assert emulator.fleet.wait_in_service(PATIENCE_S), journal.lines
            return emulator

        yield emulate


@pytest.fixture
def client_of():
    """A boto3 client for an emulator, as our documents configure one; it is closed with the test."""
    with contextlib.ExitStack() as stack:

        def client_of(emulator_or_url, **config):
            url = getattr(emulator_or_url, "url", emulator_or_url)
            settings = {"read_timeout": 70, "retries": {"total_max_attempts": 1}, **config}
            client = boto3.client(
                "sagemaker-runtime",
                endpoint_url=url,
                region_name="us-east-1",
                aws_access_key_id="emulator",
                aws_secret_access_key="emulator",
                config=Config(**settings),
            )
            stack.callback(client.close)
            return client

        yield client_of


def invoke(client, *, endpoint="weir", **asked):
    """Call with a JSON body of these; keys that are parameters of boto3's go there."""
    parameters = {name: asked.pop(name) for name in list(asked) if name[0].isupper()}
    body = json.dumps(asked).encode()
    return client.invoke_endpoint(
        **{"EndpointName": endpoint, "ContentType": "application/json", "Body": body, **parameters}
    )


def stream(client, *, endpoint="weir", **asked):
    """The event stream of a call with such a body."""
    parameters = {name: asked.pop(name) for name in list(asked) if name[0].isupper()}
    body = json.dumps(asked).encode()
    return client.invoke_endpoint_with_response_stream(
        **{"EndpointName": endpoint, "ContentType": "application/json", "Body": body, **parameters}
    )


def bytes_of(events) -> Iterator[bytes]:
    """The parts of a stream, which is closed when they are no longer asked for."""
    with contextlib.closing(events):
        for event in events:
            yield event["PayloadPart"]["Bytes"]
