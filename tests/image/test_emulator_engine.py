"""The emulator with a real engine: it starts, replaces and stops containers, and demands the label for other ports."""

import contextlib
import io
import subprocess
import tarfile
import time

import boto3
import pytest
from botocore.config import Config

from scripts.emulator.containers import ContainerError, EngineContainer
from scripts.emulator.instance import State
from scripts.emulator.journal import Journal
from scripts.emulator.limits import Limits
from scripts.emulator.server import Deployment, Emulator

PATIENCE_S = 240.0


def container(engine: str, image: str, **changed) -> EngineContainer:
    settings = {
        "environment": {"OMP_WAIT_POLICY": "passive", "KV_CACHE_MEMORY": "16MiB"},
        "model": None, "adapters": {}, "options": [], "network": None, "bind_to_port": None,
    }  # fmt: skip
    return EngineContainer(engine, image, log=lambda line: None, **{**settings, **changed})


@pytest.mark.image
@pytest.mark.timeout(600)
def test_a_container_that_is_killed_is_replaced_on_another_port_too(engine, image, tmp_path):
    made = []

    def make():
        made.append(container(engine, image, bind_to_port=9000))
        return made[-1]

    journal = Journal(lambda line: None)
    deployment = Deployment(limits=Limits(ping_interval_s=0.5))
    with Emulator(deployment, make, tmp_path, journal) as emulator, contextlib.ExitStack() as stack:
        assert emulator.fleet.wait_in_service(PATIENCE_S), journal.lines
        first = made[0].name
        subprocess.run([engine, "kill", first], capture_output=True, check=True)
        deadline = time.monotonic() + PATIENCE_S
        while len(made) < 2 or emulator.fleet.state is not State.IN_SERVICE:
            assert time.monotonic() < deadline, journal.lines
            time.sleep(0.2)
        client = boto3.client(
            "sagemaker-runtime", endpoint_url=emulator.url, region_name="us-east-1", aws_access_key_id="none",
            aws_secret_access_key="none", config=Config(retries={"total_max_attempts": 1}),
        )  # fmt: skip
        stack.callback(client.close)
        asked = b'{"inputs": "a", "parameters": {"max_new_tokens": 2}}'
        answer = client.invoke_endpoint(EndpointName="weir", ContentType="application/json", Body=asked)
        assert b"generated_text" in answer["Body"].read()
        names = [first, made[1].name]
    assert [stop.exit_code for stop in emulator.fleet.stops] == [137, 0]
    assert len(journal.breaches) == 1  # that it ended while it served
    left = subprocess.run([engine, "ps", "--all", "--quiet"], capture_output=True, text=True, check=True).stdout.split()
    assert not set(left) & set(names)


@pytest.mark.image
def test_an_image_without_the_label_is_refused_another_port(engine):
    name = "localhost/weir-test-unlabelled"
    empty = io.BytesIO()
    with tarfile.open(fileobj=empty, mode="w"):
        pass
    subprocess.run([engine, "import", "-", name], input=empty.getvalue(), capture_output=True, check=True)
    try:
        with pytest.raises(ContainerError, match="accept-bind-to-port=true: CreateModel refuses"):
            container(engine, name, bind_to_port=9000).start()
    finally:
        subprocess.run([engine, "rmi", name], capture_output=True, check=True)
