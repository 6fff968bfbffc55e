"""Runs a local stand-in for SageMaker's runtime in front of a container, for real boto3 through `endpoint_url`.

It must not know the server's insides: a container is asked what SageMaker asks it, and held to what SageMaker demands.
"""

import argparse
import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

if __package__ in (None, ""):  # run as a file: its neighbours are found from the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.emulator.containers import (
    ADAPTER_DIRECTORY,
    Attached,
    Container,
    ContainerError,
    EngineContainer,
    ProcessContainer,
    find_engine,
)
from scripts.emulator.errors import REGION
from scripts.emulator.journal import Journal
from scripts.emulator.limits import Limits, environment_trouble
from scripts.emulator.server import Deployment, Emulator
from scripts.emulator.tokens import make_token

DESCRIPTION = """\
Try an endpoint before it costs money: unmodified boto3 talks to this server, this server talks to your container, and
both are held to SageMaker's rules. A container that works here has answered /ping in time, kept its headers, its sizes
and its deadlines, and left on SIGTERM; a client that works here has met parts that end in the middle of a character,
errors that arrive as 424, and streams that break.

What runs behind it:
  --image IMAGE    a container of Docker's or Podman's: `serve`, the model read-only at /opt/ml/model
  --command CMD    a process in its place, without isolation (`CMD serve`; without any of the three: this project's)
  --url URL        a server that is already running; it is pinged and asked, and cannot be replaced or stopped

Calls:
  invoke_endpoint                        one answer within 60 s, 25 MB each way, sessions
  invoke_endpoint_with_response_stream   the binary event stream, cut at random places, within 8 minutes
  invoke_endpoint_async                  endpoint NAME-async; results below --storage (s3://bucket/key is a file there)
  POST .../openai/v1/chat/completions    with a bearer token; one is printed at the start
"""
EPILOG = """\
examples:
  python scripts/sagemaker_emulator.py                                  # this project's server and its demo model
  python scripts/sagemaker_emulator.py --image weir:cpu --model ./my-model --network none
  python scripts/sagemaker_emulator.py --image other:latest --env MODEL=x --engine-option=--gpus=all
  python scripts/sagemaker_emulator.py --url http://127.0.0.1:8080 --inference-component chat
  python scripts/sagemaker_emulator.py --time-scale 0.05 -- python -m pytest tests/my_client_tests

in Python:
  boto3.client("sagemaker-runtime", endpoint_url="http://127.0.0.1:8099", region_name="us-east-1",
               config=Config(read_timeout=70, retries={"total_max_attempts": 1}))

boto3 sends a request again when it fails or when its read_timeout (60 s) is over, three times in all, and each of them
reaches the container: turn that off as above. After `--` stands a command that is run while the endpoint is in service,
with AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME, credentials and a region set; then everything is stopped.

Exit code: 0; 1 if the container did not get into service or broke its contract (lines marked BREACH); 2 for a wrong
command line; that of the command after `--`, unless it is 0. docs/sagemaker_emulator.md lists what is enforced.
"""
PORT = 8099
BROKEN = 1
BAD_USAGE = 2
STATUS_PATH = "/_emulator/status"


def main(argv: Sequence[str]) -> int:
    """Serve until told to stop, or until the command after `--` has ended. Returns the exit code."""
    own, command = _split(argv)
    parser = _parser()
    options = parser.parse_args(own)
    journal = Journal(lambda line: print(line + "\n", end="", file=sys.stderr, flush=True))
    try:
        make = container_maker(options, _log(journal, quiet=options.quiet))
        deployment = deployment_of(options)
    except ContainerError as error:
        print(f"Error: {error}", file=sys.stderr)
        return BAD_USAGE
    leave = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: leave.set())
    with contextlib.ExitStack() as stack:
        storage = options.storage or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="emulator-s3-")))
        try:
            emulator = stack.enter_context(Emulator(deployment, make, storage, journal, options.host, options.port))
        except OSError as error:
            where = f"{options.host}:{options.port}"
            print(f"Error: cannot listen at {where}: {error.strerror}; see --host and --port", file=sys.stderr)
            return BAD_USAGE
        code = _run(emulator, deployment, storage, command, journal, leave)
    return code or (BROKEN if journal.breaches else 0)


