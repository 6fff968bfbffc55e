"""Asks a deployed endpoint: whole, as a stream, through the queue, in a session, a component or an adapter.

It must not know how the endpoint was made.
"""

import argparse
import codecs
import importlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

DESCRIPTION = """\
Ask a SageMaker endpoint through boto3.

The client waits longer than SageMaker's 60 seconds and never sends a request twice: boto3 would repeat a slow one.

  python sagemaker/invoke.py --name weir 'What is Deep Learning?' --stream
  python sagemaker/invoke.py --name weir --chat 'What is Deep Learning?'
  python sagemaker/invoke.py --name weir --session NEW_SESSION       # prints the session, for --session and --close
  python sagemaker/invoke.py --name weir --component french 'Bonjour'        # a component, or a LoRA adapter
  python sagemaker/invoke.py --name weir --async 'What is Deep Learning?'    # waits for the answer in S3
"""
NEW_SESSION = "NEW_SESSION"
INLINE_BYTES = 128_000  # longest body of an asynchronous request that is not in S3
NO_ACCOUNT = """\
Give boto3 a region and credentials; or ask the emulator, which needs no account:
  .venv/bin/python scripts/sagemaker_emulator.py -- .venv/bin/python sagemaker/invoke.py 'What is Deep Learning?'"""


def main(argv: Sequence[str]) -> int:
    """Print the answer; the exit code is 0 on success, 1 when the endpoint answered with an error, 2 for bad usage."""
    parser = argument_parser()
    options = parser.parse_args(argv)
    if options.inputs is None and not (options.close or options.session == NEW_SESSION):
        parser.error("a prompt is needed.")
    if options.session == NEW_SESSION and (options.stream or options.inputs):
        parser.error(f"--session {NEW_SESSION} stands alone; ask in the session afterwards.")
    if options.queued and (options.stream or options.session or options.component):
        parser.error("--async goes with neither --stream nor --session nor --component.")
    try:
        exceptions = importlib.import_module("botocore.exceptions")
        config = importlib.import_module("botocore.config").Config(
            read_timeout=490 if options.stream else 70, retries={"total_max_attempts": 1}
        )
    except ModuleNotFoundError:
        parser.error("boto3 is needed: .venv/bin/python -m pip install boto3")
    boto3 = importlib.import_module("boto3")
    try:
        client = boto3.client("sagemaker-runtime", region_name=options.region, config=config)
        if options.queued:
            return _ask_queue(client, boto3.client("s3", region_name=options.region), options)
        return _ask(client, options)
    except (exceptions.BotoCoreError, exceptions.ClientError) as refusal:
        said = getattr(refusal, "response", {}).get("OriginalMessage")
        print(said or f"{type(refusal).__name__}: {refusal}", file=sys.stderr)
        if isinstance(refusal, (exceptions.NoRegionError, exceptions.NoCredentialsError)):
            print(NO_ACCOUNT, file=sys.stderr)
        return 1


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="?", help="the prompt")
    parser.add_argument("--name", default="weir", help="of the endpoint (%(default)s)")
    parser.add_argument("--component", help="inference component, or adapter component")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--chat", action="store_true", help="the prompt is a message of a chat")
    parser.add_argument("--stream", action="store_true", help="print tokens as they come")
    parser.add_argument("--session", metavar="ID", help=f"stay on one instance; {NEW_SESSION} begins one")
    parser.add_argument("--close", metavar="ID", help="end a session")
    parser.add_argument("--inference-id", help="appears in the server's log")
    parser.add_argument("--async", dest="queued", action="store_true", help="the endpoint is an asynchronous one")
    parser.add_argument(
        "--poll", type=float, default=2, metavar="SECONDS", help="how often to look into S3 (%(default)s)"
    )
    parser.add_argument("--patience", type=float, default=900, metavar="SECONDS", help="for the queue (%(default)s)")
    parser.add_argument("--region", help="AWS region (boto3's default)")
    return parser


def request_of(options: argparse.Namespace) -> dict[str, Any]:
    """The parameters of invoke_endpoint or its siblings."""
    request: dict[str, Any] = {"EndpointName": options.name, "ContentType": "application/json"}
    named = {"InferenceComponentName": options.component, "SessionId": options.close or options.session}
    named["InferenceId"] = options.inference_id
    return request | {"Body": _body(options)} | {key: value for key, value in named.items() if value}


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


def _body(options: argparse.Namespace) -> bytes:
    if options.close:
        body: dict[str, Any] = {"requestType": "CLOSE"}
    elif options.session == NEW_SESSION:
        body = {"requestType": NEW_SESSION}
    elif options.chat:
        message = {"role": "user", "content": options.inputs}
        body = {"messages": [message], "max_tokens": options.max_new_tokens, "stream": options.stream}
    else:
        parameters = {"max_new_tokens": options.max_new_tokens}
        body = {"inputs": options.inputs, "parameters": parameters, "stream": options.stream}
    return json.dumps(body).encode()


def _ask(client: Any, options: argparse.Namespace) -> int:
    request = request_of(options)
    if options.stream:
        parts = client.invoke_endpoint_with_response_stream(**request)["Body"]
        return _print_stream(event["PayloadPart"]["Bytes"] for event in parts if "PayloadPart" in event)
    answer = client.invoke_endpoint(**request)
    if begun := answer.get("NewSessionId"):
        print(begun.partition(";")[0])
    elif ended := answer.get("ClosedSessionId"):
        print(f"closed {ended}")
    else:
        print(json.dumps(json.load(answer["Body"]), indent=2, ensure_ascii=False))
    return 0


def _ask_queue(client: Any, s3: Any, options: argparse.Namespace) -> int:
    request = request_of(options)
    if len(request["Body"]) > INLINE_BYTES:
        print(f"The prompt is longer than the {INLINE_BYTES} bytes that need no file in S3.", file=sys.stderr)
        return 2
    answer = client.invoke_endpoint_async(**request)
    print(f"The answer will be in {answer['OutputLocation']}", file=sys.stderr)
    deadline = time.monotonic() + options.patience
    while time.monotonic() < deadline:
        if (found := _fetch(s3, answer["OutputLocation"])) is not None:
            print(json.dumps(json.loads(found), indent=2, ensure_ascii=False))
            return 0
        if (found := _fetch(s3, answer.get("FailureLocation"))) is not None:
            print(found.decode(errors="replace"), file=sys.stderr)
            return 1
        time.sleep(options.poll)
    print(f"No answer within {options.patience:.0f} s; it may still come (--patience).", file=sys.stderr)
    return 1


def _fetch(s3: Any, uri: str | None) -> bytes | None:
    if not uri:
        return None
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    try:
        whole: bytes = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
    except s3.exceptions.ClientError as refusal:
        # Without the right to list, S3 says that access is denied to what is not there yet.
        if refusal.response["Error"]["Code"] in ("NoSuchKey", "404", "AccessDenied"):
            return None
        raise
    return whole


def _print_stream(parts: Iterable[bytes]) -> int:
    for event in events(parts):
        if "error" in event:
            print(f"\n{event['error']}", file=sys.stderr)
            return 1
        if "choices" in event:
            print("".join(choice["delta"].get("content") or "" for choice in event["choices"]), end="", flush=True)
        elif not event["token"]["special"]:
            print(event["token"]["text"], end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
