"""The command line of deploy.py.

It must not know what is done with it.
"""

import argparse
import re

from endpoint_facts import RULE
from endpoint_senders import VIAS

DESCRIPTION = f"""\
Deploy the image to SageMaker and wait until it is in service.

  realtime   an endpoint that answers at once, whole or as a stream
  async      an endpoint that takes requests from a queue and puts answers into S3; it can scale to nothing
  component  an endpoint on whose instances several models have their share each, and one model there
  adapter    a LoRA adapter on a component that is in service

The model is an S3 prefix with the files of a Hugging Face checkpoint (config.json, tokenizer.json, *.safetensors),
which SageMaker copies to /opt/ml/model. Without --model-data the image's demo model is served.
Flags of the server stand after a `--`; they are checked here and become the container's environment.

  python sagemaker/deploy.py --image-uri 111122223333.dkr.ecr.eu-west-1.amazonaws.com/weir:0123456789ab \\
      --role-arn arn:aws:iam::111122223333:role/sagemaker --model-data s3://bucket/llama/ \\
      --instance-type ml.g5.xlarge --dry-run -- --max-concurrent-requests 64

{RULE}"""
KINDS = ("realtime", "async", "component", "adapter")
USUAL_ROWS = 20


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    say = parser.add_argument
    say("--kind", choices=KINDS, default="realtime", help="what to deploy (%(default)s)")
    say("--image-uri", help="the image, in ECR; an adapter has none")
    say("--role-arn", help="the role that SageMaker takes on; an adapter has none")
    say("--model-data", help="s3:// prefix that ends in /, or a .tar.gz")
    say("--name", default="weir", help="of model, endpoint configuration and endpoint (%(default)s)")
    say("--instance-type", default="ml.g5.xlarge", help="(%(default)s)")
    say("--instance-count", type=int, help="(1; with --update: as many as there are)")
    say("--via", choices=VIAS, default="boto3", help="who sends the calls: boto3 or the SageMaker SDK (%(default)s)")
    say("--region", help="AWS region (boto3's default)")
    say("--env", action="append", default=[], metavar="NAME=VALUE", help="one more variable of the container")
    say("--wait", action=argparse.BooleanOptionalAction, default=True, help="until it is in service (yes)")
    say("--poll", type=float, default=15, metavar="SECONDS", help="how often to look meanwhile (%(default)s)")
    say("--dry-run", action="store_true", help="print the calls and send nothing; needs no boto3 and no network")
    say("flags", nargs="*", metavar="-- FLAG", help="flags of the server")

    facts = parser.add_argument_group("what is otherwise asked of S3 and ECR")
    facts.add_argument("--model-size", type=float, metavar="GB", help="of the model's files")
    facts.add_argument("--cuda-version", help="of the image, such as 13.0")
    facts.add_argument("--ami", help="InferenceAmiVersion, whatever the CUDA version")
    facts.add_argument("--startup-timeout", type=int, metavar="SECONDS", help="for loading, 60 to 3600")
    facts.add_argument("--download-timeout", type=int, metavar="SECONDS", help="for the copy from S3, 60 to 3600")

    queue = parser.add_argument_group("async")
    queue.add_argument("--async-output", metavar="S3", help="where answers go")
    queue.add_argument("--async-failures", metavar="S3", help="where errors go (failures/ below the answers)")
    queue.add_argument(
        "--async-concurrency", type=int, default=USUAL_ROWS, help="requests at a time per instance (%(default)s)"
    )
    queue.add_argument("--success-topic", metavar="ARN", help="SNS topic to tell")
    queue.add_argument("--error-topic", metavar="ARN", help="SNS topic to tell")

    component = parser.add_argument_group("component and adapter")
    component.add_argument("--component", help="the component's name (the endpoint's)")
    component.add_argument(
        "--existing-endpoint", action="store_true", help="add the component to an endpoint that is there"
    )
    component.add_argument("--copies", type=int, default=1, help="of the component (%(default)s)")
    component.add_argument("--accelerators", type=int, help="GPUs of a copy (1 where the instance has any)")
    component.add_argument("--cpus", type=float, help="cores of a copy")
    component.add_argument("--memory", type=int, metavar="MB", help="of a copy (the model's size, 4096 at least)")
    component.add_argument("--adapter", help="the adapter component's name")
    component.add_argument("--adapter-data", metavar="S3", help="the adapter's .tar.gz")

    load = parser.add_argument_group("load and alarms")
    load.add_argument(
        "--autoscale",
        type=_bounds,
        metavar="MIN:MAX",
        help="instances; or copies of a component, and with its endpoint the instances",
    )
    load.add_argument(
        "--target",
        type=float,
        help="requests at a time per instance or copy to aim for (3/4 of --max-batch-size where given, else "
        f"{USUAL_ROWS}); async: waiting ones (5)",
    )
    load.add_argument(
        "--alarms", action="store_true", help="CloudWatch alarms: 5xx, latency, first token, broken streams"
    )
    load.add_argument("--alarm-topic", metavar="ARN", help="SNS topic that alarms tell")
    load.add_argument("--max-latency", type=float, default=30, metavar="SECONDS", help="p90 of answers (%(default)s)")
    load.add_argument("--max-first-token", type=float, default=5, metavar="SECONDS", help="p90 (%(default)s)")

    update = parser.add_argument_group("update")
    update.add_argument(
        "--update",
        action="store_true",
        help="replace model and configuration of what is in service, some instances at a time; with --alarms, back to "
        "what was there when one goes off",
    )
    update.add_argument(
        "--batch-percent", type=int, default=25, help="of the instances at a time, 5 to 50 (%(default)s)"
    )
    update.add_argument("--batch-wait", type=int, default=120, metavar="SECONDS", help="between batches (%(default)s)")
    return parser


def _bounds(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or int(match[1]) > int(match[2]) or int(match[2]) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not MIN:MAX")
    return int(match[1]), int(match[2])