def _run(
    emulator: Emulator,
    deployment: Deployment,
    storage: Path,
    command: Sequence[str],
    journal: Journal,
    leave: threading.Event,
) -> int:
    journal.say(f"{deployment.endpoint} is Creating: waiting for {deployment.limits.pings_to_serve} healthy pings")
    while not emulator.fleet.wait_in_service(0.2):
        if leave.is_set():
            return 0
        if any(instance.why for instance in emulator.fleet.instances):
            return BROKEN
    for line in _directions(emulator, deployment, storage):
        journal.say(line)
    if not command:
        leave.wait()
        return 0
    try:
        return subprocess.run(command, env={**os.environ, **client_environment(emulator.url)}, check=False).returncode
    except OSError as error:
        print(f"Error: cannot run {command[0]}: {error.strerror}", file=sys.stderr)
        return BAD_USAGE


def _directions(emulator: Emulator, deployment: Deployment, storage: Path) -> Iterator[str]:
    yield f"boto3.client('sagemaker-runtime', endpoint_url='{emulator.url}', region_name='{REGION}')"
    yield f"EndpointName='{deployment.endpoint}', or '{deployment.endpoint}-async' for invoke_endpoint_async"
    for component in (*deployment.components, *deployment.adapters):
        yield f"InferenceComponentName='{component}'"
    yield f"s3:// is below {storage}"
    yield f"OpenAI: base_url='{emulator.url}/endpoints/{deployment.endpoint}/openai/v1'"
    yield f"OpenAI: api_key='{make_token(datetime.now(UTC))}'"
    yield f"state: {emulator.url}{STATUS_PATH}"


