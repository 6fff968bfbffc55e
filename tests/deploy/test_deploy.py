"""The deploy scripts without AWS: the requests they print, what they refuse, and how a stream is put together."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "sagemaker"
REQUIRED = ("--image-uri", "image:tag", "--role-arn", "arn:aws:iam::111122223333:role/weir")


def script(name):
    spec = importlib.util.spec_from_file_location(f"weir_sagemaker_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dry_run(*arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPTS / "deploy.py"), *REQUIRED, "--dry-run", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_a_dry_run_prints_the_three_requests():
    answer = dry_run("--model-data", "s3://bucket/llama/", "--name", "mine", "--", "--max-concurrent-requests", "64")
    assert answer.returncode == 0, answer.stderr
    model, config, endpoint = json.loads(answer.stdout)
    assert model["operation"] == "create_model"
    assert model["request"]["PrimaryContainer"] == {
        "Image": "image:tag",
        "Environment": {"MAX_CONCURRENT_REQUESTS": "64"},
        "ModelDataSource": {
            "S3DataSource": {"S3Uri": "s3://bucket/llama/", "S3DataType": "S3Prefix", "CompressionType": "None"}
        },
    }
    [variant] = config["request"]["ProductionVariants"]
    assert variant["ModelName"] == "mine"
    assert variant["InferenceAmiVersion"] == "al2023-ami-sagemaker-inference-gpu-4-1"
    assert endpoint == {
        "operation": "create_endpoint",
        "request": {"EndpointName": "mine", "EndpointConfigName": "mine"},
    }


def test_the_requests_are_ones_that_aws_knows():
    """Against botocore's own description of the API, where boto3 is installed."""
    pytest.importorskip("botocore", reason="boto3 is not installed")
    from botocore.session import Session
    from botocore.validate import validate_parameters

    service = Session().get_service_model("sagemaker")
    answer = dry_run("--model-data", "s3://bucket/model.tar.gz", "--instance-type", "ml.c7i.xlarge")
    for step in json.loads(answer.stdout):
        operation = "".join(word.capitalize() for word in step["operation"].split("_"))
        validate_parameters(step["request"], service.operation_model(operation).input_shape)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model-data", "s3://bucket/llama"), "must end in /"),
        (("--model-data", "/tmp/model/"), "s3://"),
        (("--startup-timeout", "4000"), "60 and 3600"),
        (("--env", "NAME"), "NAME=VALUE"),
        (("--env", f"API_KEY={'x' * 1025}"), "@/opt/ml/model/"),
        (("--", "--port", "9"), "PORT cannot be set"),
        (("--", "--max-concurent-requests", "9"), "max-concurrent-requests"),
    ],
)
def test_what_sagemaker_would_refuse_is_refused_here(arguments, words):
    answer = dry_run(*arguments)
    assert answer.returncode == 2
    assert words in answer.stderr
    assert answer.stdout == ""


def test_a_stream_is_read_however_it_is_cut():
    whole = (
        'data:{"token":{"text":"é\U0001f600"}}\n\n: ping\n\ndata: {"token":{"text":"b"}}\n\ndata: [DONE]\n\n'.encode()
    )
    expected = [{"token": {"text": "é\U0001f600"}}, {"token": {"text": "b"}}]
    for size in range(1, len(whole)):
        parts = [whole[start : start + size] for start in range(0, len(whole), size)]
        assert list(script("invoke").events(parts)) == expected


def test_the_scripts_are_no_package():
    """An __init__.py would shadow the SageMaker SDK for everybody who starts Python in this directory."""
    assert not (SCRIPTS / "__init__.py").exists()
