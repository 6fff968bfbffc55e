"""Where the model lies that the operator named: at once for a directory, else once a child process has fetched it.

Knows no network and no tensor: the child does, and this may be called by a process that must stay small.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from serving.adapter_names import NamedAdapter
from serving.errors import ModelError
from serving.weights.model_files import ModelFiles, is_adapter, local_adapter


class Fetched(Struct, frozen=True, tag=True):
    """The model is here."""

    files: ModelFiles


class NotFetched(Struct, frozen=True, tag=True):
    """It cannot be had; the text is for the operator."""

    reason: str


def fetch(model_id: str, revision: str | None, adapters: Sequence[NamedAdapter] = ()) -> ModelFiles:
    """Wait until the model is here; minutes, where it is large and comes from a network.

    The child dies with the thread that called this. Its progress is on the standard streams.

    Args:
        adapters: for requests.

    Raises:
        ModelError: it cannot be had; the text says what to do.
    """
    directory = Path(model_id)
    alone = directory.is_dir() and not is_adapter([path.name for path in directory.iterdir()])
    if alone and all(Path(adapter.place).is_dir() for adapter in adapters):
        return ModelFiles(directory=model_id, adapters={adapter.name: local_adapter(adapter) for adapter in adapters})
    named = ",".join(map(str, adapters))
    ours, theirs = os.pipe()
    with open(ours, "rb") as outcome:  # noqa: PTH123 - a descriptor, not a path
        try:
            process = subprocess.Popen(
                [
                    sys.executable, "-m", "serving", "download-weights", f"--outcome-fd={theirs}",
                    *([] if revision is None else [f"--revision={revision}"]),
                    *([f"--lora-adapters={named}"] if adapters else []), "--", model_id,
                ],
                pass_fds=(theirs,), stdin=subprocess.DEVNULL,
            )  # fmt: skip
        finally:
            os.close(theirs)
        line = outcome.read()
    code = process.wait()
    if not line:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        killed = ": too little memory?" if code == -signal.SIGKILL else ""
        raise ModelError(f"the download of {model_id} ended without a word ({how}{killed})")
    told = msgspec.json.decode(line, type=Fetched | NotFetched)
    if isinstance(told, NotFetched):
        raise ModelError(told.reason)
    return told.files
