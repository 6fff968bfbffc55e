"""The calls of AWS's API that make an endpoint, a component or an adapter, as plain data in their order.

It must not know boto3, the SDKs or the network: what is printed in a dry run is what is sent otherwise.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from endpoint_facts import Facts, ami_of, has_gpu, timeouts
from serving.errors import ConfigurationError

VARIANT = "AllTraffic"
LEAST_MEMORY_MB = 4096
ROUTING = {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"}
FORMER_CONFIG = "<EndpointConfigName of describe_endpoint>"
FORMER_MODEL = "<ModelName of what is replaced>"


@dataclasses.dataclass(frozen=True)
class Step:
    """One call, or with `until` one that is repeated until its answer says so.

    Attributes:
        service: boto3's name of the service.
        operation: boto3's name of the call.
        request: its parameters; a text in angle brackets stands for what an earlier call answers.
        until: members of the answer and what they must be in the end; the first is the status.
        gives: texts in angle brackets and where in the answer they are found, with dots.
        makes: what stays behind when a later call fails; what costs money says so.
    """

    service: str
    operation: str
    request: Mapping[str, Any]
    until: Mapping[str, str] | None = None
    gives: Mapping[str, str] | None = None
    makes: str | None = None

    def printed(self) -> dict[str, Any]:
        """For a dry run."""
        shown = {"service": self.service, "operation": self.operation, "request": dict(self.request)}
        return shown | ({"until": dict(self.until)} if self.until else {})


def creation(options: argparse.Namespace, facts: Facts, environment: Mapping[str, str]) -> list[Step]:
    """The calls for `options.kind`, with waiting where a later call needs it. Raises ConfigurationError."""
    if options.kind == "adapter":
        return _adapter(options)
    if options.kind == "component":
        base = (
            [] if options.existing_endpoint else [*_endpoint(options, facts, options.name, None), in_service(options)]
        )
        return [*base, _model(options, environment, options.component), *_component(options, facts)]
    model = _model(options, environment, options.name)
    return [
        model,
        *_endpoint(options, facts, options.name, options.name),
        *([in_service(options)] if options.wait else []),
    ]


def replacement(options: argparse.Namespace, facts: Facts, environment: Mapping[str, str], stamp: str) -> list[Step]:
    """The calls of a rolling update, up to the removal of what it replaced.

    Args:
        stamp: distinguishes the new model and configuration from the former ones, which have to stay meanwhile.
    """
    if options.kind == "adapter":
        raise ConfigurationError("An adapter cannot be updated: tear it down and deploy it anew.")
    if options.kind == "component":
        return _component_replacement(options, facts, environment, f"{options.component}-{stamp}")
    fresh = f"{options.name}-{stamp}"
    model, config, _ = [_model(options, environment, fresh), *_endpoint(options, facts, fresh, fresh)]
    update: dict[str, Any] = {
        "EndpointName": options.name,
        "EndpointConfigName": fresh,
        "RetainAllVariantProperties": True,  # as many instances as autoscaling has come to
        "DeploymentConfig": _rolling(options, "CAPACITY_PERCENT", options.name),
    }
    if options.instance_count is not None:
        update["ExcludeRetainedVariantProperties"] = [{"VariantPropertyType": "DesiredInstanceCount"}]
    endpoint = {"EndpointName": options.name}
    return [
        Step("sagemaker", "describe_endpoint", endpoint, gives={FORMER_CONFIG: "EndpointConfigName"}),
        Step(
            "sagemaker",
            "describe_endpoint_config",
            {"EndpointConfigName": FORMER_CONFIG},
            gives={FORMER_MODEL: "ProductionVariants.0.ModelName"},
        ),
        model,
        config,
        Step("sagemaker", "update_endpoint", update),
        dataclasses.replace(in_service(options), until={"EndpointStatus": "InService", "EndpointConfigName": fresh}),
        Step("sagemaker", "delete_endpoint_config", {"EndpointConfigName": FORMER_CONFIG}),
        Step("sagemaker", "delete_model", {"ModelName": FORMER_MODEL}),
    ]


def in_service(options: argparse.Namespace) -> Step:
    """Waits for the endpoint."""
    return Step("sagemaker", "describe_endpoint", {"EndpointName": options.name}, until={"EndpointStatus": "InService"})


def _model(options: argparse.Namespace, environment: Mapping[str, str], name: str) -> Step:
    container: dict[str, Any] = {"Image": options.image_uri, "Environment": dict(environment)}
    if options.model_data:
        container["ModelDataSource"] = {"S3DataSource": _s3_source(options.model_data)}
    request = {"ModelName": name, "ExecutionRoleArn": options.role_arn, "PrimaryContainer": container}
    return Step("sagemaker", "create_model", request, makes=f"model {name}")


def _endpoint(options: argparse.Namespace, facts: Facts, config_name: str, model_name: str | None) -> list[Step]:
    config: dict[str, Any] = {
        "EndpointConfigName": config_name,
        "ProductionVariants": [_variant(options, facts, model_name)],
    }
    if model_name is None:
        config["ExecutionRoleArn"] = options.role_arn
    if options.kind == "async":
        config["AsyncInferenceConfig"] = _asynchronous(options)
    return [
        Step("sagemaker", "create_endpoint_config", config, makes=f"endpoint configuration {config_name}"),
        Step(
            "sagemaker",
            "create_endpoint",
            {"EndpointName": options.name, "EndpointConfigName": config_name},
            makes=f"endpoint {options.name}, which costs money while it exists",
        ),
    ]


def _variant(options: argparse.Namespace, facts: Facts, model_name: str | None) -> dict[str, Any]:
    count = options.instance_count or 1
    variant: dict[str, Any] = {
        "VariantName": VARIANT,
        "InstanceType": options.instance_type,
        "InitialInstanceCount": count,
        **_clocks(options, facts),
    }
    if options.kind != "async":  # whose requests are taken from a queue
        variant["RoutingConfig"] = ROUTING
    if model_name:
        variant["ModelName"] = model_name
    else:
        least, most = options.autoscale or (count, count)
        most = max(most, count)
        variant["ManagedInstanceScaling"] = {"Status": "ENABLED", "MinInstanceCount": least, "MaxInstanceCount": most}
    if ami := options.ami or ami_of(facts.cuda_version, options.instance_type):
        variant["InferenceAmiVersion"] = ami
    return variant


def _clocks(options: argparse.Namespace, facts: Facts) -> dict[str, int]:
    startup, download = timeouts(facts.model_bytes, in_s3=bool(options.model_data))
    return {
        "ContainerStartupHealthCheckTimeoutInSeconds": _within(options.startup_timeout or startup, "--startup-timeout"),
        "ModelDataDownloadTimeoutInSeconds": _within(options.download_timeout or download, "--download-timeout"),
    }


def _asynchronous(options: argparse.Namespace) -> dict[str, Any]:
    if not options.async_output:
        raise ConfigurationError("--kind async needs --async-output s3://bucket/prefix/.")
    output: dict[str, Any] = {"S3OutputPath": options.async_output}
    output["S3FailurePath"] = options.async_failures or options.async_output.rstrip("/") + "/failures/"
    topics = {"SuccessTopic": options.success_topic, "ErrorTopic": options.error_topic}
    if given := {name: topic for name, topic in topics.items() if topic}:
        output["NotificationConfig"] = given
    return {
        "ClientConfig": {"MaxConcurrentInvocationsPerInstance": options.async_concurrency},
        "OutputConfig": output,
    }


def _component(options: argparse.Namespace, facts: Facts) -> list[Step]:
    request = {
        "InferenceComponentName": options.component,
        "EndpointName": options.name,
        "VariantName": VARIANT,
        "Specification": _specification(options, facts, options.component),
        "RuntimeConfig": {"CopyCount": options.copies},
    }
    made = f"inference component {options.component}"
    create = Step("sagemaker", "create_inference_component", request, makes=made)
    return [create, *([component_in_service(options.component)] if options.wait else [])]


def _specification(options: argparse.Namespace, facts: Facts, model_name: str) -> dict[str, Any]:
    memory = options.memory or max(LEAST_MEMORY_MB, (facts.model_bytes or 0) // 1_000_000)
    needs: dict[str, Any] = {"MinMemoryRequiredInMb": memory}
    accelerators = options.accelerators
    if accelerators is None:
        accelerators = int(has_gpu(options.instance_type))
    if accelerators:
        needs["NumberOfAcceleratorDevicesRequired"] = accelerators
    if options.cpus:
        needs["NumberOfCpuCoresRequired"] = options.cpus
    return {
        "ModelName": model_name,
        "ComputeResourceRequirements": needs,
        "StartupParameters": _clocks(options, facts),
        "DataCacheConfig": {"EnableCaching": True},  # a further copy finds image and model on the instance
    }


def component_in_service(name: str) -> Step:
    """Waits for an inference component."""
    return Step(
        "sagemaker",
        "describe_inference_component",
        {"InferenceComponentName": name},
        until={"InferenceComponentStatus": "InService"},
    )


def _component_replacement(
    options: argparse.Namespace, facts: Facts, environment: Mapping[str, str], fresh: str
) -> list[Step]:
    component = {"InferenceComponentName": options.component}
    update = component | {
        "Specification": _specification(options, facts, fresh),
        "DeploymentConfig": _rolling(options, "CAPACITY_PERCENT", options.component),
    }
    waiting = component_in_service(options.component)
    expected = {"InferenceComponentStatus": "InService", "Specification.ModelName": fresh}
    return [
        Step(
            "sagemaker",
            "describe_inference_component",
            component,
            gives={FORMER_MODEL: "Specification.ModelName"},
        ),
        _model(options, environment, fresh),
        Step("sagemaker", "update_inference_component", update),
        dataclasses.replace(waiting, until=expected),
        Step("sagemaker", "delete_model", {"ModelName": FORMER_MODEL}),
    ]


def _rolling(options: argparse.Namespace, unit: str, owner: str) -> dict[str, Any]:
    if not 5 <= options.batch_percent <= 50:
        raise ConfigurationError("--batch-percent must lie between 5 and 50.")
    size = {"Type": unit, "Value": options.batch_percent}
    policy = {"MaximumBatchSize": size, "WaitIntervalInSeconds": options.batch_wait, "RollbackMaximumBatchSize": size}
    rolling: dict[str, Any] = {"RollingUpdatePolicy": policy}
    if options.alarms:
        alarms = [{"AlarmName": f"{owner}-{suffix}"} for suffix in ("5xx", "latency")]
        rolling["AutoRollbackConfiguration"] = {"Alarms": alarms}
    return rolling


def _adapter(options: argparse.Namespace) -> list[Step]:
    if not (options.adapter and options.adapter_data):
        raise ConfigurationError("--kind adapter needs --adapter NAME and --adapter-data s3://.../adapter.tar.gz.")
    if not (options.adapter_data.startswith("s3://") and options.adapter_data.endswith(".tar.gz")):
        raise ConfigurationError("--adapter-data must be an s3:// address that ends in .tar.gz.")
    request = {
        "InferenceComponentName": options.adapter,
        "EndpointName": options.name,
        "Specification": {
            "BaseInferenceComponentName": options.component,
            "Container": {"ArtifactUrl": options.adapter_data},
        },
    }
    made = f"adapter component {options.adapter}"
    create = Step("sagemaker", "create_inference_component", request, makes=made)
    return [create, *([component_in_service(options.adapter)] if options.wait else [])]


def _within(seconds: int, flag: str) -> int:
    if not 60 <= seconds <= 3600:
        raise ConfigurationError(f"{flag} must lie between 60 and 3600 seconds.")
    return seconds


def _s3_source(uri: str) -> dict[str, str]:
    if not uri.startswith("s3://"):
        raise ConfigurationError("--model-data must be an s3:// address.")
    if uri.endswith("/"):
        return {"S3Uri": uri, "S3DataType": "S3Prefix", "CompressionType": "None"}
    if uri.endswith(".tar.gz"):
        return {"S3Uri": uri, "S3DataType": "S3Object", "CompressionType": "Gzip"}
    raise ConfigurationError("--model-data must end in / (a prefix) or in .tar.gz (an archive).")
