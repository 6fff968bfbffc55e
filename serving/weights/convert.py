"""`weir convert`: a pickled checkpoint (`.bin`, `.pt`) becomes safetensors.

A process of its own that no server starts or imports: the one place that unpickles (tensors alone, `weights_only`).
Knows no model.
"""

import json
import os
import re
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from serving.errors import ModelError
from serving.telemetry import logs
from serving.weights.checkpoint import DTYPES
from serving.weights.progress import Progress
from serving.weights.weight_files import (
    INDEX,
    PICKLED_SUFFIXES,
    POINTER_START,
    SINGLE_FILE,
    is_beside,
    listed,
    numbered_parts,
    read_index,
)

PICKLED_FILE, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
INTERRUPTED, TERMINATED = 130, 143  # exit codes, as shells count signals
_PARTIAL = ".partial"
# What a training run leaves beside its weights.
_OF_TRAINING = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states)")
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".bpe", ".spm", ".py", ".md", "")
# Where an embedding and a head are one tensor, the head's name goes.
_HEADS = ("lm_head", "embed_out")
_DTYPES = {dtype: name for name, dtype in DTYPES.items()}


@click.command(context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 120})
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("target", type=click.Path(file_okay=False, path_type=Path), required=False)
@click.option("--force", is_flag=True, help="Overwrite what is in TARGET under the names that are written.")
def command(source: Path, target: Path | None, force: bool) -> None:
    """Write the pickled weights in the directory SOURCE (or of one file) as safetensors.

    They go beside the old ones, which stay, or with configuration and tokenizer into the directory TARGET. Files that
    hold more than tensors are refused; nothing in them is run.
    """
    logs.configure("info", json_output=False)
    signal.signal(signal.SIGTERM, _leave)
    written = convert(source, target or (source if source.is_dir() else source.parent), force=force)
    click.echo(f"Wrote {listed([path.name for path in written])} to {written[0].parent}")


def main(arguments: Sequence[str]) -> int:
    """Run the command. Returns its exit code; errors are one line on standard error."""
    try:
        command.main(list(arguments), prog_name="weir convert", standalone_mode=False)
    except click.Abort:
        click.echo("Error: interrupted; nothing was written", err=True)
        return INTERRUPTED
    except click.UsageError as error:
        click.echo(f"Error: {error.format_message()} See `weir convert --help`.", err=True)
        return error.exit_code
    except ModelError as error:
        click.echo(f"Error: {error}", err=True)
        return 1
    return 0


def convert(source: Path, target: Path, *, force: bool = False) -> list[Path]:
    """Write safetensors with the names, types and files of a pickled checkpoint; all of them or none.

    Args:
        source: a directory, or one file.
        target: a directory, which is made where there is none; may be the source.
        force: whether files of the same names may be replaced.

    Returns:
        The files of weights that were written, the index last where there is one.

    Raises:
        ModelError: a file is missing, broken, holds more than tensors, or would be overwritten; the text names it.
    """
    index = _index(source)
    names = {path: _new_name(path, sole=len(paths) == 1) for paths in [_pickled_files(source, index)] for path in paths}
    directory = source if source.is_dir() else source.parent
    copied = [] if directory.resolve() == target.resolve() else _configuration_files(directory)
    indices = [INDEX] if len(names) > 1 else []
    _check_target(target, [*names.values(), *indices, *(path.name for path in copied)], force=force)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with _staged(target) as stage:
            weight_map, nbytes = _convert_files(names, index, stage)
            for path in copied:
                shutil.copyfile(path, stage(path.name))
            if indices:
                _write_json(stage(INDEX), {"metadata": {"total_size": nbytes}, "weight_map": weight_map})
    except OSError as error:
        raise ModelError(f"{error.filename or target}: {error.strerror or error}; nothing was converted") from error
    return [target / name for name in [*names.values(), *indices]]