def client_environment(url: str) -> dict[str, str]:
    """What boto3 needs to find an emulator without a line of code."""
    return {
        "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME": url,
        "AWS_ACCESS_KEY_ID": "emulator",
        "AWS_SECRET_ACCESS_KEY": "emulator",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def deployment_of(options: argparse.Namespace) -> Deployment:
    """What the command line deploys."""
    limits = Limits(
        startup_s=options.startup_timeout,
        pings_to_serve=options.healthy_pings,
        pings_to_replace=options.unhealthy_pings,
    )
    adapters = _pairs(options.adapter_component, "--adapter-component")
    if options.image is not None:
        adapters = {name: f"{ADAPTER_DIRECTORY}/{name}" for name in adapters}
    else:
        adapters = {name: str(Path(directory).absolute()) for name, directory in adapters.items()}
    return Deployment(
        endpoint=options.endpoint,
        instances=options.instances,
        components=tuple(options.inference_component),
        adapters=adapters,
        results=options.async_results,
        failures=options.async_failures,
        async_concurrency=options.async_concurrency,
        limits=dataclasses.replace(limits).scaled(options.time_scale),
        seed=options.seed,
        largest_part=options.largest_part,
        break_streams_after=options.break_streams_after,
    )


def container_maker(options: argparse.Namespace, log: Callable[[str], None]) -> Callable[[], Container]:
    """How a container is made. Raises ContainerError for what cannot be."""
    environment = _pairs(options.env, "--env")
    if trouble := environment_trouble(environment):
        raise ContainerError(f"CreateModel would refuse this environment: {trouble}")
    model: Path | None = options.model
    if model is not None and not model.is_dir():
        raise ContainerError(f"--model {model} is no directory")
    if options.url is not None:
        if options.instances != 1:
            raise ContainerError("--url is one instance; --instances needs --image or --command")
        Attached(options.url)  # raises for what is no address
        return lambda: Attached(options.url)
    if options.image is None:
        words = shlex.split(options.command) if options.command else [sys.executable, "-m", "serving"]
        return lambda: ProcessContainer(words, environment, model, log)
    engine = options.engine or find_engine()
    if engine is None:
        raise ContainerError("no container engine answers: start Docker or Podman, or use --command or --url")
    adapters = {name: Path(path) for name, path in _pairs(options.adapter_component, "--adapter-component").items()}
    return lambda: EngineContainer(
        engine,
        options.image,
        environment=environment,
        model=model,
        adapters=adapters,
        options=options.engine_option,
        network=options.network,
        bind_to_port=options.bind_to_port,
        log=log,
    )


def _pairs(values: Sequence[str], flag: str) -> dict[str, str]:
    pairs = dict(value.partition("=")[::2] for value in values)
    if not all("=" in value and value.partition("=")[0] for value in values):
        raise ContainerError(f"{flag} takes NAME=VALUE")
    return pairs


def _log(journal: Journal, *, quiet: bool) -> Callable[[str], None]:
    if quiet:
        return lambda line: None
    return lambda line: journal.say(f"| {line}")


def _split(argv: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    if "--" not in argv:
        return argv, ()
    place = list(argv).index("--")
    return argv[:place], argv[place + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "sagemaker_emulator",
        usage="%(prog)s [--image IMAGE | --command CMD | --url URL] [options] [-- COMMAND ...]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_container(parser.add_argument_group("container"))
    _add_endpoint(parser.add_argument_group("endpoint"))
    _add_platform(parser.add_argument_group("platform"))
    return parser


def _add_container(group: argparse._ArgumentGroup) -> None:
    target = group.add_mutually_exclusive_group()
    target.add_argument("--image", help="run this image")
    target.add_argument("--command", help="run this command instead; `serve` is added")
    target.add_argument("--url", help="stand in front of this server")
    group.add_argument("--model", type=Path, metavar="DIR", help="/opt/ml/model, read-only (a process: HF_MODEL_ID)")
    group.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="as in CreateModel; repeatable")
    group.add_argument("--engine", help="docker or podman (what answers)")
    group.add_argument("--engine-option", action="append", default=[], metavar="OPTION", help="of `run`; repeatable")
    group.add_argument("--network", help="of the engine's; 'none' is EnableNetworkIsolation (the image needs python3)")
    group.add_argument("--bind-to-port", type=int, metavar="PORT", help="SAGEMAKER_BIND_TO_PORT (8080, and not said)")
    group.add_argument("--quiet", action="store_true", help="do not show the container's log")


def _add_endpoint(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--endpoint", default="weir", metavar="NAME", help="EndpointName (%(default)s)")
    group.add_argument("--instances", type=int, default=1, help="containers; sessions stick to theirs (%(default)s)")
    group.add_argument(
        "--inference-component", action="append", default=[], metavar="NAME", help="calls must then name it; repeatable"
    )
    group.add_argument(
        "--adapter-component", action="append", default=[], metavar="NAME=DIR",
        help="a LoRA adapter: POST /adapters, then Adapter-Identifier with each call; repeatable. Weir needs room: "
        "--env SAGEMAKER_MAX_NUMBER_OF_ADAPTERS_IN_MEMORY=N",
    )  # fmt: skip
    group.add_argument("--storage", type=Path, metavar="DIR", help="in the place of S3 (a temporary directory)")
    group.add_argument(
        "--async-results", default="s3://emulator/results", metavar="URI", help="s3:// or file:// (%(default)s)"
    )
    group.add_argument(
        "--async-failures", default="s3://emulator/failures", metavar="URI", help="s3:// or file:// (%(default)s)"
    )
    group.add_argument(
        "--async-concurrency",
        type=int,
        default=4,
        metavar="N",
        help="MaxConcurrentInvocationsPerInstance (%(default)s)",
    )


def _add_platform(group: argparse._ArgumentGroup) -> None:
    limits = Limits()
    group.add_argument("--host", default="127.0.0.1", help="to listen at (%(default)s)")
    group.add_argument("--port", type=int, default=PORT, help="to listen at; 0 is any free one (%(default)s)")
    group.add_argument(
        "--time-scale", type=float, default=1.0, metavar="FACTOR",
        help="multiplies 60 s, 8 min, 30 s and every other long time; the 2 s of a ping and 250 ms stay (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--startup-timeout", type=float, default=limits.startup_s, metavar="SECONDS",
        help="ContainerStartupHealthCheckTimeoutInSeconds, 60 to 3600 at AWS (%(default)g)",
    )  # fmt: skip
    group.add_argument(
        "--healthy-pings", type=int, default=limits.pings_to_serve, metavar="N", help="in a row, to serve (%(default)s)"
    )
    group.add_argument(
        "--unhealthy-pings", type=int, default=limits.pings_to_replace, metavar="N",
        help="in a row, to be replaced (%(default)s)",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="of routing and of where streams are cut (%(default)s)")
    group.add_argument(
        "--largest-part",
        type=int,
        default=64,
        metavar="BYTES",
        help="of a stream; 0 leaves parts as they come (%(default)s)",
    )
    group.add_argument(
        "--break-streams-after", type=int, metavar="PARTS", help="then send InternalStreamFailure, to try a client"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
