"""Deploys the image to a SageMaker endpoint, or prints the requests that would do it.

It must not know the server's insides: settings go through their own table, everything else is SageMaker's API.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from serving.errors import ConfigurationError
from serving.settings import Settings

DESCRIPTION = """\
Deploy the image to a SageMaker endpoint with boto3: create_model, create_endpoint_config, create_endpoint.

The model is an S3 prefix with the files of a Hugging Face checkpoint (config.json, tokenizer.json, *.safetensors),
which SageMaker copies to /opt/ml/model. Without --model-data the image's demo model is served.
Flags of the server stand after a `--`; they are checked here and become the container's environment.

  python sagemaker/deploy.py --image-uri 111122223333.dkr.ecr.eu-west-1.amazonaws.com/weir:0123456789ab \\
      --role-arn arn:aws:iam::111122223333:role/sagemaker --model-data s3://bucket/llama/ \\
      --instance-type ml.g5.xlarge --dry-run -- --max-concurrent-requests 64
"""
CUDA_13_AMI = "al2023-ami-sagemaker-inference-gpu-4-1"
MOST_VARIABLES = 100
MOST_BYTES = 1024
OURS_ALONE = ("PORT", "WEIR_HOSTNAME")  # `serve` takes the port from SageMaker


def main(argv: Sequence[str]) -> int:
    """Deploy, or print; the exit code is 0 on success, 2 for bad usage."""
    parser = argument_parser()
    options = parser.parse_args(argv)
    try:
        requests = build_requests(options)
    except ConfigurationError as error:
        parser.error(str(error))
    if options.dry_run:
        print(json.dumps([{"operation": name, "request": request} for name, request in requests], indent=2))
        return 0
    try:
        client = importlib.import_module("boto3").client("sagemaker", region_name=options.region)
    except ModuleNotFoundError:
        parser.error("boto3 is needed: .venv/bin/python -m pip install boto3 (--dry-run works without it)")
    for operation, request in requests:
        print(f"{operation} ...", file=sys.stderr)
        getattr(client, operation)(**request)
    if options.wait:
        print(f"waiting for {options.name} to be in service ...", file=sys.stderr)
        client.get_waiter("endpoint_in_service").wait(EndpointName=options.name)
    print(f"python sagemaker/invoke.py --name {options.name} 'Hello'")
    return 0


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-uri", required=True, help="the image, in ECR")
    parser.add_argument("--role-arn", required=True, help="the role that SageMaker takes on")
    parser.add_argument("--model-data", help="s3:// prefix that ends in /, or a .tar.gz")
    parser.add_argument("--name", default="weir", help="of model, endpoint configuration and endpoint (%(default)s)")
    parser.add_argument("--instance-type", default="ml.g5.xlarge", help="(%(default)s)")
    parser.add_argument("--instance-count", type=int, default=1, help="(%(default)s)")
    parser.add_argument(
        "--ami", help=f"InferenceAmiVersion; for GPU instances {CUDA_13_AMI}, whose driver the CUDA 13 image needs"
    )
    parser.add_argument(
        "--startup-timeout", type=int, default=900, help="seconds for loading, 60 to 3600 (%(default)s)"
    )
    parser.add_argument(
        "--download-timeout", type=int, default=1800, help="seconds for the copy from S3, 60 to 3600 (%(default)s)"
    )
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="one more variable")
    parser.add_argument("--region", help="AWS region (boto3's default)")
    parser.add_argument("--wait", action="store_true", help="until the endpoint is in service")
    parser.add_argument("--dry-run", action="store_true", help="print the requests and send nothing; needs no boto3")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="flags of the server")
    return parser


def build_requests(options: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """The three API calls, in order, with their parameters. Raises ConfigurationError."""
    variant: dict[str, Any] = {
        "VariantName": "AllTraffic",
        "ModelName": options.name,
        "InstanceType": options.instance_type,
        "InitialInstanceCount": options.instance_count,
        "ContainerStartupHealthCheckTimeoutInSeconds": _within(options.startup_timeout, "--startup-timeout"),
        "ModelDataDownloadTimeoutInSeconds": _within(options.download_timeout, "--download-timeout"),
    }
    ami = options.ami or (CUDA_13_AMI if _has_gpu(options.instance_type) else None)
    if ami:
        variant["InferenceAmiVersion"] = ami
    container: dict[str, Any] = {"Image": options.image_uri, "Environment": environment(options.flags, options.env)}
    if options.model_data:
        container["ModelDataSource"] = {"S3DataSource": _s3_source(options.model_data)}
    return [
        (
            "create_model",
            {"ModelName": options.name, "ExecutionRoleArn": options.role_arn, "PrimaryContainer": container},
        ),
        ("create_endpoint_config", {"EndpointConfigName": options.name, "ProductionVariants": [variant]}),
        ("create_endpoint", {"EndpointName": options.name, "EndpointConfigName": options.name}),
    ]


def environment(flags: Sequence[str], assignments: Sequence[str]) -> dict[str, str]:
    """The container's variables: the server's flags by its own table, then `NAME=VALUE`. Raises ConfigurationError."""
    variables = Settings.resolve(flags, {}).environment()
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not (name and equals):
            raise ConfigurationError(f"--env {assignment}: write NAME=VALUE.")
        variables[name] = value
    for name, value in variables.items():
        if name in OURS_ALONE:
            raise ConfigurationError(f"{name} cannot be set: SageMaker chooses where the container listens.")
        if max(len(name.encode()), len(value.encode())) > MOST_BYTES:
            raise ConfigurationError(
                f"{name} is longer than SageMaker's {MOST_BYTES} bytes: put the value into a file beside the model and "
                "write @/opt/ml/model/NAME."
            )
    if len(variables) > MOST_VARIABLES:
        raise ConfigurationError(f"SageMaker takes {MOST_VARIABLES} variables at most.")
    return variables


def _within(seconds: int, flag: str) -> int:
    if not 60 <= seconds <= 3600:
        raise ConfigurationError(f"{flag} must lie between 60 and 3600 seconds.")
    return seconds


def _has_gpu(instance_type: str) -> bool:
    return instance_type.removeprefix("ml.").startswith(("g", "p"))


def _s3_source(uri: str) -> dict[str, str]:
    if not uri.startswith("s3://"):
        raise ConfigurationError("--model-data must be an s3:// address.")
    if uri.endswith("/"):
        return {"S3Uri": uri, "S3DataType": "S3Prefix", "CompressionType": "None"}
    if uri.endswith(".tar.gz"):
        return {"S3Uri": uri, "S3DataType": "S3Object", "CompressionType": "Gzip"}
    raise ConfigurationError("--model-data must end in / (a prefix) or in .tar.gz (an archive).")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
