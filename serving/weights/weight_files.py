"""Which files of a directory hold a model's weights.

Knows names alone: neither what is in the files, save an index, nor torch.
"""

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from serving.errors import ModelError

SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED_SUFFIXES = (".bin", ".pt", ".pth")  # which `weir convert` alone opens
POINTER_START = b"version "  # how a file begins that stands for one in Git's large file storage
# Words in the names of safetensors files that lie beside a model and are not its weights, or are them once more.
_BESIDE = ("adapter", "training", "consolidated")
_LISTED = 5  # how many names a message lists


def weight_files(directory: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The safetensors files, and their index where there is one: the file of every tensor.

    What the index names, else the one file of the usual name, else whatever looks like weights.

    Raises:
        ModelError: there are none, or not all; the text says what is missing.
    """
    if (directory / INDEX).exists():
        index = read_index(directory / INDEX)
        return [directory / file for file in sorted(set(index.values()))], index
    files = unindexed([path.name for path in directory.glob("*.safetensors")])
    if missing := numbered_parts(files):
        raise ModelError(f"{directory} lacks {listed(missing)}; is the download complete?")
    if files:
        return [directory / file for file in files], {}
    if pickles := sorted(path.name for path in directory.glob("*") if path.suffix in PICKLED_SUFFIXES):
        raise ModelError(
            f"{directory} holds no .safetensors file but {listed(pickles)}, and only safetensors are served: "
            f"`weir convert {shlex.quote(str(directory))}` writes them"
        )
    raise ModelError(f"{directory} holds no .safetensors file; only safetensors weights are served")


def unindexed(names: Iterable[str]) -> list[str]:
    """Of safetensors files without an index, those that are the model, sorted: some repositories hold it twice."""
    names = sorted(names)
    if SINGLE_FILE in names:
        return [SINGLE_FILE]
    return [name for name in names if not is_beside(name)] or names


def is_beside(name: str) -> bool:
    """Whether a file lies beside a model's weights without being read with them."""
    return any(word in name for word in _BESIDE)


def listed(names: list[str]) -> str:
    """A few of the names, and how many there are beyond."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def read_index(path: Path) -> dict[str, str]:
    """An index: for every tensor's name the file that holds it, which lies beside the index.

    Raises ModelError where it is none, or names a file that is not there.
    """
    index = named_in_index(path)
    for file in sorted(set(index.values())):
        if not (path.parent / file).is_file():
            raise ModelError(f"{file} is named in {path.name} and does not exist; is the download complete?")
    return index


def named_in_index(path: Path) -> dict[str, str]:
    """The same of files that need not be there yet. Raises ModelError where it is no index."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        index = {name: file for name, file in content.items() if isinstance(file, str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path.name} is not an index of weights: {type(error).__name__}: {error}") from error
    if not index or len(index) != len(content):
        raise ModelError(f"{path.name} is not an index of weights: it should name a file for every tensor")
    for file in sorted(set(index.values())):
        # A name with a path in it could point outside the model's directory.
        if Path(file).name != file:
            raise ModelError(f"{path.name} names {file!r}, which is not a plain file name")
    return index


def numbered_parts(names: list[str]) -> list[str]:
    """What is missing of files named as in `model-00001-of-00003.safetensors`, which say how many there are."""
    missing = []
    for stem, count, suffix in {m.groups() for n in names if (m := re.fullmatch(r"(.*)-\d+-of-(\d{1,5})(\..*)", n))}:
        parts = [f"{stem}-{i:0{len(count)}d}-of-{count}{suffix}" for i in range(1, int(count) + 1)]
        missing += [part for part in parts if part not in names]
    return sorted(missing)
