"""The deploy scripts without AWS and without boto3: the calls they print, and what they refuse."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest
from deploy.endpoints.conftest import ROLE, ROOT, SCRIPTS

REQUIRED = ("--image-uri", "image:tag", "--role-arn", ROLE)
KINDS = {
    "realtime": ("--kind", "realtime", "--autoscale", "1:4"),
    "async": (
        "--kind",
        "async",
        "--async-output",
        "s3://answers/",
        "--autoscale",
        "0:4",
        "--success-topic",
        "arn:aws:sns:x",
    ),
    "component": ("--kind", "component", "--autoscale", "0:4", "--cpus", "2"),
    "adapter": ("--kind", "adapter", "--adapter", "french", "--adapter-data", "s3://models/french.tar.gz"),
    "update": ("--update", "--instance-count", "3"),
    "component update": ("--kind", "component", "--update"),
}


@pytest.fixture
def dry_run(run):
    def dry_run(*arguments, **keywords):
        return json.loads(run("deploy", *REQUIRED, "--dry-run", *arguments, **keywords).out)

    return dry_run


def requests_of(calls):
    return {call["operation"]: call["request"] for call in calls}


def test_a_dry_run_prints_the_calls_in_their_order(dry_run):
    calls = dry_run("--model-data", "s3://bucket/llama/", "--name", "mine", "--", "--max-concurrent-requests", "64")
    assert [call["operation"] for call in calls] == [
        "create_model", "create_endpoint_config", "create_endpoint", "describe_endpoint",
    ]  # fmt: skip
    requests = requests_of(calls)
    assert requests["create_model"] == {
        "ModelName": "mine",
        "ExecutionRoleArn": ROLE,
        "PrimaryContainer": {
            "Image": "image:tag",
            "Environment": {"MAX_CONCURRENT_REQUESTS": "64"},
            "ModelDataSource": {
                "S3DataSource": {"S3Uri": "s3://bucket/llama/", "S3DataType": "S3Prefix", "CompressionType": "None"}
            },
        },
    }
    [variant] = requests["create_endpoint_config"]["ProductionVariants"]
    assert variant["ModelName"] == "mine"
    assert requests["create_endpoint"] == {"EndpointName": "mine", "EndpointConfigName": "mine"}
    assert calls[-1]["until"] == {"EndpointStatus": "InService"}


def test_a_dry_run_needs_no_boto3(tmp_path):
    program = f"""