def _convert_files(
    names: Mapping[Path, str], index: Mapping[str, str], stage: Callable[[str], Path]
) -> tuple[dict[str, str], int]:
    """Convert file by file. Returns the new file of every tensor, in order, and the bytes of all tensors."""
    weight_map: dict[str, str] = {}
    nbytes = 0
    with Progress("Converting", sum(path.stat().st_size for path in names)) as progress:
        for path, name in names.items():
            tensors = load_tensors(path)
            if lacking := [key for key, file in index.items() if file == path.name and key not in tensors]:
                raise ModelError(f"{path.name} does not hold {listed(lacking)}, though {PICKLED_INDEX} says so")
            if twice := sorted(tensors.keys() & weight_map.keys()):
                raise ModelError(f"{path.name} holds {listed(twice)}, which another file holds as well")
            same = shared(tensors)
            kept = {key: tensor for key, tensor in tensors.items() if key not in same}
            write_safetensors(stage(name), kept, {**same, "format": "pt"}, progress.add)
            verify(stage(name), kept)
            weight_map |= dict.fromkeys(kept, name)
            nbytes += sum(tensor.nbytes for tensor in kept.values())
    return dict(sorted(weight_map.items())), nbytes


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The state dictionary in a file, mapped from it where its format allows that.

    Raises:
        ModelError: the file is broken, or holds anything that is no tensor, no number and no text: none of it is run.
    """
    with path.open("rb") as file:
        start = file.read(8)
    if start == POINTER_START:
        raise ModelError(f"{path.name} is only a Git LFS pointer to the real file; `git lfs pull` fetches it")
    try:
        # Files from before PyTorch 1.6 are no zip archives, and cannot be mapped.
        mapped = start.startswith(b"PK\x03\x04")
        with warnings.catch_warnings(action="ignore"):  # what a file is refused for is said in one line
            content = torch.load(path, weights_only=True, mmap=mapped, map_location="cpu")  # noqa: TID251 - only here
    except Exception as error:  # a broken pickle can raise anything
        raise ModelError(_why_not(path, error)) from error
    tensors = _state_dictionary(path, content)
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.dtype not in _DTYPES or tensor.device.type != "cpu":
            kind = f"{tensor.dtype}, {tensor.layout}, {tensor.device}"
            raise ModelError(f"{path.name}: {name!r} ({kind}) is of a kind that safetensors does not keep")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ModelError(f"{path.name}: {name!r} claims {tensor.nbytes} bytes and has fewer")
    return tensors


def shared(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For every name that goes because another one is the same tensor: that other name.

    As transformers does, the one that stays is an embedding rather than a head, and the outermost embedding.
    """
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            alike.setdefault(place, []).append(name)
    goes: dict[str, str] = {}
    for names in alike.values():
        kept, *others = sorted(names, key=lambda name: (name.split(".")[-2:][0] in _HEADS, name.count("."), name))
        goes |= dict.fromkeys(others, kept)
    return goes


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], on_written: Callable[[int], object]
) -> None:
    """Write a file of tensors one after the other, with memory for one; to the disk when it returns. Raises OSError.

    The format: the header's length in eight bytes, the header (JSON, padded so that data is aligned), the data without
    gaps, wider types first.
    """
    needed = sum(tensor.nbytes for tensor in tensors.values())
    if needed > (free := shutil.disk_usage(path.parent).free):
        raise ModelError(f"{path.parent} has {free / 1e9:.1f} GB free, and {path.stem} needs {needed / 1e9:.1f} GB")
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    ordered, at = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)), 0
    for name in ordered:
        tensor = tensors[name]
        end = at + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            data: Any = tensors[name].detach().contiguous().flatten().view(torch.uint8).numpy()
            file.write(data)
            on_written(data.nbytes)
        file.flush()
        os.fsync(file.fileno())


