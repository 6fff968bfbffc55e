"""`weir download-weights MODEL_ID`: brings a model here and ends; also the process in which the worker has it done.

Knows no tensor. Logs go where all logs go; what came of it goes to the worker as one line of JSON.
"""

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import msgspec

from serving.adapter_names import NamedAdapter
from serving.errors import ConfigurationError, ModelError, WeirError
from serving.lifeline import die_with_parent
from serving.protocol import Origin
from serving.settings import Settings, calm_hub, hub_token, process_environment
from serving.telemetry import logs
from serving.weights.adapter_config import AdapterConfig
from serving.weights.fetch import Fetched, NotFetched
from serving.weights.model_files import (
    ModelFiles,
    Source,
    check_whole,
    collect,
    collect_adapter,
    is_adapter,
    local_adapter,
)

COMMAND = "download-weights"
BAD_USAGE, FAILED = 2, 1

log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns the exit code."""
    environ = process_environment()
    try:
        said = _parse(argv)
        settings = Settings.resolve(_flags(said), environ)
    except click.exceptions.Exit as answered:
        return answered.exit_code
    except ConfigurationError as error:
        click.echo(f"Error: {error}", err=True)
        return BAD_USAGE
    outcome_fd: int | None = said["outcome_fd"]
    if outcome_fd is not None:
        die_with_parent()
    logs.configure(settings.log_level, json_output=settings.json_output)
    try:
        outcome: Fetched | NotFetched = Fetched(fetch(settings, hub_token(environ)))
    except WeirError as error:
        outcome = NotFetched(str(error))
    except KeyboardInterrupt:
        outcome = NotFetched("Interrupted")
    _tell(outcome, outcome_fd)
    if isinstance(outcome, NotFetched):
        sys.stdout.flush()
        os._exit(FAILED)  # a failure must not wait for threads that still download
    return 0


def fetch(settings: Settings, token: str | None) -> ModelFiles:
    """Bring here what `settings.model_id` names, an adapter's base model with it, and the adapters for requests.

    Raises:
        ConfigurationError: it cannot be had, or not be served (ModelError); the text says what to do.
    """
    if settings.model_id is None:
        raise ConfigurationError("No model was named.")
    cache = Path(settings.huggingface_hub_cache).expanduser() if settings.huggingface_hub_cache else None
    files = _fetch_model(settings.model_id, settings.revision, cache, token)
    adapters = {adapter.name: _fetch_adapter(adapter, cache, token) for adapter in settings.adapters}
    return msgspec.structs.replace(files, adapters=adapters)


def _fetch_adapter(adapter: NamedAdapter, cache: Path | None, token: str | None) -> str:
    if Path(adapter.place).is_dir():
        return local_adapter(adapter)
    try:
        return str(_fetch_from_elsewhere(adapter.place, adapter.revision, cache, token, collect_adapter)[0])
    except ConfigurationError as error:
        raise ModelError(f"The adapter {adapter.name}: {error}") from error


def _fetch_model(model_id: str, revision: str | None, cache: Path | None, token: str | None) -> ModelFiles:
    directory, origin = _locate(model_id, revision, cache, token)
    if not is_adapter(_names(directory)):
        return ModelFiles(directory=str(directory), origin=origin)
    adapter = AdapterConfig.load(directory)
    log.info("%s is an adapter of %s", model_id, adapter.base)
    base, _ = _locate(adapter.base, adapter.revision, cache, token)
    if is_adapter(_names(base)):
        raise ModelError(f"the adapter's base {adapter.base} is an adapter itself; merge that one with peft first")
    return ModelFiles(directory=str(base), adapter_directory=str(directory), origin=origin)


def _locate(model_id: str, revision: str | None, cache: Path | None, token: str | None) -> tuple[Path, Origin]:
    """The directory of one model, or of an adapter in its place, wherever it comes from."""
    if Path(model_id).is_dir():
        check_whole(Path(model_id))
        return Path(model_id), Origin()
    return _fetch_from_elsewhere(model_id, revision, cache, token, collect)


def _fetch_from_elsewhere(
    place: str, revision: str | None, cache: Path | None, token: str | None, collect: Callable[[Source], Path]
) -> tuple[Path, Origin]:
    """From the hub or S3. The clients are imported when they are needed."""
    calm_hub()
    hub = import_module("serving.weights.hub")
    logs.adopt("huggingface_hub")
    if place.startswith("s3://"):
        path: Path = import_module("serving.weights.s3").fetch(place, cache or hub.default_cache(), collect)
        return path, Origin()
    found: tuple[Path, Origin] = hub.fetch(place, revision, cache=cache, token=token, collect=collect)
    return found


def _names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def _tell(outcome: Fetched | NotFetched, descriptor: int | None) -> None:
    if descriptor is not None:
        with os.fdopen(descriptor, "wb") as worker:
            worker.write(msgspec.json.encode(outcome) + b"\n")
    elif isinstance(outcome, NotFetched):
        log.error("%s", outcome.reason)
    else:
        files = outcome.files
        fields = {"directory": files.directory, "adapter_directory": files.adapter_directory, "sha": files.origin.sha,
                  "adapters": files.adapters or None}  # fmt: skip
        fields = {name: value for name, value in fields.items() if value is not None}
        log.info("Downloaded", extra={"fields": fields})


def _parse(argv: Sequence[str]) -> dict[str, Any]:
    command = click.Command(
        COMMAND,
        params=[
            click.Argument(["model_id"]),
            click.Option(["--revision"], help="Branch, tag or commit on the hub."),
            click.Option(["--huggingface-hub-cache"], help="Where downloads are kept."),
            click.Option(["--lora-adapters"], help="LoRA adapters to bring too, with commas."),
            click.Option(["--json-output/--no-json-output"], default=None, help="Write logs as JSON lines."),
            click.Option(["--log-level", "--logger-level"], help="Least level of logs."),
            click.Option(["--extension"], default=".safetensors", help="TGI's; only .safetensors is served."),
            click.Option(["--auto-convert/--no-auto-convert"], default=None, help="TGI's; see `weir convert`."),
            click.Option(["--merge-lora/--no-merge-lora"], default=None, help="TGI's; adapters merge when they load."),
            click.Option(["--trust-remote-code/--no-trust-remote-code"], default=None, help="TGI's; runs nothing."),
            click.Option(["--outcome-fd"], type=int, hidden=True),
        ],
        help="Bring a model of the hub (org/name) or of S3 (s3://bucket/prefix) into the cache, and end.",
        context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 120},
    )
    try:
        said: dict[str, Any] = command.make_context(f"weir {COMMAND}", list(argv)).params
    except click.UsageError as error:
        raise ConfigurationError(f"{error.format_message()} See `weir {COMMAND} --help`.".replace("\n", " ")) from None
    if said["extension"] != ".safetensors":
        raise ConfigurationError(f"--extension {said['extension']}: only .safetensors is served.")
    return said


def _flags(said: Mapping[str, Any]) -> list[str]:
    names = ("model_id", "revision", "huggingface_hub_cache", "lora_adapters", "json_output", "log_level")
    given = {name: said[name] for name in names if said[name] is not None}
    return [f"--{name.replace('_', '-')}={str(value).lower() if value is True or value is False else value}"
            for name, value in given.items()]  # fmt: skip
