"""The life of a real server: start, serve, drain, stop, crash. Nothing may be left behind."""

import json
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.server

LONG = {"inputs": "a", "parameters": {"max_new_tokens": 4000, "ignore_eos": True}}  # not meant to end
WHOLE = {"inputs": "a", "parameters": {"max_new_tokens": 500, "ignore_eos": True}}
SHORT = {"inputs": "a", "parameters": {"max_new_tokens": 4, "ignore_eos": True}}


def gone(processes: list[psutil.Process], seconds: float = 10) -> bool:
    return not psutil.wait_procs(processes, timeout=seconds)[1]


def test_one_worker_owns_one_device_process_and_only_that_knows_torch(server):
    arbiter, worker, device, trial = server.processes()
    assert worker.ppid() == arbiter.pid
    assert device.ppid() == worker.pid
    assert "torch" in Path(f"/proc/{device.pid}/maps").read_text()
    for process in (arbiter, worker, trial):
        assert "torch" not in Path(f"/proc/{process.pid}/maps").read_text()


def test_it_answers_while_it_loads(start):
    server = start().wait_listening()
    response = server.get("/health")
    assert response.status_code == 503
    response = server.post("/generate", SHORT)
    assert (response.status_code, response.json()["error_type"]) == (503, "not_ready")
    assert int(response.headers["retry-after"]) >= 1
    server.wait_line("Ready")
    assert server.get("/health").status_code == 200
    assert server.post("/generate", SHORT).status_code == 200


def test_sigterm_while_loading_leaves_nothing_behind(start):
    server = start().wait_listening()
    family = server.processes()
    server.signal(signal.SIGTERM)
    assert server.wait_exit() == 0
    assert gone(family)


def test_sigterm_lets_open_requests_end_and_refuses_new_ones(start):
    server = start().wait_ready()
    family = server.processes()
    with server.post("/generate_stream", WHOLE, stream=True) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.signal(signal.SIGTERM)
        server.wait_line("Draining")
        refused = server.post("/generate", SHORT)
        assert (refused.status_code, refused.json()["error_type"]) == (503, "shutting_down")
        assert server.get("/ping").status_code == 503
        last = [line for line in lines if line][-1]
    assert len(json.loads(last.removeprefix(b"data:"))["generated_text"]) > 100
    assert server.wait_exit() == 0
    assert gone(family)


def test_the_drain_deadline_ends_streams_with_an_error_event(start):
    server = start("--graceful-termination-timeout=1").wait_ready()
    family = server.processes()
    with server.post("/generate_stream", LONG, stream=True) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.signal(signal.SIGTERM)
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix(b"data:")) == {
        "error": "Request failed during generation: server is shutting down",
        "error_type": "generation",
    }
    assert server.wait_exit(15) == 0
    assert gone(family)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_a_quick_stop_ends_streams_at_once_and_leaves_nothing_behind(start, number):
    server = start().wait_ready()
    family = server.processes()
    with server.post("/generate_stream", LONG, stream=True) as stream:
        lines = stream.iter_lines()
        next(lines)
        began = time.monotonic()
        server.signal(number)
        assert b"server is shutting down" in [line for line in lines if line][-1]
    server.wait_exit(10)
    assert time.monotonic() - began < 8
    assert gone(family)


def test_a_killed_device_process_is_replaced_and_streams_go_on(start):
    server = start().wait_ready()
    whole = server.post("/generate", WHOLE).json()["generated_text"]
    with server.post("/generate_stream", WHOLE, stream=True) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.processes()[2].kill()
        server.wait_line("starting another, 1 open requests go on")
        assert server.get("/health").status_code == 503
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix(b"data:"))["generated_text"] == whole
    assert server.get("/health").status_code == 200


def test_two_ranks_answer_as_one_does_and_any_of_them_is_replaced(start):
    answer = start().wait_ready().post("/generate", WHOLE).json()["generated_text"]
    server = start("--num-shard=2").wait_ready()
    alike = server.post("/generate", WHOLE)
    assert alike.json()["generated_text"] == answer
    assert alike.headers["x-compute-type"] == "2-cpu"
    ranks = [process for process in server.processes() if "serving.runner.process" in process.cmdline()]
    assert len(ranks) == 2
    with server.post("/generate_stream", WHOLE, stream=True) as stream:
        lines = stream.iter_lines()
        next(lines)
        ranks[1].kill()
        server.wait_line("starting another, 1 open requests go on")
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix(b"data:"))["generated_text"] == answer
    assert gone(ranks)
    server.process.terminate()
    assert server.wait_exit(15) == 0


def test_a_killed_worker_takes_its_device_process_along_and_is_replaced(start):
    server = start().wait_ready()
    _, worker, *children = server.processes()
    worker.kill()
    assert gone([worker, *children])
    server.wait_line("Ready")
    assert server.post("/generate", SHORT).status_code == 200


def test_a_killed_arbiter_takes_everything_along(start):
    server = start().wait_ready()
    family = server.processes()
    server.process.kill()
    server.process.wait()
    assert gone(family[1:])


def test_a_model_that_cannot_be_loaded_ends_the_server_with_one_line(start, tmp_path):
    server = start(f"--model-id={tmp_path}")
    assert server.wait_exit() not in (0, 2)
    errors = [line for line in server.lines if " ERROR " in line]
    assert len(errors) == 1, server.lines
    assert "config.json" in errors[0]
    assert not any("Traceback" in line for line in server.lines)


def test_a_busy_port_is_said_in_one_line(start):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        server = start(f"--port={port}")
        assert server.wait_exit() == 1
    assert server.lines == [line for line in server.lines if f"Port {port} is in use" in line]
    assert len(server.lines) == 1


def test_a_client_that_hangs_up_frees_its_permit(start):
    server = start("--max-concurrent-requests=1").wait_ready()
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps(LONG).encode()
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection((host, int(port))) as client:
        client.sendall(head % len(body) + body)
        time.sleep(0.3)
        refused = server.post("/generate", SHORT)
        assert (refused.status_code, refused.json()["error_type"]) == (429, "overloaded")
    time.sleep(0.3)
    assert server.post("/generate", SHORT).status_code == 200


def test_json_logs_are_one_object_a_line_and_name_no_prompt(start):
    server = start("--json-output").wait_listening()
    server.wait_line('"message":"Ready"|"message": "Ready"')
    server.post("/generate", {"inputs": "a very secret prompt", "parameters": {"max_new_tokens": 2}})
    server.post("/generate", {"inputs": "a very secret prompt", "parameters": {"max_new_tokens": 0}})
    server.signal(signal.SIGTERM)
    server.wait_exit()
    for line in server.lines:
        assert {"timestamp", "level", "message", "target"} <= json.loads(line).keys()
    assert "secret" not in "\n".join(server.lines)


def test_as_sagemaker_starts_it(start, model_directory):
    """The word `serve`, SageMaker's variables, and a port of its choice; the image's own PORT does not count."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    variables = {
        "SAGEMAKER_BIND_TO_PORT": str(port),
        "PORT": "80",
        "HF_MODEL_ID": str(model_directory),
        "HF_TASK": "text-generation",
        "SM_NUM_GPUS": "1",
        "WEIR_HOSTNAME": "127.0.0.1",
        "KV_CACHE_MEMORY": "16MiB",
    }
    server = start(plain=["serve"], environ=variables).wait_ready()
    assert server.url == f"http://127.0.0.1:{port}"
    assert server.get("/ping").status_code == 200
    assert server.post("/invocations", SHORT).status_code == 200
    server.signal(signal.SIGTERM)
    assert server.wait_exit(25) == 0
