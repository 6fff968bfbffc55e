"""Models of the hub: what is needed of a repository, fetched into the hub's own cache or found there.

Knows no tensor, and nothing of adapters. Runs in a process of its own, since it waits for the network.
"""

import contextlib
import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo
from tqdm import tqdm

from serving import __version__
from serving.errors import ConfigurationError, ModelError, WeirError
from serving.protocol import Origin
from serving.weights.model_files import Source, missing_names
from serving.weights.model_files import collect as collect_model
from serving.weights.progress import Progress

FILES_AT_A_TIME = 8
ABANDONED_S = 600  # since the last byte of a part of a file; one that is being written gets some every few seconds
PAUSES_S = (1, 2, 4)  # before the hub is asked again
LIBRARY = "weir"
LONGEST_REVISION = 200  # characters, so that what it becomes fits a file's name
COMMIT = re.compile(r"[0-9a-f]{40}")
TOKEN_ADVICE = "set HF_TOKEN to a token that may read it"

log = logging.getLogger(__name__)


def fetch(
    repository: str, revision: str | None, *, cache: Path | None = None, token: str | None = None,
    collect: Callable[[Source], Path] = collect_model,
) -> tuple[Path, Origin]:  # fmt: skip
    """Bring a repository's model or adapter into the cache.

    What is there already is not fetched again. When the hub cannot be asked, or HF_HUB_OFFLINE forbids it, the cache
    alone answers.

    Args:
        revision: a branch, a tag or a commit; the main branch where it is None.
        cache: where downloads are kept; the hub's usual place where it is None.
        token: for what not everybody may read; a stored one where it is None.
        collect: fetches what is needed of it.

    Returns:
        The directory that holds the files, and what the hub told of them.

    Raises:
        ConfigurationError: it cannot be had; the text says what to do.
    """
    cache = cache or default_cache()
    revision = revision or constants.DEFAULT_REVISION
    check_revision(revision)
    kept, missing = _kept(repository, revision, cache)
    api = HfApi(token=token, library_name=LIBRARY, library_version=__version__)
    try:
        info = _ask(api, repository, revision, PAUSES_S if missing else ())
    except Exception as error:  # what the client's transport raises has another name in each of its versions
        why = reason(error, repository, revision, token)
        if isinstance(error, OfflineModeIsEnabled):
            if missing:
                raise ConfigurationError(
                    f"HF_HUB_OFFLINE is set and the cache {cache} lacks {missing[0]} of {repository} (revision "
                    f"{revision}); start once without it, or name another cache with --huggingface-hub-cache."
                ) from error
        elif missing or isinstance(error, RevisionNotFoundError):
            raise ConfigurationError(why) from error
        else:
            log.warning("%s Serving what the cache holds of it, commit %s.", why, kept.name)
        return kept, Origin(sha=kept.name)
    source = Repository(repository, info, cache, token)
    try:
        directory = collect(source)
        _remember(directory.parent.parent / "refs" / revision, source.sha)
    except WeirError:
        raise
    except Exception as error:
        raise ConfigurationError(reason(error, repository, revision, token, cache)) from error
    return directory, Origin(sha=source.sha, pipeline_tag=info.pipeline_tag)


class Repository:
    """One commit of a repository, as a `Source`."""

    def __init__(self, name: str, info: ModelInfo, cache: Path, token: str | None) -> None:
        self.name = name
        self.sha = info.sha or ""
        self.sizes: Mapping[str, int] = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        self._cache = cache
        self._token = token

    def fetch(self, names: Sequence[str]) -> Path:
        """See `Source.fetch`. What the client raises comes through."""
        here = {name: path for name in names if (path := self._cached(name)) is not None}
        if absent := [name for name in names if name not in here]:
            total = sum(self.sizes[name] for name in absent)
            make_room(self._cache, total, self.name)
            log.info("Downloading %.1f MB of %s, in files: %d", total / 1e6, self.name, len(absent))
            with Progress(f"Downloading {self.name}", total) as progress:
                here |= self._download(absent, progress)
        name, path = next(iter(here.items()))
        return path.parents[name.count("/")]

    def _cached(self, name: str) -> Path | None:
        path = try_to_load_from_cache(self.name, name, cache_dir=self._cache, revision=self.sha)
        return Path(path) if isinstance(path, str) else None

    def _download(self, names: Sequence[str], progress: Progress) -> dict[str, Path]:
        remove_abandoned(self._cache / ("models--" + self.name.replace("/", "--")) / "blobs")
        pool = ThreadPoolExecutor(FILES_AT_A_TIME)
        try:
            running = {pool.submit(self._download_one, name, progress): name for name in names}
            return {running[done]: done.result() for done in as_completed(running)}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _download_one(self, name: str, progress: Progress) -> Path:
        class Bar(tqdm):
            """What the client takes for its own progress bar of this file."""

            def __init__(self, *args: Any, **options: Any) -> None:
                options.pop("name", None)
                super().__init__(*args, **{**options, "disable": True})

            def update(self, n: float | None = 1) -> bool | None:
                progress.add(int(n or 0))
                return None

            def update_transfer(self, n: float | None = 1) -> None:
                """Bytes on the wire, which may be fewer than those of the file."""

            def set_transfer_postfix_str(self, postfix: str, refresh: bool = False) -> None:
                """Their rate."""

        return Path(
            hf_hub_download(
                self.name, name, revision=self.sha, cache_dir=self._cache, token=self._token, library_name=LIBRARY,
                library_version=__version__, tqdm_class=Bar,
            )
        )  # fmt: skip


