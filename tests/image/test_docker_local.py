"""The image, run by a real engine as SageMaker runs it; and the harness that runs it can fail."""

import json
import subprocess
import sys

import pytest
from server.conftest import ROOT

PASSIVE = "--env=OMP_WAIT_POLICY=passive"
CHECKS = [
    "start and /ping", "process 1", "whole answer", "streamed answer", "wire contract", "boto3, emulator", "SIGTERM",
]  # fmt: skip


def run(*arguments: str) -> tuple[int, dict, str]:
    """The exit code, the outcome and what each check saw, and standard error."""
    command = [sys.executable, "-m", "scripts.docker_local", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550, check=False)
    told = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"checks": []}
    return done.returncode, {row["check"]: (row["outcome"], row["seen"]) for row in told["checks"]}, done.stderr


@pytest.mark.image
@pytest.mark.timeout(600)
def test_without_a_network_and_with_a_read_only_model_the_image_keeps_the_whole_contract_as_root(
    engine, image, model_directory
):
    model = f"--model={model_directory}"
    code, rows, errors = run("--image", image, model, "--network=none", "--backend=engine", PASSIVE)
    assert code == 0, (rows, errors)
    assert {name: outcome for name, (outcome, _) in rows.items()} == dict.fromkeys(CHECKS, "ok")
    assert "exit code 0" in rows["SIGTERM"][1]
    assert "gunicorn" in rows["process 1"][1]


@pytest.mark.image
@pytest.mark.timeout(600)
def test_the_image_serves_as_another_user_too(engine, image):
    rows_of = ("--conformance=http.info_*", "--conformance=http.health_*")
    code, rows, errors = run(
        "--image", image, "--engine-option=--user=1000:1000", "--backend=engine", PASSIVE, *rows_of
    )  # fmt: skip
    assert code == 0, (rows, errors)
    assert rows["SIGTERM"][0] == "ok"


@pytest.mark.server
def test_a_process_takes_the_containers_place_and_the_report_says_so():
    code, rows, errors = run("--backend=process", "--conformance=http.health_*", PASSIVE)
    assert code == 0, (rows, errors)
    assert rows.pop("image")[0] == "skip"
    assert {name: outcome for name, (outcome, _) in rows.items()} == dict.fromkeys(CHECKS, "ok")
    assert "The image is NOT tested" in errors


@pytest.mark.server
def test_a_server_that_does_not_start_fails_the_report_and_shows_its_log(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    code, rows, errors = run("--backend=process", "--model", str(tmp_path))
    assert code == 1
    assert rows["start and /ping"] == ("FAIL", "it ended before it was ready")
    assert "SIGTERM" not in rows
    assert "last lines" in errors


def test_a_model_that_is_not_there_is_said():
    code, rows, errors = run("--model", "/no/such/directory")
    assert (code, rows) == (2, {})
    assert "is no directory" in errors
