"""The calls that scale an endpoint or a component with its load, and that raise alarms about it, as plain data.

It must not know boto3, or how what it scales was made.
"""

from collections.abc import Mapping
from typing import Any

from endpoint_requests import VARIANT, Step

ALARM_SUFFIXES = ("5xx", "latency", "first-token", "stream-errors", "from-zero")
_NAMESPACE = "AWS/SageMaker"
_MICROSECONDS = 1_000_000


def scalable(kind: str, name: str) -> dict[str, str]:
    """What is scaled, as Application Auto Scaling names it."""
    if kind == "component":
        resource, dimension = f"inference-component/{name}", "sagemaker:inference-component:DesiredCopyCount"
    else:
        resource, dimension = f"endpoint/{name}/variant/{VARIANT}", "sagemaker:variant:DesiredInstanceCount"
    return {"ServiceNamespace": "sagemaker", "ResourceId": resource, "ScalableDimension": dimension}


def scaling(kind: str, name: str, bounds: tuple[int, int], target: float) -> list[Step]:
    """The calls that keep `target` requests per instance or copy (asynchronous: waiting ones).

    Args:
        kind: realtime, async or component.
        name: of the endpoint, or of the component.
        bounds: fewest and most instances or copies. From zero it takes a second policy and an alarm, since nothing
            that is not there measures its load.
    """
    least, most = bounds
    subject = scalable(kind, name)
    concurrency = f"{name}-concurrency"
    policy = subject | {
        "PolicyName": concurrency,
        "PolicyType": "TargetTrackingScaling",
        "TargetTrackingScalingPolicyConfiguration": {
            "TargetValue": target,
            **_metric(kind, name),
            "ScaleInCooldown": 300,
            "ScaleOutCooldown": 60,
        },
    }
    register = subject | {"MinCapacity": least, "MaxCapacity": most}
    steps = [
        Step("application-autoscaling", "register_scalable_target", register, makes=f"scaling of {name}"),
        Step("application-autoscaling", "put_scaling_policy", policy),
    ]
    return steps + (_from_zero(kind, name, subject) if least == 0 else [])


def alarms(kind: str, name: str, latency_s: float, first_token_s: float, topic: str | None) -> list[Step]:
    """The calls that make the alarms.

    Args:
        kind: realtime, async or component.
        name: of the endpoint, or of the component.
        latency_s: what nine of ten answers must stay below, in seconds.
        first_token_s: likewise the first part of a stream.
        topic: whom to tell, an SNS topic's ARN.
    """
    wanted: list[tuple[str, str, dict[str, Any], float]] = [
        ("5xx", "Invocation5XXErrors", {"Statistic": "Sum"}, 1),
        ("latency", "ModelLatency", {"ExtendedStatistic": "p90"}, latency_s * _MICROSECONDS),
    ]
    if kind != "async":  # which has no streams
        wanted += [
            ("first-token", "FirstChunkModelLatency", {"ExtendedStatistic": "p90"}, first_token_s * _MICROSECONDS),
            ("stream-errors", "MidStreamErrors", {"Statistic": "Sum"}, 1),
        ]
    told = {"AlarmActions": [topic]} if topic else {}
    return [
        _alarm(name, suffix, metric, threshold, _dimensions(kind, name), statistic | told)
        for suffix, metric, statistic, threshold in wanted
    ]


def _alarm(
    name: str, suffix: str, metric: str, threshold: float, dimensions: list[dict[str, str]], more: Mapping[str, Any]
) -> Step:
    request = {
        "AlarmName": f"{name}-{suffix}",
        "Namespace": _NAMESPACE,
        "MetricName": metric,
        "Dimensions": dimensions,
        "Period": 60,
        "EvaluationPeriods": 2,
        "DatapointsToAlarm": 2,
        "Threshold": threshold,
        "ComparisonOperator": "GreaterThanOrEqualToThreshold",
        "TreatMissingData": "missing" if suffix == "from-zero" else "notBreaching",
        **more,
    }
    return Step("cloudwatch", "put_metric_alarm", request, makes=f"alarm {name}-{suffix}")


def _dimensions(kind: str, name: str) -> list[dict[str, str]]:
    if kind == "component":
        return [{"Name": "InferenceComponentName", "Value": name}]
    return [{"Name": "EndpointName", "Value": name}, {"Name": "VariantName", "Value": VARIANT}]


def _metric(kind: str, name: str) -> dict[str, Any]:
    if kind == "async":
        metric: dict[str, Any] = {"MetricName": "ApproximateBacklogSizePerInstance", "Namespace": _NAMESPACE}
        metric |= {"Dimensions": [{"Name": "EndpointName", "Value": name}], "Statistic": "Average"}
        return {"CustomizedMetricSpecification": metric}
    predefined = {
        "realtime": "SageMakerVariantConcurrentRequestsPerModelHighResolution",
        "component": "SageMakerInferenceComponentConcurrentRequestsPerCopyHighResolution",
    }
    return {"PredefinedMetricSpecification": {"PredefinedMetricType": predefined[kind]}}


def _from_zero(kind: str, name: str, subject: Mapping[str, str]) -> list[Step]:
    policy_name = f"{name}-from-zero"
    arn = f"<PolicyARN of {policy_name}>"
    waiting = kind == "async"
    policy = dict(subject) | {
        "PolicyName": policy_name,
        "PolicyType": "StepScaling",
        "StepScalingPolicyConfiguration": {
            "AdjustmentType": "ChangeInCapacity",
            "MetricAggregationType": "Average" if waiting else "Maximum",
            "Cooldown": 300 if waiting else 60,
            "StepAdjustments": [{"MetricIntervalLowerBound": 0.0, "ScalingAdjustment": 1}],
        },
    }
    metric = "HasBacklogWithoutCapacity" if waiting else "NoCapacityInvocationFailures"
    dimension = "EndpointName" if waiting else "InferenceComponentName"
    more: dict[str, Any] = {"Statistic": "Average" if waiting else "Maximum", "AlarmActions": [arn]}
    more |= {} if waiting else {"EvaluationPeriods": 1, "DatapointsToAlarm": 1}
    return [
        Step("application-autoscaling", "put_scaling_policy", policy, gives={arn: "PolicyARN"}),
        _alarm(name, "from-zero", metric, 1, [{"Name": dimension, "Value": name}], more),
    ]