import runpy, sys
sys.modules.update(dict.fromkeys(("boto3", "botocore", "sagemaker")))
sys.argv = {["deploy.py", *REQUIRED, "--dry-run"]!r}
sys.path.insert(0, {str(SCRIPTS)!r})
runpy.run_path({str(SCRIPTS / "deploy.py")!r}, run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_calls_are_ones_that_aws_knows(kind, dry_run):
    """Against botocore's own description of the API, where boto3 is installed."""
    pytest.importorskip("botocore", reason="boto3 is not installed")
    from botocore import xform_name
    from botocore.session import Session
    from botocore.validate import validate_parameters

    alarms = () if kind == "adapter" else ("--alarms", "--alarm-topic", "arn:aws:sns:y")
    calls = dry_run("--model-data", "s3://bucket/model.tar.gz", *KINDS[kind], *alarms)
    session = Session()
    assert calls
    for call in calls:
        service = session.get_service_model(call["service"])
        [operation] = [name for name in service.operation_names if xform_name(name) == call["operation"]]
        shape = service.operation_model(operation).input_shape
        validate_parameters(call["request"], shape)
        check_enums(call["request"], shape)


def check_enums(value, shape):
    """botocore does not."""
    if shape.type_name == "structure":
        for name, inner in value.items():
            check_enums(inner, shape.members[name])
    elif shape.type_name == "list":
        for inner in value:
            check_enums(inner, shape.member)
    elif shape.type_name == "string" and shape.enum:
        assert value in shape.enum


def test_the_answers_of_an_asynchronous_endpoint_are_not_cut_unless_told(dry_run):
    calls = dry_run("--kind", "async", "--async-output", "s3://answers/", "--", "--stream-deadline", "600")
    container = requests_of(calls)["create_model"]["PrimaryContainer"]
    assert container["Environment"] == {"RESPONSE_DEADLINE": "0", "STREAM_DEADLINE": "600.0"}


def test_an_asynchronous_endpoint_says_where_answers_go_and_scales_to_nothing(dry_run):
    calls = dry_run("--kind", "async", "--async-output", "s3://answers/here/", "--autoscale", "0:4")
    requests = requests_of(calls)
    assert requests["create_endpoint_config"]["AsyncInferenceConfig"] == {
        "ClientConfig": {"MaxConcurrentInvocationsPerInstance": 20},
        "OutputConfig": {"S3OutputPath": "s3://answers/here/", "S3FailurePath": "s3://answers/here/failures/"},
    }
    assert requests["register_scalable_target"]["MinCapacity"] == 0
    tracking, stepping = [call["request"] for call in calls if call["operation"] == "put_scaling_policy"]
    metric = tracking["TargetTrackingScalingPolicyConfiguration"]["CustomizedMetricSpecification"]
    assert metric["MetricName"] == "ApproximateBacklogSizePerInstance"
    assert stepping["PolicyType"] == "StepScaling"
    assert requests["put_metric_alarm"]["AlarmActions"] == ["<PolicyARN of weir-from-zero>"]


def test_a_component_asks_for_its_share_and_its_endpoint_has_no_model(dry_run):
    requests = requests_of(
        dry_run(
            "--kind", "component", "--component", "llama", "--copies", "2", "--model-size", "16", "--autoscale", "1:4"
        )
    )
    config = requests["create_endpoint_config"]
    assert config["ExecutionRoleArn"] == ROLE
    [variant] = config["ProductionVariants"]
    assert "ModelName" not in variant
    assert variant["ManagedInstanceScaling"] == {"Status": "ENABLED", "MinInstanceCount": 1, "MaxInstanceCount": 4}
    component = requests["create_inference_component"]
    assert component["RuntimeConfig"] == {"CopyCount": 2}
    assert component["Specification"]["ComputeResourceRequirements"] == {
        "MinMemoryRequiredInMb": 16000,
        "NumberOfAcceleratorDevicesRequired": 1,
    }
    assert component["Specification"]["DataCacheConfig"] == {"EnableCaching": True}


@pytest.mark.parametrize(
    ("arguments", "startup", "download"),
    [
        (("--model-data", "s3://b/m/"), 900, 1800),
        ((), 300, 300),
        (("--model-data", "s3://b/m/", "--model-size", "16"), 460, 620),
        (("--env", "HF_MODEL_ID=a/b", "--model-size", "16"), 780, 620),
        (("--model-data", "s3://b/m/", "--model-size", "500"), 3600, 3600),
        (("--model-data", "s3://b/m/", "--model-size", "16", "--startup-timeout", "99"), 99, 620),
    ],
)
def test_the_timeouts_follow_the_rule_that_help_states(arguments, startup, download, dry_run):
    [variant] = requests_of(dry_run(*arguments))["create_endpoint_config"]["ProductionVariants"]
    clocks = variant["ContainerStartupHealthCheckTimeoutInSeconds"], variant["ModelDataDownloadTimeoutInSeconds"]
    assert clocks == (startup, download)


@pytest.mark.parametrize(
    ("arguments", "ami"),
    [
        ((), "al2023-ami-sagemaker-inference-gpu-4-1"),
        (("--cuda-version", "13.2"), "al2023-ami-sagemaker-inference-gpu-4-1"),
        (("--cuda-version", "12.9"), "al2-ami-sagemaker-inference-gpu-3-1"),
        (("--cuda-version", "12.9", "--ami", "al2-ami-sagemaker-inference-gpu-2"), "al2-ami-sagemaker-inference-gpu-2"),
        (("--instance-type", "ml.c7i.xlarge"), None),
    ],
)
def test_the_machine_image_follows_from_the_cuda_version(arguments, ami, dry_run):
    [variant] = requests_of(dry_run(*arguments))["create_endpoint_config"]["ProductionVariants"]
    assert variant.get("InferenceAmiVersion") == ami


def test_the_image_says_its_cuda_version_where_deploy_looks_for_it():
    label = re.search(r'^CUDA_LABEL = "(.+)"', (SCRIPTS / "endpoint_facts.py").read_text(), re.M)[1]
    dockerfile = (ROOT / "Dockerfile.cuda").read_text()
    assert f"{label}=${{CUDA_VERSION}}" in dockerfile
    major, minor = re.search(r"^ARG CUDA_VERSION=(\d+)\.(\d+)", dockerfile, re.M).groups()
    # Of the build of torch that the image installs.
    assert f"cuda) build=cu{major}{minor}" in (ROOT / "scripts/install_torch.sh").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model-data", "s3://bucket/llama"), "must end in /"),
        (("--model-data", "/tmp/model/"), "s3://"),
        (("--startup-timeout", "4000"), "60 and 3600"),
        (("--env", "NAME"), "NAME=VALUE"),
        (("--env", f"API_KEY={'x' * 1025}"), "@/opt/ml/model/"),
        (("--env", "=x"), "NAME=VALUE"),
        (tuple(f"--env=N{i}={'x' * 1000}" for i in range(40)), "32768 bytes"),
        (("--", "--port", "9"), "PORT cannot be set"),
        (("--", "--max-concurent-requests", "9"), "max-concurrent-requests"),
        (("--kind", "async"), "--async-output"),
        (("--kind", "adapter"), "--adapter-data"),
        (("--kind", "adapter", "--adapter", "a", "--adapter-data", "s3://b/a/"), ".tar.gz"),
        (("--kind", "adapter", "--adapter", "a", "--alarms"), "scales with its component"),
        (("--kind", "component", "--no-wait"), "--no-wait"),
        (("--autoscale", "0:4"), "scale to nothing"),
        (("--autoscale", "4:1"), "MIN:MAX"),
        (("--autoscale", "1:4", "--no-wait"), "--no-wait"),
        (("--update", "--batch-percent", "60"), "between 5 and 50"),
        (("--cuda-version", "11.8"), "--ami"),
        (("--via", "sdk2", "--kind", "component"), "SDK v2"),
    ],
)
def test_what_sagemaker_would_refuse_is_refused_here(arguments, words, run):
    answer = run("deploy", *REQUIRED, "--dry-run", *arguments, expect=2)
    assert words in answer.err
    assert answer.out == ""


def test_an_sdk_that_is_missing_is_named(run, aws):
    assert "pip install 'sagemaker<3'" in run("deploy", *REQUIRED, "--via", "sdk2", aws=aws, expect=2).err
    assert "pip install sagemaker-core" in run("deploy", *REQUIRED, "--via", "sdk3", aws=aws, expect=2).err


def test_the_scripts_are_no_package_and_hide_no_module():
    """An __init__.py would shadow the SageMaker SDK for everybody who starts Python in this directory."""
    assert not (SCRIPTS / "__init__.py").exists()
    names = [path.stem for path in SCRIPTS.glob("*.py")]
    assert "deploy" in names
    assert not set(names) & sys.stdlib_module_names
    # A package that an SDK brings is called invoke; for that the folder leaves the path before an SDK is imported.
    assert {name for name in names if hides_a_package(name)} <= {"invoke"}


def hides_a_package(name):
    found = importlib.util.find_spec(name)
    return found is not None and "site-packages" in str(found.origin)
