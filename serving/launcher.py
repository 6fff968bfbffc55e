"""From a command line to a running gunicorn: resolves the settings, chooses the model, becomes gunicorn in place.

Knows no torch, no Flask and no model; it is gone before the first request comes.
"""

import dataclasses
import errno
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from serving import __version__
from serving.adapter_names import NamedAdapter
from serving.errors import ConfigurationError
from serving.settings import Settings, foreign
from serving.telemetry import logs
from serving.telemetry.tracing import is_http

DEMO_MODEL = Path(__file__).parent / "demo_model"
DEMO_MODEL_ID = "weir-demo"
SAGEMAKER_MODEL = Path("/opt/ml/model")
MODEL_FILES = ("config.json", "adapter_config.json")  # one of which tells a model's directory
ELSEWHERE = re.compile(r"s3://[^/]+.*|\w[\w.-]*(/\w[\w.-]*)?")  # names of models in S3 and on the hub
SHARED_MEMORY = Path("/dev/shm")
ENOUGH_SHARED_MEMORY = 2**30  # bytes, for NCCL among several devices

BAD_USAGE = 2
CANNOT_START = 1

BACKLOG = 2048
KEEP_ALIVE_S = 5
HEARTBEAT_S = 60
LEAVING_S = 15  # for the arbiter to wait beyond our own drain, before it kills

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class ModelChoice:
    """Which model is served, and why that one: a directory, or what has to be fetched first."""

    model_id: str
    reason: str


def launch(argv: Sequence[str], environ: Mapping[str, str], sagemaker_model: Path = SAGEMAKER_MODEL) -> int:
    """Become gunicorn. Returns an exit code only where that cannot be, after one line on standard error."""
    try:
        settings = Settings.resolve(argv, environ)
    except click.exceptions.Exit as answered:
        return answered.exit_code
    except ConfigurationError as error:
        click.echo(f"Error: {error}", err=True)
        return BAD_USAGE
    logs.configure(settings.log_level, json_output=settings.json_output)
    try:
        choice = choose_model(settings.model_id, sagemaker_model)
        check_adapters(choice, settings.adapters)
        check_address(settings.hostname, settings.port)
        # The demo model is too small to be worth sharing out, and a CPU is one device.
        alone = settings.num_shard is None and (choice.model_id == str(DEMO_MODEL) or settings.device == "cpu")
        shards = 1 if alone else shard_count(settings.sharded, settings.num_shard, environ)
        if settings.otlp_endpoint is not None:
            is_http(settings.otlp_endpoint)  # raises where this is no address
    except ConfigurationError as error:
        log.error("%s", error)
        return CANNOT_START
    if settings.env:
        log.info("Runtime environment: %s", json.dumps(runtime_environment()))
    if idle := settings.without_effect(environ):
        log.warning("Accepted, but without effect in this version: %s", ", ".join(idle))
    log.info("Serving the model %s, %s", choice.model_id, choice.reason)
    if settings.adapters:
        log.info("Serving adapters of it: %s", ", ".join(adapter.name for adapter in settings.adapters))
    if shards > 1:
        log.info("Sharing the model out over %d devices", shards)
        if settings.device != "cpu" and environ.get("NCCL_SHM_DISABLE") != "1":
            _warn_of_little_shared_memory(shards)
    settings = dataclasses.replace(settings, model_id=choice.model_id, num_shard=shards)
    return _become_gunicorn(settings, environ)


def choose_model(model_id: str | None, sagemaker_model: Path) -> ModelChoice:
    """What was named, else what SageMaker put in its place, else the model in the package.

    Nothing is fetched here: a hub is asked for its model once HTTP answers.

    Raises:
        ConfigurationError: what was named can be no model.
    """
    if model_id is not None:
        if not Path(model_id).is_dir() and not ELSEWHERE.fullmatch(model_id):
            raise ConfigurationError(
                f"Cannot serve {model_id!r}: there is no such directory, and neither the hub (org/name) nor S3 "
                "(s3://bucket/prefix) has models of such a name; see --model-id."
            )
        return ModelChoice(model_id, "as told")
    if any((sagemaker_model / name).is_file() for name in MODEL_FILES):
        return ModelChoice(str(sagemaker_model), "which was found there (no --model-id was given)")
    return ModelChoice(str(DEMO_MODEL), "the demo model (no --model-id was given)")


def check_adapters(choice: ModelChoice, adapters: Sequence[NamedAdapter]) -> None:
    """Raise ConfigurationError where an adapter has a name that means the model as it is, or its directory is none."""
    own = (choice.model_id, DEMO_MODEL_ID, "tgi")
    for adapter in adapters:
        if adapter.name in own:
            raise ConfigurationError(
                f"`lora_adapters`: {adapter.name} is the model's own name; choose another: NAME=PLACE."
            )
        if adapter.place.startswith(("/", ".")) and not Path(adapter.place).is_dir():
            raise ConfigurationError(f"`lora_adapters`: there is no directory {adapter.place} for {adapter.name}.")


