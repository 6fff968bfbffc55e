"""The life of a container under the emulator's health checks: launch, replacement, end."""

import contextlib
import dataclasses
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from deploy.conftest import LIMITS, PATIENCE_S, invoke

from scripts.emulator.containers import ProcessContainer
from scripts.emulator.instance import State, ping
from scripts.emulator.upstream import Address, Exchange, Unreachable

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("serving_script.py")


def process(mode: str, model: Path | None = None):
    return lambda: ProcessContainer([sys.executable, str(SCRIPT), mode], {}, model, lambda line: None)


def wait_until(condition) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_container_serves_and_leaves_on_sigterm(emulate, tmp_path):
    emulator = emulate(process("well"))
    emulator.fleet.end()
    [stop] = emulator.fleet.stops
    assert (stop.exit_code, stop.killed) == (0, False)
    assert stop.seconds < LIMITS.stop_s
    assert not emulator.journal.breaches


def test_a_container_that_does_not_leave_is_killed(emulate):
    emulator = emulate(process("deaf"), limits=dataclasses.replace(LIMITS, stop_s=0.3))
    emulator.fleet.end()
    [stop] = emulator.fleet.stops
    assert stop.killed
    assert stop.seconds >= 0.3
    assert "SIGTERM" in emulator.journal.breaches[0]
    assert "exec" in emulator.journal.breaches[0]


@pytest.mark.parametrize(
    ("health", "why"),
    [
        (503, "/ping was not healthy within 0.5 s (last: status 503)"),
        (0, "/ping was not healthy within 0.5 s (last: no answer within 0.5 s)"),
    ],
)
def test_a_launch_that_takes_too_long_says_what_the_last_ping_saw(emulate, stand_in, health, why):
    stand_in.health = health
    emulator = emulate(serving=False, limits=dataclasses.replace(LIMITS, startup_s=0.5, ping_timeout_s=0.5))
    assert not emulator.fleet.wait_in_service(PATIENCE_S)
    assert emulator.fleet.state is State.FAILED
    assert why in emulator.journal.breaches[0]
    assert "--startup-timeout" in emulator.journal.breaches[0]


def test_a_container_that_ends_at_once_shows_its_log(emulate):
    emulator = emulate(process("short"), serving=False)
    assert not emulator.fleet.wait_in_service(PATIENCE_S)
    emulator.fleet.end()
    assert "ended before it was healthy" in emulator.journal.breaches[0]
    assert any("| no such model" in line for line in emulator.journal.lines)


def test_a_container_that_accepts_nobody_is_found_out_after_250_ms():
    """Its backlog is full: a connection is neither taken nor refused."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as stack:
        address = Address(*listener.getsockname())
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex((address.host, address.port))
        assert ping(address, LIMITS) == "no connection within 250 ms"
        with pytest.raises(Unreachable, match="within 250 ms"):
            Exchange(address, "/", {}, b"", connect_timeout_s=0.25, deadline_s=PATIENCE_S, client=None)


def test_a_container_that_gets_ill_is_replaced(emulate):
    """`ill` answers three pings, so each of its containers serves and is replaced."""
    emulator = emulate(process("ill"))
    wait_until(lambda: len(emulator.fleet.stops) >= 2)
    assert "/ping failed 3 times in a row: status 503" in emulator.journal.breaches[0]
    assert any("is replaced" in line for line in emulator.journal.lines)


def test_a_container_that_dies_is_replaced(emulate, client_of):
    containers = []

    def make():
        containers.append(process("well")())
        return containers[-1]

    emulator = emulate(make)
    containers[0]._process.kill()
    wait_until(lambda: len(containers) == 2 and emulator.fleet.state is State.IN_SERVICE)
    assert "ended while it served" in emulator.journal.breaches[0]
    assert emulator.fleet.instances[0].address == containers[1].address


def test_it_takes_healthy_pings_in_a_row_to_serve(emulate, client_of, stand_in):
    stand_in.health = 503
    emulator = emulate(serving=False, limits=dataclasses.replace(LIMITS, pings_to_serve=5))
    client = client_of(emulator)
    wait_until(lambda: stand_in.pings)
    with pytest.raises(client.exceptions.ValidationError, match="is being created"):
        invoke(client)
    stand_in.health = 200
    assert emulator.fleet.wait_in_service(PATIENCE_S)
    assert stand_in.pings >= 6
    invoke(client)["Body"].close()


def test_nobody_answers_while_the_only_instance_is_ill(emulate, client_of, stand_in):
    emulator = emulate()
    client = client_of(emulator)
    stand_in.health = 503
    wait_until(lambda: emulator.fleet.state is not State.IN_SERVICE)
    with pytest.raises(client.exceptions.ServiceUnavailable):
        invoke(client)
    stand_in.health = 200
    wait_until(lambda: emulator.fleet.state is State.IN_SERVICE)
    invoke(client)["Body"].close()


def test_a_container_that_cannot_be_reached_gives_a_model_error(emulate, client_of):
    emulator = emulate(limits=dataclasses.replace(LIMITS, ping_interval_s=60.0))
    emulator.fleet.instances[0].address = Address("127.0.0.1", 9)
    client = client_of(emulator)
    with pytest.raises(client.exceptions.ModelError, match=r"cannot be reached: no connection to 127\.0\.0\.1:9"):
        invoke(client)


def test_writing_to_the_model_directory_is_a_breach(emulate, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    emulator = emulate(process("writes", model))
    emulator.fleet.end()
    assert "wrote to the model directory, which SageMaker mounts read-only: cache.json" in emulator.journal.breaches[0]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/sagemaker_emulator.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


ASK = """
import boto3, os
assert boto3.client("sagemaker-runtime").meta.endpoint_url == os.environ["AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME"]
import urllib.request
print(urllib.request.urlopen(os.environ["AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME"] + "/_emulator/status").read().decode())
raise SystemExit(%d)
"""


@pytest.mark.parametrize(("mode", "code", "ends_with"), [("well", 0, 0), ("well", 3, 3), ("deaf", 0, 1)])
def test_a_command_runs_while_the_endpoint_is_in_service(mode, code, ends_with):
    container = f"{sys.executable} {SCRIPT} {mode}"
    done = run("--port=0", "--time-scale=0.1", "--command", container, "--", sys.executable, "-c", ASK % code)
    assert done.returncode == ends_with, done.stderr
    status = json.loads(done.stdout)
    assert status["status"] == "InService"
    assert status["endpoint"] == "weir"
    assert ("BREACH" in done.stderr) is (mode == "deaf")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--url", "ftp://x"], 2, "write it like http://127.0.0.1:8080"),
        (["--model", "/no/such"], 2, "is no directory"),
        (["--env", "A"], 2, "NAME=VALUE"),
        (["--env", "A=" + "x" * 1025], 2, "CreateModel would refuse"),
        (["--url", "x", "--instances", "2"], 2, "--instances needs"),
        (["--port=0", "--command", "/no/such/program"], 1, "cannot run /no/such/program"),
        (["--port=0", "--command", f"{sys.executable} {SCRIPT} short"], 1, "ended before it was healthy"),
    ],
)
def test_what_cannot_be_run_is_said(arguments, code, said):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_said():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("--url", "http://127.0.0.1:9", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2
    assert done.stderr.startswith("Error: cannot listen at 127.0.0.1:")
    assert len(done.stderr.splitlines()) == 1


def test_the_help_teaches():
    said = run("--help").stdout
    for word in (
        "invoke_endpoint_with_response_stream",
        "endpoint_url",
        "total_max_attempts",
        "--network none",
        "BREACH",
    ):
        assert word in said
