"""Models under a prefix of S3: what is needed of it, fetched into a directory beside the hub's cache.

Knows no tensor, and nothing of adapters. Credentials, region and endpoint are found as boto3 finds them.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from serving.errors import ConfigurationError, WeirError
from serving.weights.hub import make_room, remove_abandoned
from serving.weights.model_files import Source
from serving.weights.model_files import collect as collect_model
from serving.weights.progress import Progress

SCHEME = "s3://"

log = logging.getLogger(__name__)


def fetch(uri: str, cache: Path, collect: Callable[[Source], Path] = collect_model) -> Path:
    """Bring the model or adapter under `s3://bucket/prefix` into the cache; `collect` fetches what is needed of it.

    Returns its directory.

    A file is kept under its ETag, so that only what changed is fetched again, and what an interrupted download had
    finished is not.

    Raises:
        ConfigurationError: it cannot be had, or boto3 is not installed; the text says what to do.
    """
    boto3 = _import_boto3()
    try:
        return collect(Prefix(uri, boto3.client("s3"), cache))
    except WeirError:
        raise
    except OSError as error:
        raise ConfigurationError(f"Cannot write to {cache} ({error}); see --huggingface-hub-cache.") from error
    except Exception as error:  # botocore makes its classes at run time
        raise ConfigurationError(
            f"Cannot read {uri}: {' '.join(str(error).split())}; the role or the credentials that boto3 finds need "
            "s3:ListBucket and s3:GetObject on it."
        ) from error


class Prefix:
    """What lies under a prefix, as a `Source`."""

    def __init__(self, uri: str, client: Any, cache: Path) -> None:
        bucket, _, prefix = uri.removeprefix(SCHEME).partition("/")
        self.name = uri
        self._bucket = bucket
        self._prefix = f"{prefix.rstrip('/')}/" if prefix.rstrip("/") else ""
        self._client = client
        self._cache = cache
        objects = list(self._objects())
        self.sizes: Mapping[str, int] = {name: size for name, size, _ in objects}
        self._etags = {name: etag for name, _, etag in objects}
        listing = "\n".join(f"{name} {size} {etag}" for name, size, etag in sorted(objects))
        self._home = cache / f"s3--{bucket}--{_digest(self._prefix)}"
        self._directory = self._home / "snapshots" / _digest(listing)

    def fetch(self, names: Sequence[str]) -> Path:
        """See `Source.fetch`. What boto3 raises comes through."""
        blobs = self._home / "blobs"
        absent = [name for name in names if not self._blob(name).exists()]
        if absent:
            total = sum(self.sizes[name] for name in absent)
            make_room(self._cache, total, self.name)
            blobs.mkdir(parents=True, exist_ok=True)
            remove_abandoned(blobs)
            log.info("Downloading %.1f MB of %s, in files: %d", total / 1e6, self.name, len(absent))
            with Progress(f"Downloading {self.name}", total) as progress:
                for name in absent:
                    self._download(name, progress)
        for name in names:
            self._place(name)
        return self._directory

    def _objects(self) -> list[tuple[str, int, str]]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
        return [
            (item["Key"].removeprefix(self._prefix), int(item["Size"]), item["ETag"].strip('"'))
            for page in pages
            for item in page.get("Contents", ())
            if not item["Key"].endswith("/")
        ]

    def _blob(self, name: str) -> Path:
        return self._home / "blobs" / self._etags[name]

    def _download(self, name: str, progress: Progress) -> None:
        blob = self._blob(name)
        part = blob.with_name(f"{blob.name}.{os.getpid()}.incomplete")
        self._client.download_file(self._bucket, f"{self._prefix}{name}", str(part), Callback=progress.add)
        came, expected = part.stat().st_size, self.sizes[name]
        if came != expected:
            part.unlink()
            raise ConfigurationError(
                f"{self.name}: {name} came with {came} bytes instead of {expected}; it was changed meanwhile: "
                "start again."
            )
        part.replace(blob)

    def _place(self, name: str) -> None:
        link = self._directory / name
        if not Path(os.path.normpath(link)).is_relative_to(os.path.normpath(self._directory)):
            raise ConfigurationError(f"{self.name}: {name!r} lies outside of the model; rename it or remove it.")
        if link.exists():
            return
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(self._blob(name), link.parent))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _import_boto3() -> ModuleType:
    try:
        return import_module("boto3")
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "A model in S3 needs boto3, which is not installed: pip install 'weir-serving[sagemaker]'."
        ) from error
