"""Asks a deployed endpoint one question, whole or as a stream.

It must not know how the endpoint was made.
"""

import argparse
import codecs
import importlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

DESCRIPTION = """\
Ask a SageMaker endpoint one question through boto3.

The client waits longer than SageMaker's 60 seconds and never sends a request twice: boto3 would repeat a slow one.
"""


def main(argv: Sequence[str]) -> int:
    """Print the answer; the exit code is 0 on success, 1 when the endpoint answered with an error event."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", help="the prompt")
    parser.add_argument("--name", default="weir", help="of the endpoint (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--stream", action="store_true", help="print tokens as they come")
    parser.add_argument("--region", help="AWS region (boto3's default)")
    options = parser.parse_args(argv)
    body = {
        "inputs": options.inputs,
        "parameters": {"max_new_tokens": options.max_new_tokens},
        "stream": options.stream,
    }
    try:
        config_module = importlib.import_module("botocore.config")
    except ModuleNotFoundError:
        parser.error("boto3 is needed: .venv/bin/python -m pip install boto3")
    config = config_module.Config(read_timeout=490 if options.stream else 70, retries={"total_max_attempts": 1})
    client = importlib.import_module("boto3").client("sagemaker-runtime", region_name=options.region, config=config)
    request = {"EndpointName": options.name, "ContentType": "application/json", "Body": json.dumps(body).encode()}
    if options.stream:
        parts = client.invoke_endpoint_with_response_stream(**request)["Body"]
        return _print_stream(event["PayloadPart"]["Bytes"] for event in parts if "PayloadPart" in event)
    print(json.dumps(json.load(client.invoke_endpoint(**request)["Body"]), indent=2, ensure_ascii=False))
    return 0


def events(parts: Iterable[bytes]) -> Iterator[Any]:
    """The JSON of every `data:` line; a part may end anywhere, also within a character."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    left = ""
    for part in parts:
        *lines, left = (left + decode(part)).split("\n")
        for line in lines:
            text = line.removeprefix("data:").strip()
            if line.startswith("data:") and text != "[DONE]":
                yield json.loads(text)


def _print_stream(parts: Iterable[bytes]) -> int:
    for event in events(parts):
        if "error" in event:
            print(f"\n{event['error']}", file=sys.stderr)
            return 1
        if not event["token"]["special"]:
            print(event["token"]["text"], end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