def shard_count(
    sharded: bool | None, num_shard: int | None, environ: Mapping[str, str], devices: Path = Path("/dev")
) -> int:
    """How many devices share the model out: what was said, else all GPUs that this process may use, else one.

    Args:
        sharded: whether several have to; `None` leaves it open.
        num_shard: how many, where that was said.
        environ: whose CUDA_VISIBLE_DEVICES or else NVIDIA_VISIBLE_DEVICES says which GPUs may be used.
        devices: holds a file for every GPU that there is.

    Raises:
        ConfigurationError: several have to, and there is one or none.
    """
    if num_shard is not None:
        if sharded and num_shard <= 1:
            raise ConfigurationError("`sharded` is true but `num_shard` <= 1")
        return num_shard
    if sharded is False:
        return 1
    count = _usable_gpus(environ, devices)
    if sharded and count <= 1:
        raise ConfigurationError(
            f"`sharded` is true but only found {count} CUDA devices; give --num-shard where they are not found"
        )
    return max(1, count)


def _warn_of_little_shared_memory(shards: int) -> None:
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:  # no such thing here
        return
    size = found.f_frsize * found.f_blocks
    if size < ENOUGH_SHARED_MEMORY:
        log.warning(
            "%d devices are to share the model, but /dev/shm has %d MiB, and NCCL may want more: start the container "
            "with `--shm-size 1g`, or set NCCL_SHM_DISABLE=1.",
            shards,
            size // 2**20,
        )


def _usable_gpus(environ: Mapping[str, str], devices: Path) -> int:
    there = sum(path.name.removeprefix("nvidia").isdigit() for path in devices.glob("nvidia*"))
    said = environ.get("CUDA_VISIBLE_DEVICES")
    if said is None:
        said = environ.get("NVIDIA_VISIBLE_DEVICES", "all")
        # "void" and "all" are what images say for themselves; the container's runtime decides what is there.
        if said in ("all", "void", ""):
            return there
    # As in CUDA, nothing counts from the first one on that is none.
    names = list(itertools.takewhile(lambda name: name and name != "-1", (name.strip() for name in said.split(","))))
    return min(len(names), there)


def check_address(host: str, port: int) -> None:
    """Raise ConfigurationError if nobody could listen there now; gunicorn would try for seconds and not say it well."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigurationError(f"Port {port} is in use; choose another with --port.") from None
        raise ConfigurationError(
            f"Cannot listen at {host} port {port}: {error.strerror}; see --hostname and --port."
        ) from None


def gunicorn_arguments(settings: Settings) -> list[str]:
    """gunicorn's command line.

    Connections outnumber permits by far, so that idle ones do not keep health checks out; one worker, since it owns
    the KV cache; gunicorn waits longer at the end than the worker drains, since it would cut streams.
    """
    host = f"[{settings.hostname}]" if ":" in settings.hostname else settings.hostname
    options: dict[str, object] = {
        "config": "python:serving",  # so that no gunicorn.conf.py from the working directory is read
        "bind": f"{host}:{settings.port}",
        "workers": 1,
        "worker-class": "serving.worker.Worker",
        "logger-class": "serving.worker.Logger",
        "worker-connections": 4 * settings.max_concurrent_requests + 256,
        "backlog": BACKLOG,
        "keep-alive": KEEP_ALIVE_S,
        "timeout": HEARTBEAT_S,
        "graceful-timeout": settings.graceful_termination_timeout + LEAVING_S,
        "limit-request-line": 4094,
        "limit-request-fields": 100,
        "limit-request-field_size": 8190,
        "name": "weir",
    }
    if SHARED_MEMORY.is_dir():
        options["worker-tmp-dir"] = SHARED_MEMORY  # a heartbeat on a disk may block
    return [
        *(f"--{name}={value}" for name, value in options.items()),
        "--no-control-socket",
        "serving.wsgi:application()",
    ]


def _become_gunicorn(settings: Settings, environ: Mapping[str, str]) -> int:
    command = [sys.executable, "-m", "gunicorn", *gunicorn_arguments(settings)]
    said = settings.environment()
    try:
        os.execve(sys.executable, command, {**foreign(environ), **said})
    except OSError as error:  # Linux takes 128 KiB for one variable
        longest = max(said, key=lambda name: len(said[name]))
        log.error("Cannot start gunicorn: %s; the longest setting is %s", error.strerror, longest)
    return CANNOT_START


def runtime_environment() -> dict[str, str]:
    """Versions that a bug report should name."""
    packages = ("torch", "transformers", "tokenizers", "flask", "gevent", "gunicorn")
    return {
        "weir": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{package: _version(package) for package in packages},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
