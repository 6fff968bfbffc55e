"""AWS on this machine: moto, behind a server that records every call and answers what moto does not know."""

import http.client
import importlib.util
import json
import os
import struct
import subprocess
import sys
import threading
import urllib.request
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = ROOT / "sagemaker"
REGION = "eu-west-1"
NO_MODEL = "no-model"
ROLE = "arn:aws:iam::111122223333:role/weir"


class AWS:
    """Attributes:
    url: where it listens.
    calls: operation and request of every call in a JSON protocol, in order.
    others: method and path of every call in another protocol.
    answers: by operation, what is answered instead of what moto would; the last of a list stays. An error is
        (status, answer).
    components: the inference components that are there; moto has none.
    scaled: how they are scaled: by resource and kind of call, the names.
    """

    def __init__(self, moto):
        self.calls = []
        self.others = []
        self.components = {}
        self.scaled = {}
        self._moto = moto
        self.answers = {}
        aws = self

        class Answering(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                operation = self.headers.get("X-Amz-Target", "").rpartition(".")[2]
                own = None
                if operation:
                    request = json.loads(body)
                    aws.calls.append((operation, request))
                    own = aws.own_answer(operation, request)
                else:
                    aws.others.append((self.command, self.path))
                if own is not None:
                    status, answer = own
                    payload, headers = json.dumps(answer).encode(), {"Content-Type": "application/x-amz-json-1.1"}
                else:
                    status, headers, payload = aws.asked_of_moto(operation, self.command, self.path, self.headers, body)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(payload)

            do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = answer  # noqa: N815  # the names of http.server

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def asked_of_moto(self, operation, method, path, headers, body):
        """Moto knows no configuration without a model, as components have it: it is given one that nobody else sees."""
        headers = dict(headers)
        if (
            operation == "CreateEndpointConfig"
            and "ModelName" not in (config := json.loads(body))["ProductionVariants"][0]
        ):
            model = json.dumps({"ModelName": NO_MODEL, "ExecutionRoleArn": ROLE}).encode()
            forwarded(
                self._moto, method, path, resized(headers | {"X-Amz-Target": "SageMaker.CreateModel"}, model), model
            )
            config["ProductionVariants"][0]["ModelName"] = NO_MODEL
            body = json.dumps(config).encode()
        status, answered, payload = forwarded(self._moto, method, path, resized(headers, body), body)
        if operation.startswith(("Describe", "ListModels")) and status == 200:
            # SDK v3 believes that what is there is whole; moto says {} for what was not given.
            answer = {name: member for name, member in json.loads(payload).items() if member != {}}
            for variant in answer.get("ProductionVariants", ()):
                if variant.get("ModelName") == NO_MODEL:
                    del variant["ModelName"]
            if "Models" in answer:
                answer["Models"] = [model for model in answer["Models"] if model["ModelName"] != NO_MODEL]
            payload = json.dumps(answer).encode()
        return status, answered, payload

    def own_answer(self, operation, request):
        if operation in self.answers:
            waiting = self.answers[operation]
            answer = waiting.pop(0) if len(waiting) > 1 else waiting[0]
            return answer if isinstance(answer, tuple) else (200, answer)
        if "InferenceComponent" in operation:
            return self._of_components(operation, request)
        if "inference-component/" in json.dumps(request):
            return 200, self._of_their_scaling(operation, request)
        return None

    def _of_their_scaling(self, operation, request):
        resource = request.get("ResourceId") or request["ResourceIds"][0]
        targets, policies = self.scaled.setdefault(resource, ({}, {}))
        if operation == "RegisterScalableTarget":
            targets[resource] = request
        elif operation == "PutScalingPolicy":
            policies[request["PolicyName"]] = request
            return {"PolicyARN": f"arn:aws:autoscaling:{REGION}:policy/{request['PolicyName']}", "Alarms": []}
        elif operation == "DescribeScalableTargets":
            return {"ScalableTargets": [target | {"RoleARN": ROLE, "CreationTime": 0} for target in targets.values()]}
        elif operation == "DescribeScalingPolicies":
            return {
                "ScalingPolicies": [policy | {"PolicyARN": "arn", "CreationTime": 0} for policy in policies.values()]
            }
        elif operation == "DeleteScalingPolicy":
            del policies[request["PolicyName"]]
        elif operation == "DeregisterScalableTarget":
            del targets[resource]
        return {}

    def _of_components(self, operation, request):
        name = request.get("InferenceComponentName")
        if operation == "CreateInferenceComponent":
            self.components[name] = request
        elif operation == "ListInferenceComponents":
            found = [
                {key: made[key] for key in ("InferenceComponentName", "EndpointName")}
                for made in self.components.values()
                if made["EndpointName"] == request["EndpointNameEquals"]
            ]
            return 200, {"InferenceComponents": found}
        elif name not in self.components:
            return 400, {"__type": "ValidationException", "message": f'Could not find inference component "{name}".'}
        elif operation == "DeleteInferenceComponent":
            adapters = [made for made in self.components.values() if based_on(made) == name]
            if adapters:
                return 400, {"__type": "ValidationException", "message": f"{name} still has adapters."}
            del self.components[name]
            return 200, {}
        elif operation == "UpdateInferenceComponent":
            self.components[name] = self.components[name] | {"Specification": request["Specification"]}
        arn = {"InferenceComponentArn": f"arn:aws:sagemaker:{REGION}:111122223333:inference-component/{name}"}
        times = {"CreationTime": 0, "LastModifiedTime": 0, "EndpointArn": "arn:aws:sagemaker:x"}
        return 200, self.components[name] | arn | times | {"InferenceComponentStatus": "InService"}

    def operations(self):
        return [operation for operation, _ in self.calls]

    def changes(self):
        """The calls that were not questions."""
        asking = ("Describe", "List", "Get")
        return [call for call in self.calls if not call[0].startswith(asking)]

    def client(self, service):
        import boto3

        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
        return boto3.client(service, region_name=REGION, endpoint_url=self.url, **keys)

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def based_on(component):
    return component.get("Specification", {}).get("BaseInferenceComponentName")


def resized(headers, body):
    others = {name: value for name, value in headers.items() if name.lower() != "content-length"}
    return others | {"Content-Length": str(len(body))}


def forwarded(moto, method, path, headers, body):
    host, port = moto
    connection = http.client.HTTPConnection(host, port, timeout=60)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    payload = answer.read()
    connection.close()
    hop = ("content-length", "connection", "transfer-encoding", "date", "server")
    return answer.status, {name: value for name, value in answer.getheaders() if name.lower() not in hop}, payload


@pytest.fixture(scope="session")
def moto():
    server = pytest.importorskip("moto.server", reason="moto is not installed").ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture
def aws(moto):
    urllib.request.urlopen(urllib.request.Request("http://{}:{}/moto-api/reset".format(*moto), method="POST")).close()
    standing_in = AWS(moto)
    yield standing_in
    standing_in.close()


def environ_of(home, aws=None):
    environ = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8"}
    if aws is not None:
        environ |= {
            "AWS_ENDPOINT_URL": aws.url,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    return environ


@pytest.fixture
def run(tmp_path):
    """Runs one of the scripts, as a user does."""

    def run(name, *arguments, aws=None, python=sys.executable, home=tmp_path, answer=None, expect=0):
        done = subprocess.run(
            [python, SCRIPTS / f"{name}.py", *arguments],
            env=environ_of(home, aws),
            cwd=tmp_path,
            input=answer or "",
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return SimpleNamespace(out=done.stdout, err=done.stderr)

    return run


@pytest.fixture
def load(monkeypatch):
    """One of the scripts as a module."""
    monkeypatch.syspath_prepend(SCRIPTS)

    def load(name):
        spec = importlib.util.spec_from_file_location(f"weir_sagemaker_{name}", SCRIPTS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def runtime():
    """Stands for the runtime's API; `answers` are (status, headers, body) for the calls, in their order."""
    asked, answers = [], []

    class Answering(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            asked.append(SimpleNamespace(path=self.path, headers=headers, body=json.loads(body) if body else None))
            status, headers, payload = answers.pop(0)
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(payload))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(payload)

        do_GET = do_POST = answer  # noqa: N815  # the names of http.server

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", asked=asked, answers=answers)
    server.shutdown()
    server.server_close()
    thread.join()


def event_stream(payload, size):
    """The frames that boto3 takes apart: lengths, checksums, headers, a slice of the container's bytes."""
    headers = b""
    for name, value in ((":message-type", "event"), (":event-type", "PayloadPart")):
        headers += bytes([len(name)]) + name.encode() + b"\x07" + struct.pack(">H", len(value)) + value.encode()
    frames = b""
    for start in range(0, len(payload), size):
        part = payload[start : start + size]
        prelude = struct.pack(">II", 16 + len(headers) + len(part), len(headers))
        message = prelude + struct.pack(">I", zlib.crc32(prelude)) + headers + part
        frames += message + struct.pack(">I", zlib.crc32(message))
    return frames
