"""The policies in docs/iam: well formed, no wider than they must be, and wide enough for every call of the scripts."""

import fnmatch
import json
import re

import pytest
from deploy.endpoints.conftest import ROOT, SCRIPTS
from deploy.endpoints.test_deploy import KINDS, REQUIRED

POLICIES = sorted((ROOT / "docs/iam").glob("*.json"))
# Actions that cannot be limited to a resource, or whose resources have no names of ours.
EVERYWHERE = {
    "ecr:GetAuthorizationToken", "cloudwatch:PutMetricData",
    "sagemaker:ListEndpointConfigs", "sagemaker:ListInferenceComponents", "sagemaker:ListModels",
    "application-autoscaling:*", "cloudwatch:*Alarm*",
}  # fmt: skip
PREFIXES = {"application-autoscaling", "cloudwatch", "ecr", "iam", "logs", "s3", "sagemaker", "sns", "sts"}
# boto3's call, and the action that allows it where the two differ.
NAMED_OTHERWISE = {
    "s3:ListObjectsV2": "s3:ListBucket",
    "sagemaker:InvokeEndpointWithResponseStream": "sagemaker:InvokeEndpoint",
}


def listed(value):
    return value if isinstance(value, list) else [value]


def actions(policy):
    return {action for statement in policy["Statement"] for action in listed(statement["Action"])}


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
def test_a_policy_is_well_formed_and_no_wider_than_it_must_be(path):
    text = path.read_text()
    policy = json.loads(text)
    assert policy["Version"] == "2012-10-17"
    assert len(json.dumps(policy, separators=(",", ":"))) <= 6144  # the longest managed policy
    sids = [statement["Sid"] for statement in policy["Statement"]]
    assert len(set(sids)) == len(sids)
    assert all(re.fullmatch(r"[A-Za-z0-9]+", sid) for sid in sids)
    for statement in policy["Statement"]:
        assert set(statement) <= {"Sid", "Effect", "Action", "Resource", "Principal", "Condition"}
        assert statement["Effect"] == "Allow"
        assert ("Principal" in statement) != ("Resource" in statement)
        for action in listed(statement["Action"]):
            assert re.fullmatch(r"[a-z0-9-]+:[A-Z][A-Za-z]+", action), action  # and so without wildcards
            assert action.partition(":")[0] in PREFIXES
            if "*" in listed(statement.get("Resource", [])):
                assert any(fnmatch.fnmatchcase(action, pattern) for pattern in EVERYWHERE), action
        for resource in listed(statement.get("Resource", [])):
            assert resource == "*" or re.fullmatch(r"arn:aws:[a-z0-9-]+:[^:]*:[^:]*:.+", resource)


def test_whoever_deploys_may_make_every_call_of_the_scripts(run):
    pytest.importorskip("botocore", reason="boto3 is not installed")
    from botocore import xform_name
    from botocore.session import Session

    calls = set()
    for kind in KINDS.values():
        alarms = () if "adapter" in kind else ("--alarms",)
        printed = json.loads(run("deploy", *REQUIRED, "--dry-run", *kind, *alarms).out)
        calls |= {(call["service"], call["operation"]) for call in printed}
    session, needed = Session(), set()
    for service in {service for service, _ in calls} | {"ecr", "logs", "s3", "sagemaker-runtime"}:
        for operation in session.get_service_model(service).operation_names:
            source = "\n".join(path.read_text() for path in SCRIPTS.glob("*.py"))
            asked = re.search(rf"\.{xform_name(operation)}\(|\"{xform_name(operation)}\"", source)
            if (service, xform_name(operation)) in calls or (asked and service != "s3"):
                action = f"{service.replace('-runtime', '')}:{operation}"
                needed.add(NAMED_OTHERWISE.get(action, action))
    needed |= {f"sagemaker:Delete{noun}" for noun in ("Model", "Endpoint", "EndpointConfig", "InferenceComponent")}
    needed |= {"s3:ListBucket", "s3:GetObject", "iam:PassRole"}
    allowed = actions(json.loads((ROOT / "docs/iam/deployer.json").read_text()))
    assert len(needed) > 25
    assert needed - allowed == set()
