"""Who sends the calls: boto3, the SageMaker SDK v2 (`HuggingFaceModel.deploy`) or v3 (its resource classes).

It must not know what the calls are for. boto3 and the SDKs are imported when they are used, never before.
"""

import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from endpoint_requests import Step
from serving.errors import ConfigurationError

VIAS = ("boto3", "sdk2", "sdk3")
_RESOURCES = {
    "create_model": "Model",
    "create_endpoint_config": "EndpointConfig",
    "create_endpoint": "Endpoint",
    "create_inference_component": "InferenceComponent",
}
_VARIABLES = frozenset({"Environment"})  # whose keys are the user's


class Clients:
    """boto3's clients, each made once. Raises ConfigurationError where boto3 is missing.

    Attributes:
        region: where; None is boto3's own choice.
        refusals: boto3's errors and the network's, to be caught.
    """

    def __init__(self, region: str | None) -> None:
        if not _is_installed("boto3"):
            raise ConfigurationError("boto3 is needed: .venv/bin/python -m pip install boto3")
        self.region = region
        exceptions = importlib.import_module("botocore.exceptions")
        self.refusals: tuple[type[Exception], ...] = (exceptions.BotoCoreError, exceptions.ClientError, OSError)
        self._made: dict[tuple[str, str | None], Any] = {}

    def __call__(self, service: str, region: str | None = None) -> Any:
        """The client of one service."""
        key = (service, region or self.region)
        if key not in self._made:
            self._made[key] = importlib.import_module("boto3").client(service, region_name=key[1])
        return self._made[key]


def was_refused(error: Exception) -> bool:
    """Whether it is certain that the call did nothing: it was not sent, or AWS said no."""
    status = getattr(error, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    unsent = ("NoRegionError", "NoCredentialsError", "ParamValidationError")
    return 400 <= status < 500 or type(error).__name__ in unsent


class Sender(Protocol):
    """Sends one call."""

    def send(self, step: Step, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the answer. Raises what boto3 and the SDK raise."""


class Boto3Sender:
    """Every call as it stands."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients

    def send(self, step: Step, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """See Sender."""
        answer: Mapping[str, Any] = getattr(self._clients(step.service), step.operation)(**request)
        return answer


class Sdk3Sender(Boto3Sender):
    """What SDK v3 has a resource class for through that class, the rest through boto3."""

    def send(self, step: Step, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """See Sender; an SDK's resource gives no answer, and nobody asks for one."""
        if step.operation not in _RESOURCES:
            return super().send(step, request)
        resource = getattr(importlib.import_module("sagemaker.core.resources"), _RESOURCES[step.operation])
        resource.create(**_snake_case(request), region=self._clients.region)
        return {}


class Sdk2Sender(Boto3Sender):
    """Model, configuration and endpoint with one `HuggingFaceModel(...).deploy`, the rest through boto3."""

    def __init__(self, clients: Clients) -> None:
        super().__init__(clients)
        self._waiting: dict[str, Mapping[str, Any]] = {}

    def send(self, step: Step, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """See Sender. Model and configuration are kept until the endpoint is asked for."""
        if step.operation in ("create_model", "create_endpoint_config"):
            self._waiting[step.operation] = request
            return {}
        if step.operation != "create_endpoint":
            return super().send(step, request)
        self._deploy(self._waiting["create_model"], self._waiting["create_endpoint_config"], request["EndpointName"])
        return {}

    def _deploy(self, model: Mapping[str, Any], config: Mapping[str, Any], endpoint_name: str) -> None:
        boto_session = importlib.import_module("boto3").Session(region_name=self._clients.region)
        container = model["PrimaryContainer"]
        variant = config["ProductionVariants"][0]
        asynchronous = None
        if chosen := config.get("AsyncInferenceConfig"):
            asynchronous = importlib.import_module("sagemaker.async_inference").AsyncInferenceConfig(
                output_path=chosen["OutputConfig"]["S3OutputPath"],
                failure_path=chosen["OutputConfig"]["S3FailurePath"],
                notification_config=chosen["OutputConfig"].get("NotificationConfig"),
                max_concurrent_invocations_per_instance=chosen["ClientConfig"]["MaxConcurrentInvocationsPerInstance"],
            )
        importlib.import_module("sagemaker.huggingface").HuggingFaceModel(
            name=model["ModelName"],
            image_uri=container["Image"],
            model_data=container.get("ModelDataSource") and dict(container["ModelDataSource"]),
            role=model["ExecutionRoleArn"],
            env=dict(container["Environment"]),
            # There is no code to upload; without a place for it the SDK would make a bucket.
            code_location="s3://unused",
            sagemaker_session=importlib.import_module("sagemaker").Session(boto_session=boto_session),
        ).deploy(
            endpoint_name=endpoint_name,
            instance_type=variant["InstanceType"],
            initial_instance_count=variant["InitialInstanceCount"],
            model_data_download_timeout=variant["ModelDataDownloadTimeoutInSeconds"],
            container_startup_health_check_timeout=variant["ContainerStartupHealthCheckTimeoutInSeconds"],
            inference_ami_version=variant.get("InferenceAmiVersion"),
            routing_config=variant.get("RoutingConfig"),
            async_inference_config=asynchronous,
            wait=False,
        )


def sender(via: str, clients: Clients) -> Sender:
    """Whoever is named. Raises ConfigurationError if it is not installed."""
    if via != "boto3":
        # It comes first on the path, and among what the SDKs bring is a package called invoke.
        here = Path(__file__).resolve().parent
        sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]
    if via == "sdk2":
        if not _is_installed("sagemaker.huggingface"):
            raise ConfigurationError("--via sdk2 needs the SageMaker SDK v2: pip install 'sagemaker<3'")
        return Sdk2Sender(clients)
    if via == "sdk3":
        if not _is_installed("sagemaker.core"):
            raise ConfigurationError("--via sdk3 needs the SageMaker SDK v3: pip install sagemaker-core")
        return Sdk3Sender(clients)
    return Boto3Sender(clients)


def as_sent(via: str, steps: Sequence[Step], region: str | None) -> list[dict[str, Any]]:
    """The calls for a dry run; SDK v2 adds to them."""
    printed = [step.printed() for step in steps]
    if via == "sdk2":
        own = {
            "SAGEMAKER_PROGRAM": "",
            "SAGEMAKER_SUBMIT_DIRECTORY": "",
            "SAGEMAKER_CONTAINER_LOG_LEVEL": "20",
            "SAGEMAKER_REGION": region or "<region>",
        }
        for call in printed:
            if call["operation"] == "create_model":
                container = dict(call["request"]["PrimaryContainer"])
                container["Environment"] = container["Environment"] | own
                call["request"]["PrimaryContainer"] = container
            if call["operation"] == "create_endpoint_config":
                [variant] = call["request"]["ProductionVariants"]
                call["request"]["ProductionVariants"] = [variant | {"InitialVariantWeight": 1}]
            if call["operation"] == "create_endpoint":
                call["request"]["Tags"] = []
    return printed


def _is_installed(name: str) -> bool:
    """Found by its parts: the folder of these scripts makes every `import sagemaker` succeed."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _snake_case(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            re.sub(r"(?<!^)(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z0-9])", "_", key).lower(): (
                dict(inner) if key in _VARIABLES else _snake_case(inner)
            )
            for key, inner in value.items()
        }
    return [_snake_case(inner) for inner in value] if isinstance(value, list) else value
