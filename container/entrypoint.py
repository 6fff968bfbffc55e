"""What the image starts: the server with the given flags, or with SageMaker's word `serve`; another command as it is.

Knows nothing of the server but how it is called and where SageMaker puts a model; needs nothing but the standard
library, and is gone in milliseconds: it becomes what it starts, so that this is process 1 and gets the signals.
"""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

SERVE = "serve"
EMPTY_IS_UNSET = ("HF_", "HUGGING_FACE_", "SAGEMAKER_", "SM_")  # SageMaker's SDK sends what was not said as ""
SAGEMAKER_MODEL = "opt/ml/model"
COMPAT = "usr/local/cuda/compat"
DRIVER_VERSION = "proc/driver/nvidia/version"
NOT_FOUND, NOT_EXECUTABLE = 127, 126  # as shells have it


class Start(NamedTuple):
    """What is to become of this process."""

    command: list[str]
    environ: dict[str, str]


def prepared(arguments: Sequence[str], environ: Mapping[str, str], root: Path = Path("/")) -> Start:
    """What these arguments start, and with which environment.

    Args:
        root: where the file system begins.
    """
    prepared_environ = {**environ, **_newer_driver(environ, root)}
    if arguments and arguments[0] != SERVE and not arguments[0].startswith("-"):
        return Start(list(arguments), prepared_environ)
    for name in [name for name, value in environ.items() if not value and name.startswith(EMPTY_IS_UNSET)]:
        del prepared_environ[name]
    if _serves_local_model(arguments, prepared_environ, root) and _has_local_adapters(arguments, prepared_environ):
        prepared_environ.setdefault("HF_HUB_OFFLINE", "1")
    return Start([sys.executable, "-m", "serving", *arguments], prepared_environ)


def main() -> int:
    """Become the command. Returns an exit code only where that cannot be, after one line on standard error."""
    start = prepared(sys.argv[1:], os.environ)
    program = start.command[0]
    try:
        os.execvpe(program, start.command, start.environ)
    except FileNotFoundError:
        reason = "there is no such command"
        code = NOT_FOUND
    except OSError as error:
        reason = error.strerror or str(error)
        code = NOT_EXECUTABLE
    hint = "give `serve`, flags of the server (`--help` lists them) or a command"
    print(f"Error: cannot run {program!r}: {reason}; {hint}.", file=sys.stderr)
    return code


def _said(arguments: Sequence[str], environ: Mapping[str, str], flag: str, *variables: str) -> str:
    """A setting's value: of its last flag, or of the first variable that is not empty; "" where nobody said it."""
    flags = _values(arguments, flag)[-1:]
    return next((value for value in (*flags, *(environ.get(name) for name in variables)) if value), "")


def _values(arguments: Sequence[str], flag: str) -> list[str]:
    """What stands behind each of a flag's places."""
    values = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if argument == flag:
            values.append(following)
        elif argument.startswith(f"{flag}="):
            values.append(argument.partition("=")[2])
    return values


def _serves_local_model(arguments: Sequence[str], environ: Mapping[str, str], root: Path) -> bool:
    """Whether the model is here whole, so that nobody needs the hub; an adapter's base may be elsewhere."""
    named = Path(_said(arguments, environ, "--model-id", "MODEL_ID", "HF_MODEL_ID") or f"/{SAGEMAKER_MODEL}")
    model = root / str(named).lstrip("/") if named.is_absolute() else named
    return (model / "config.json").is_file() and not (model / "adapter_config.json").exists()


def _has_local_adapters(arguments: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Whether every adapter for requests lies in a directory; `@file` may name any."""
    said = _values(arguments, "--lora-adapters") or [environ.get("LORA_ADAPTERS", "")]
    items = [item.strip() for value in said for item in value.split(",")]
    return all(item.partition("=")[2].startswith(("/", ".")) for item in items if item)


def _newer_driver(environ: Mapping[str, str], root: Path) -> dict[str, str]:
    """Puts CUDA's forward-compatible driver library first where the host's driver is older than it.

    The dynamic loader reads the variable once, when a process starts; so this cannot be left to the server.
    """
    compat = root / COMPAT
    try:
        host = _version((root / DRIVER_VERSION).read_text())
        brought = _version((compat / "libcuda.so.1").resolve(strict=True).name)
    except OSError:  # no GPU, or an image without that library
        return {}
    if not host or not brought or host >= brought:
        return {}
    others = [path for path in environ.get("LD_LIBRARY_PATH", "").split(":") if path and path != str(compat)]
    return {"LD_LIBRARY_PATH": ":".join([str(compat), *others])}


def _version(text: str) -> tuple[int, ...]:
    """The first driver's version in a text, such as 550.54.15; () where there is none."""
    found = re.search(r"\b(\d{3,}(?:\.\d+)+)\b", text)
    return tuple(map(int, found[1].split("."))) if found else ()


if __name__ == "__main__":
    sys.exit(main())