def _ask(api: HfApi, repository: str, revision: str, pauses_s: Sequence[float]) -> ModelInfo:
    """What the hub knows of a revision. A network may come up later than the server, and a hub may be busy."""
    for pause_s in pauses_s:
        try:
            return api.model_info(repository, revision=revision, files_metadata=True)
        except Exception as error:  # see `fetch`
            if not _may_pass(error):
                raise
            log.warning("%s Trying again in %d s", reason(error, repository, revision, None), pause_s)
        time.sleep(pause_s)
    return api.model_info(repository, revision=revision, files_metadata=True)


def _may_pass(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return not isinstance(error, OfflineModeIsEnabled | HFValidationError)


def default_cache() -> Path:
    """Where downloads are kept unless said otherwise; HF_HUB_CACHE and HF_HOME move it."""
    return Path(constants.HF_HUB_CACHE)


def make_room(cache: Path, needed: int, what: str) -> None:
    """Raise ConfigurationError where a download cannot be written."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
    except OSError as error:
        raise ConfigurationError(_unwritable(cache, error)) from error
    if free < needed:
        raise ConfigurationError(
            f"{what} needs {needed / 1e9:.1f} GB in {cache}, where {free / 1e9:.1f} GB are free; choose another place "
            "with --huggingface-hub-cache."
        )


def remove_abandoned(directory: Path) -> None:
    """Remove the parts of files that a download left behind when it was killed; nobody can go on with them."""
    for path in directory.glob("*.incomplete*"):
        with contextlib.suppress(FileNotFoundError):  # another server on this cache removed it, or is done with it
            if time.time() - path.stat().st_mtime > ABANDONED_S:
                log.info("Removing %s, which a download left behind", path.name)
                path.unlink()


def check_revision(revision: str) -> None:
    """Raise ConfigurationError where a revision is no name: it becomes a path in the cache, and may be an adapter's."""
    parts = revision.split("/")
    if len(revision) > LONGEST_REVISION or not revision.isprintable() or {"", ".", ".."} & {*parts}:
        raise ConfigurationError(f"{revision[:LONGEST_REVISION]!r} is no branch, tag or commit; see --revision.")


def _kept(repository: str, revision: str, cache: Path) -> tuple[Path, list[str]]:
    """Where the cache has a revision, and what is missing there."""
    home = cache / ("models--" + repository.replace("/", "--"))
    reference = home / "refs" / revision
    sha = revision if COMMIT.fullmatch(revision) else reference.read_text().strip() if reference.is_file() else "none"
    directory = home / "snapshots" / sha
    try:
        return directory, missing_names(directory) if directory.is_dir() else ["everything"]
    except ModelError as error:
        return directory, [f"a whole index ({error})"]


def _remember(reference: Path, sha: str) -> None:
    """Note which commit a revision's name stands for, where the hub's other tools look for it too."""
    if reference.name == sha or (reference.is_file() and reference.read_text() == sha):
        return
    reference.parent.mkdir(parents=True, exist_ok=True)
    fresh = reference.with_name(f"{reference.name}.{sha}.new")
    fresh.write_text(sha)
    fresh.replace(reference)


def reason(error: Exception, repository: str, revision: str, token: str | None, cache: Path | None = None) -> str:
    """What went wrong and what to do, in one line."""
    if isinstance(error, GatedRepoError):
        who = "the account of the token" if token else "an account"
        page = f"{constants.ENDPOINT}/{repository}"
        return f"{repository} is gated: ask for access with {who} at {page}, and {TOKEN_ADVICE}."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"There is no directory {repository!r}, and the hub knows no such model or keeps it private: check the "
            f"name, or {TOKEN_ADVICE}."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repository} has no revision {revision!r}; see --revision."
    if isinstance(error, HFValidationError):
        return f"{repository!r} is neither a directory nor a model of the hub."
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return f"The hub refuses the token: {TOKEN_ADVICE}, or unset it."
        return f"The hub answers {status} for {repository}: {_first_line(error)}"
    if isinstance(error, OSError) and cache is not None and error.errno is not None:
        return _unwritable(cache, error)
    return (
        f"The hub at {constants.ENDPOINT} cannot be reached for {repository} ({type(error).__name__}: "
        f"{_first_line(error)}); name a directory where there is no network."
    )


def _unwritable(cache: Path, error: OSError) -> str:
    return f"Cannot write to {cache} ({error.strerror}); name another place with --huggingface-hub-cache."


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