def verify(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read names, types and shapes back. Raises ModelError where they are not what was to be written."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            found = {name: (part.get_dtype(), list(part.get_shape())) for name, part in parts.items()}
    except SafetensorError as error:
        raise ModelError(f"{path.name} cannot be read back: {error}") from error
    if found != {name: (_DTYPES[tensor.dtype], list(tensor.shape)) for name, tensor in tensors.items()}:
        raise ModelError(f"{path.name} does not hold what was written; is the disk well?")


def _index(source: Path) -> dict[str, str]:
    path = source / PICKLED_INDEX
    return read_index(path) if path.is_file() else {}


def _pickled_files(source: Path, index: Mapping[str, str]) -> list[Path]:
    if source.is_file():
        return [source]
    if index:
        return [source / name for name in sorted(set(index.values()))]
    if (source / PICKLED_FILE).is_file():
        return [source / PICKLED_FILE]
    files = sorted(path for path in source.glob("*") if path.suffix in PICKLED_SUFFIXES and path.is_file())
    files = [path for path in files if not _OF_TRAINING.match(path.name)]
    if parts := [path for path in files if re.fullmatch(r"pytorch_model-\d+-of-\d+\.bin", path.name)]:
        if missing := numbered_parts([path.name for path in parts]):
            raise ModelError(f"{source} lacks {listed(missing)}; is the download complete?")
        return parts
    if len(files) > 1:
        raise ModelError(f"{source} holds {listed([path.name for path in files])}; name the file to convert")
    if not files:
        raise ModelError(f"{source} holds no {' or '.join(PICKLED_SUFFIXES)} file; there is nothing to convert")
    return files


def _new_name(path: Path, *, sole: bool) -> str:
    if sole and not path.name.startswith("adapter_"):
        return SINGLE_FILE
    return f"{path.stem.removeprefix('pytorch_')}.safetensors"


def _configuration_files(directory: Path) -> list[Path]:
    """Configuration, tokenizer, templates, code and licence: everything but weights in whatever format."""
    return sorted(
        path
        for path in directory.iterdir()
        if path.is_file()
        and path.suffix in _COPIED_SUFFIXES
        and not path.name.startswith(".")
        and not path.name.endswith((".index.json", _PARTIAL))
    )


def _check_target(target: Path, names: list[str], *, force: bool) -> None:
    there = [name for name in names if (target / name).exists()]
    others = sorted(
        path.name
        for path in target.glob("*.safetensors*")
        if path.name not in names and not is_beside(path.name) and path.suffix != _PARTIAL
    )
    if others:
        raise ModelError(f"{target} holds {listed(others)} already, which would be mixed up with the new weights")
    if there and not force:
        raise ModelError(f"{target} holds {listed(there)} already; --force overwrites")


@contextmanager
def _staged(target: Path) -> Iterator[Callable[[str], Path]]:
    """Gives paths to write to, which get their final names when the block ends well and are removed when it does not.

    In the order in which they were asked for: an index comes when everything it names is there.
    """
    paths: dict[Path, Path] = {}

    def stage(name: str) -> Path:
        return paths.setdefault(target / name, target / f"{name}{_PARTIAL}")

    try:
        yield stage
        for final, partial in paths.items():
            partial.replace(final)
    finally:
        for partial in paths.values():
            partial.unlink(missing_ok=True)


def _state_dictionary(path: Path, content: object) -> dict[str, Tensor]:
    """The tensors, which training frameworks may have wrapped; numbers and texts beside them are left out."""
    inner = [content]
    if isinstance(content, dict):
        inner += [content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)]
    for level in inner:
        if isinstance(level, dict) and any(isinstance(value, Tensor) for value in level.values()):
            tensors = {name: value for name, value in level.items() if isinstance(value, Tensor)}
            if stray := [name for name in tensors if not isinstance(name, str)]:
                raise ModelError(f"{path.name}: a tensor's name is {stray[0]!r}, which is no text")
            return tensors
    raise ModelError(f"{path.name} holds no tensors by name: it is no state dictionary")


def _why_not(path: Path, error: Exception) -> str:
    text = str(error)
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        return (
            f"{path.name} holds more than tensors: it would call {found[1]}. Nothing of it was run or converted; "
            "get safetensors from its author, or a file with the state dictionary alone"
        )
    reason = text.partition(". ")[0].partition("\n")[0] if isinstance(error, RuntimeError) else type(error).__name__
    return f"{path.name} is corrupt, truncated or no checkpoint of PyTorch: {reason}"


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _leave(number: int, frame: object) -> NoReturn:
    sys.exit(TERMINATED)
