"""The SageMaker SDK's own local mode, version 2, which has HuggingFaceModel: unmodified, with our image."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from environments import python_with

from scripts.emulator.containers import free_port

REQUIREMENTS = ("sagemaker>=2.257,<3",)
SCRIPT = Path(__file__).with_name("with_sagemaker_v2.py")
NETWORK = "sagemaker-local"


def containers(engine: str, image: str) -> set[str]:
    """The SDK's containers of that image, running or not; it leaves them behind."""
    command = [engine, "ps", "--all", "--quiet", f"--filter=ancestor={image}", "--filter=name=algo-1"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.image
@pytest.mark.timeout(900)  # the first time its environment is made
def test_huggingface_model_deploys_locally(engine, image, model_directory, tmp_path):
    if engine != "docker" or shutil.which("docker-compose") is None:
        pytest.skip("the SDK needs docker and docker-compose on the path")
    model = tmp_path / "model"
    shutil.copytree(model_directory, model)  # the SDK mounts it writable
    config = tmp_path / "config.yaml"
    modules = {"Modules": {"TelemetryOptOut": True}}
    config.write_text(json.dumps({"SchemaVersion": "1.0", "SageMaker": {"PythonSDK": modules}}))  # JSON is YAML
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "LANG": "C.UTF-8",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "SAGEMAKER_SUPPRESS_V2_WARNING": "1",
        "SAGEMAKER_USER_CONFIG_OVERRIDE": str(config),
        **{name: os.environ[name] for name in ("DOCKER_HOST", "DOCKER_CONTEXT") if name in os.environ},
    }
    before = containers(engine, image)
    command = [python_with("sagemaker_v2", REQUIREMENTS), SCRIPT, image, model, str(free_port())]
    try:
        done = subprocess.run(
            command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300, check=False
        )
    finally:
        for container in containers(engine, image) - before:
            subprocess.run([engine, "rm", "--force", "--volumes", container], capture_output=True, check=True)
        subprocess.run([engine, "network", "rm", NETWORK], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('[{"generated_text"')]
    assert len(answers) == 1, done.stdout + done.stderr
    assert list(answers[0][0]) == ["generated_text"]
