"""The deploy scripts against moto: what they send is what a dry run prints, and tearing down leaves nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from deploy.endpoints.conftest import REGION, ROLE, ROOT, SCRIPTS, environ_of

MODEL = "s3://models/llama/"
IMAGE = f"111122223333.dkr.ecr.{REGION}.amazonaws.com/weir:1"
KNOWN = ("--image-uri", IMAGE, "--role-arn", ROLE, "--model-size", "16", "--cuda-version", "13.0", "--region", REGION)
GPU = ("--instance-type", "ml.g4dn.xlarge", "--poll", "0.01")  # the newest type that moto knows
KINDS = {
    "realtime": ("--model-data", MODEL, "--autoscale", "1:4", "--alarms"),
    "async": ("--model-data", MODEL, "--async-output", "s3://answers/", "--autoscale", "0:3", "--alarms"),
    "component": ("--model-data", MODEL, "--autoscale", "0:3", "--copies", "2", "--alarms", "--component", "llama"),
}


def camel(operation):
    return "".join(word.capitalize() for word in operation.split("_"))


def printed_calls(out):
    """Of a dry run, without questions."""
    asked = [(camel(call["operation"]), call["request"]) for call in json.loads(out)]
    return [call for call in asked if not call[0].startswith("Describe")]


def without_arns(calls, owner):
    """A dry run cannot know what an answer will tell."""
    arn = r"arn:aws:autoscaling:[^\"]+"
    return [
        (name, json.loads(re.sub(arn, f"<PolicyARN of {owner}-from-zero>", json.dumps(call)))) for name, call in calls
    ]


@pytest.fixture
def deploy(run, aws):
    def deploy(*arguments, **keywords):
        return run("deploy", *KNOWN, *GPU, *arguments, aws=aws, **keywords)

    return deploy


def what_is_there(aws):
    sagemaker, scaling = aws.client("sagemaker"), aws.client("application-autoscaling")
    return {
        "endpoints": [each["EndpointName"] for each in sagemaker.list_endpoints()["Endpoints"]],
        "configs": [each["EndpointConfigName"] for each in sagemaker.list_endpoint_configs()["EndpointConfigs"]],
        "models": [each["ModelName"] for each in sagemaker.list_models()["Models"]],
        "components": sorted(aws.components),
        "targets": [
            each["ResourceId"]
            for each in scaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
        ]
        + [name for targets, _ in aws.scaled.values() for name in targets],
        "policies": [
            each["PolicyName"]
            for each in scaling.describe_scaling_policies(ServiceNamespace="sagemaker")["ScalingPolicies"]
        ]
        + [name for _, policies in aws.scaled.values() for name in policies],
        "alarms": sorted(
            each["AlarmName"]
            for each in aws.client("cloudwatch").describe_alarms()["MetricAlarms"]
            if not each["AlarmName"].startswith("TargetTracking-")  # application autoscaling's own, which it removes
        ),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_sent_is_what_a_dry_run_prints_and_nothing_is_left(kind, run, deploy, aws):
    printed = run("deploy", *KNOWN, *GPU, "--kind", kind, *KINDS[kind], "--dry-run")
    assert printed.err == ""
    asked = deploy("--kind", kind, *KINDS[kind]).out
    owner = "llama" if kind == "component" else "weir"
    assert without_arns(aws.changes(), owner) == printed_calls(printed.out)
    assert "invoke.py --name weir" in asked

    there = what_is_there(aws)
    assert there["endpoints"] == there["configs"] == ["weir"]
    assert there["targets"] == [
        "inference-component/llama" if kind == "component" else "endpoint/weir/variant/AllTraffic"
    ]
    assert f"{owner}-concurrency" in there["policies"]
    assert {f"{owner}-5xx", f"{owner}-latency"} <= set(there["alarms"])
    if kind != "realtime":
        [alarm] = aws.client("cloudwatch").describe_alarms(AlarmNames=[f"{owner}-from-zero"])["MetricAlarms"]
        [action] = alarm["AlarmActions"]
        assert action.startswith("arn:aws:autoscaling:")

    assert "Nothing was removed" in run("teardown", "--dry-run", aws=aws).out
    assert "Nothing was removed" in run("teardown", aws=aws, answer="n\n", expect=1).out
    assert "--yes" in run("teardown", aws=aws, expect=1).err
    assert what_is_there(aws) == there
    run("teardown", "--poll", "0.01", aws=aws, answer="y\n")
    assert not any(what_is_there(aws).values()), what_is_there(aws)
    assert "There is nothing" in run("teardown", "--yes", aws=aws).out


def test_neighbours_with_names_alike_are_left_alone(run, deploy, aws):
    deploy("--name", "weir", "--alarms")
    deploy("--name", "weir-2", "--alarms", "--autoscale", "1:2")
    run("teardown", "--name", "weir", "--yes", "--poll", "0.01", aws=aws)
    there = what_is_there(aws)
    assert there["endpoints"] == there["configs"] == there["models"] == ["weir-2"]
    assert there["policies"] == ["weir-2-concurrency"]
    assert all(name.startswith("weir-2-") for name in there["alarms"])


def test_an_adapter_comes_and_goes_without_its_component(run, deploy, aws):
    deploy("--kind", "component", "--component", "llama")
    aws.calls.clear()
    run("deploy", "--kind", "adapter", "--component", "llama", "--adapter", "french", "--poll", "0.01",
        "--adapter-data", "s3://models/french.tar.gz", aws=aws)  # fmt: skip
    assert aws.changes() == [
        (
            "CreateInferenceComponent",
            {
                "InferenceComponentName": "french",
                "EndpointName": "weir",
                "Specification": {
                    "BaseInferenceComponentName": "llama",
                    "Container": {"ArtifactUrl": "s3://models/french.tar.gz"},
                },
            },
        )
    ]
    run("teardown", "--component", "french", "--yes", "--poll", "0.01", aws=aws)
    assert sorted(aws.components) == ["llama"]
    run("deploy", "--kind", "adapter", "--component", "llama", "--adapter", "french", "--poll", "0.01",
        "--adapter-data", "s3://models/french.tar.gz", aws=aws)  # fmt: skip
    # The adapter first: the platform refuses to remove a component that adapters stand on.
    run("teardown", "--yes", "--poll", "0.01", aws=aws)
    assert not any(what_is_there(aws).values())


def test_a_second_component_joins_an_endpoint_and_leaves_it(run, deploy, aws):
    deploy("--kind", "component", "--component", "first")
    deploy("--kind", "component", "--component", "second", "--existing-endpoint")
    assert what_is_there(aws)["models"] == ["first", "second"]
    run("teardown", "--component", "second", "--yes", "--poll", "0.01", aws=aws)
    there = what_is_there(aws)
    assert (there["components"], there["models"], there["endpoints"]) == (["first"], ["first"], ["weir"])


def test_timeouts_and_machine_image_follow_from_what_s3_and_ecr_say(run, aws):
    s3, ecr = aws.client("s3"), aws.client("ecr")
    s3.create_bucket(Bucket="models", CreateBucketConfiguration={"LocationConstraint": REGION})
    s3.put_object(Bucket="models", Key="llama/config.json", Body=b"{}")
    s3.put_object(Bucket="models", Key="llama/model.safetensors", Body=bytes(120_000_000))
    s3.put_object(Bucket="models", Key="llama-2/model.safetensors", Body=bytes(1_000_000))
    label = {"com.amazonaws.sagemaker.inference.cuda.verified_versions": "12.4,12.9"}
    s3.put_object(
        Bucket="models", Key="blob", Body=json.dumps({"config": {"Labels": label}}).encode(), ACL="public-read"
    )
    aws.answers["GetDownloadUrlForLayer"] = [{"downloadUrl": f"{aws.url}/models/blob"}]
    ecr.create_repository(repositoryName="weir")
    digest = "sha256:" + "1" * 64
    manifest = {"schemaVersion": 2, "config": {"digest": digest}, "layers": []}
    manifest["mediaType"] = "application/vnd.docker.distribution.manifest.v2+json"
    ecr.put_image(repositoryName="weir", imageTag="1", imageManifest=json.dumps(manifest))
    aws.answers["BatchGetImage"] = [{"images": [{"imageManifest": json.dumps(manifest)}], "failures": []}]

    done = run("deploy", "--image-uri", IMAGE, "--role-arn", ROLE, "--model-data", MODEL, *GPU, aws=aws)
    assert f"{IMAGE}: CUDA 12.9, al2-ami-sagemaker-inference-gpu-3-1" in done.err
    [variant] = dict(aws.changes())["CreateEndpointConfig"]["ProductionVariants"]
    assert variant["InferenceAmiVersion"] == "al2-ami-sagemaker-inference-gpu-3-1"
    assert variant["ModelDataDownloadTimeoutInSeconds"] == 303  # 120 MB and a little at 50 MB/s, and 300
    assert variant["ContainerStartupHealthCheckTimeoutInSeconds"] == 302
    assert dict(aws.calls)["GetDownloadUrlForLayer"]["layerDigest"] == digest


def test_a_model_that_would_fail_the_deployment_is_refused_before(run, aws):
    s3 = aws.client("s3")
    s3.create_bucket(Bucket="models", CreateBucketConfiguration={"LocationConstraint": REGION})
    arguments = ("--image-uri", "image:1", "--role-arn", ROLE, "--model-data", MODEL)
    assert "There is nothing at s3://models/llama/" in run("deploy", *arguments, aws=aws, expect=2).err
    s3.put_object(Bucket="models", Key="llama/", Body=b"")
    s3.put_object(Bucket="models", Key="llama/config.json", Body=b"{}")
    assert "stands for a folder" in run("deploy", *arguments, aws=aws, expect=2).err
    assert aws.changes() == []


FAILED = {
    "EndpointName": "weir",
    "EndpointArn": "arn:aws:sagemaker:x",
    "EndpointStatus": "Failed",
    "CreationTime": 0,
    "LastModifiedTime": 0,
    "FailureReason": "The primary container for production variant AllTraffic did not pass the ping health check.",
}


def test_a_failure_shows_the_reason_the_end_of_the_log_a_hint_and_what_is_left(run, deploy, aws):
    logs = aws.client("logs")
    group = "/aws/sagemaker/Endpoints/weir"
    logs.create_log_group(logGroupName=group)
    logs.create_log_stream(logGroupName=group, logStreamName="AllTraffic/i-1")
    now = int(time.time() * 1000)
    lines = [{"timestamp": now + i, "message": f"line {i}"} for i in range(60)]
    lines.append({"timestamp": now + 60, "message": "CUDA out of memory"})
    logs.put_log_events(logGroupName=group, logStreamName="AllTraffic/i-1", logEvents=lines)
    aws.answers["DescribeEndpoint"] = [FAILED | {"EndpointStatus": "Creating"}, FAILED]
    said = deploy("--alarms", expect=1).err
    assert "weir: Creating, 0:00" in said
    assert "did not pass the ping health check" in said
    assert "  line 59\n  CUDA out of memory" in said
    assert "line 10\n" not in said  # the end only
    assert "weir plan MODEL" in said
    assert "--startup-timeout" in said
    assert "endpoint weir, which costs money" in said
    [command] = re.findall(r"^  python sagemaker/(teardown).py (.+)$", said, re.M)
    assert "PutMetricAlarm" not in str(aws.changes())
    del aws.answers["DescribeEndpoint"]
    run(command[0], *command[1].split(), "--logs", "--yes", "--poll", "0.01", aws=aws)
    assert not any(what_is_there(aws).values())
    assert logs.describe_log_groups()["logGroups"] == []


def test_no_log_at_all_points_at_the_driver(deploy, aws):
    aws.answers["DescribeEndpoint"] = [FAILED]
    assert "--cuda-version or --ami" in deploy(expect=1).err


def test_a_refused_call_leaves_word_of_what_was_made_before(deploy, run, aws):
    message = "The account-level service limit 'ml.g4dn.xlarge for endpoint usage' is 0 Instances"
    aws.answers["CreateEndpoint"] = [(400, {"__type": "ResourceLimitExceeded", "message": message})]
    said = deploy(expect=1).err
    assert message in said
    assert "Service Quotas" in said
    assert "There may be now:\n  model weir\n  endpoint configuration weir\nTo remove it:" in said
    run("teardown", "--yes", aws=aws)
    assert not any(what_is_there(aws).values())


def test_a_missing_permission_points_at_the_policy_and_nothing_was_made(deploy, aws):
    message = "User: arn:aws:iam::1:user/x is not authorized to perform: sagemaker:CreateModel"
    aws.answers["CreateModel"] = [(400, {"__type": "AccessDeniedException", "message": message})]
    said = deploy(expect=1).err
    assert "docs/iam/deployer.json" in said
    assert said.endswith("Nothing was made.\n")


def test_what_cannot_be_removed_is_said(deploy, run, aws):
    deploy("--kind", "component")
    aws.answers["DeleteInferenceComponent"] = [{}]
    there = aws.components["weir"] | {"InferenceComponentArn": "arn", "CreationTime": 0, "LastModifiedTime": 0}
    failed = there | {"InferenceComponentStatus": "Failed", "FailureReason": "in use"}
    going = there | {"InferenceComponentStatus": "Deleting"}
    aws.answers["DescribeInferenceComponent"] = [going, going, failed]
    assert "could not be removed: in use" in run("teardown", "--yes", "--poll", "0.01", aws=aws, expect=1).err
    assert what_is_there(aws)["endpoints"] == ["weir"]


def test_who_interrupts_is_told_what_goes_on_and_how_to_end_it(aws, tmp_path):
    aws.answers["DescribeEndpoint"] = [FAILED | {"EndpointStatus": "Creating"}]
    command = [sys.executable, SCRIPTS / "deploy.py", *KNOWN, *GPU]
    with subprocess.Popen(
        command, env=environ_of(tmp_path, aws), cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        said = ""
        while "Creating" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        os.kill(process.pid, signal.SIGINT)
        said += process.stderr.read()
    assert process.returncode == 1
    assert "goes on at AWS" in said
    assert "endpoint weir, which costs money" in said
    assert "teardown.py --name weir" in said


def endpoint(status, config):
    return {key: value for key, value in FAILED.items() if key != "FailureReason"} | {
        "EndpointStatus": status,
        "EndpointConfigName": config,
    }


def test_a_rolling_update_replaces_model_and_configuration_and_removes_the_former(deploy, aws):
    deploy()
    fresh = []  # the new configuration's name, which has the time in it
    aws.answers["UpdateEndpoint"] = [{"EndpointArn": "arn:aws:sagemaker:x"}]
    original = aws.own_answer

    def own_answer(operation, request):
        if operation == "UpdateEndpoint":
            fresh.append(request["EndpointConfigName"])
            aws.answers["DescribeEndpoint"] = [
                endpoint("InService", "weir"),  # it does not show at once
                endpoint("Updating", "weir"),
                endpoint("InService", fresh[0]),
            ]
        return original(operation, request)

    aws.own_answer = own_answer
    aws.calls.clear()
    deploy("--update", "--alarms", "--batch-percent", "10")
    [name] = fresh
    assert re.fullmatch(r"weir-\d{14}", name)
    assert [operation for operation, _ in aws.changes()] == [
        *["PutMetricAlarm"] * 4, "CreateModel", "CreateEndpointConfig", "UpdateEndpoint",
        "DeleteEndpointConfig", "DeleteModel",
    ]  # fmt: skip
    size = {"Type": "CAPACITY_PERCENT", "Value": 10}
    assert dict(aws.changes())["UpdateEndpoint"] == {
        "EndpointName": "weir",
        "EndpointConfigName": name,
        "RetainAllVariantProperties": True,
        "DeploymentConfig": {
            "RollingUpdatePolicy": {
                "MaximumBatchSize": size,
                "WaitIntervalInSeconds": 120,
                "RollbackMaximumBatchSize": size,
            },
            "AutoRollbackConfiguration": {"Alarms": [{"AlarmName": "weir-5xx"}, {"AlarmName": "weir-latency"}]},
        },
    }
    there = what_is_there(aws)
    assert there["configs"] == there["models"] == [name]


def test_an_update_that_is_rolled_back_removes_nothing_that_is_in_use(deploy, run, aws):
    deploy()
    aws.answers["UpdateEndpoint"] = [{"EndpointArn": "arn:aws:sagemaker:x"}]
    in_service = endpoint("InService", "weir")
    aws.answers["DescribeEndpoint"] = [
        in_service,
        endpoint("Updating", "weir"),
        endpoint("RollingBack", "weir"),
        in_service,
    ]
    said = deploy("--update", expect=1).err
    assert "rolled back" in said
    assert "teardown.py --name weir --region eu-west-1 --unused" in said
    assert len(what_is_there(aws)["models"]) == 2
    run("teardown", "--unused", "--yes", aws=aws)
    there = what_is_there(aws)
    assert there["configs"] == there["models"] == there["endpoints"] == ["weir"]


def test_a_component_is_updated_in_place(deploy, aws):
    deploy("--kind", "component", "--component", "llama")
    deploy("--kind", "component", "--component", "llama", "--update")
    [model] = what_is_there(aws)["models"]
    assert re.fullmatch(r"llama-\d{14}", model)
    assert aws.components["llama"]["Specification"]["ModelName"] == model
